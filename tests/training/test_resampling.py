"""What chance makes of a calibration error, against texts that are really drawn again."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from training.resampling import FEWEST, STRETCH, Gaps

V, T, BINS = 7, 32, 15


def drawn(windows: int, seed: int, *, sharper: float = 1.0, alike: int = 1) -> tuple[Tensor, Tensor]:
    """Logits (windows, T, V) and gold drawn from a policy `sharper` times as sure; `alike` windows share their gold."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(windows // alike, T, V, generator=generator)
    gold = torch.multinomial((logits / sharper).softmax(-1).flatten(0, 1), 1, generator=generator).view(-1, T)
    return logits.repeat_interleave(alike, 0), gold.repeat_interleave(alike, 0)


def counted(logits: Tensor, gold: Tensor, at_once: int = 50) -> Gaps:
    gaps = Gaps(BINS)
    for logits_, gold_ in zip(logits.split(at_once), gold.split(at_once), strict=True):
        gaps.add(logits_, gold_)
    return gaps


def error(gaps: Gaps) -> float:
    """The calibration error itself."""
    return float(torch.cat(gaps.windows).sum(0).abs().sum()) / gaps.tokens


def test_gaps_are_those_of_every_bin_and_window():
    """Catches hits of another token, bins of another number than the confidence, padding, and a batch's own order."""
    logits, gold = drawn(9, 0)
    gold[3, 5:] = -1
    gaps = counted(logits, gold, at_once=4)
    wanted = np.zeros((9, BINS))
    for w in range(9):
        for t in range(T):
            p = logits[w, t].softmax(-1)
            if gold[w, t] >= 0:
                wanted[w, min(int(p.max() * BINS), BINS - 1)] += float(p.max()) - float(p.argmax() == gold[w, t])
    np.testing.assert_allclose(torch.cat(gaps.windows).numpy(), wanted, atol=1e-5)
    assert gaps.tokens == 9 * T - (T - 5)


@pytest.mark.parametrize("alike", [1, 8])
@pytest.mark.parametrize("sharper", [1.0, 1.5])
def test_chance_is_what_other_texts_would_show(sharper, alike):
    """Catches tokens drawn one by one, whose clustering is lost, and the spread of a mean in place of the error."""
    windows = 20 * STRETCH // T
    texts = [counted(*drawn(windows, seed, sharper=sharper, alike=alike)) for seed in range(1, 41)]
    found = [gaps.chance() for gaps in texts]
    assert all(c is not None and c.stretches == 20 for c in found)
    errors = np.array([error(gaps) for gaps in texts])
    spread = np.mean([c.spread for c in found if c])
    assert spread == pytest.approx(errors.std(ddof=1), rel=0.4)
    right = np.mean([error(counted(*drawn(windows, seed, alike=alike))) for seed in range(1, 41)])
    assert np.mean([c.alone for c in found if c]) == pytest.approx(right, rel=0.2)
    if sharper == 1.0:
        assert errors.mean() == pytest.approx(right)
    else:
        assert errors.mean() > 5 * right


def test_one_answer_whatever_the_batch():
    """Catches stretches that are batches, and draws that differ from call to call."""
    logits, gold = drawn(10 * STRETCH // T, 3)
    assert counted(logits, gold, at_once=50).chance() == counted(logits, gold, at_once=7).chance()


def test_a_short_text_says_nothing():
    """Catches a spread of two or three stretches, which would look small, and a crash without any."""
    assert Gaps(BINS).chance() is None
    assert counted(*drawn((FEWEST - 1) * STRETCH // T, 0)).chance() is None
    assert counted(*drawn(FEWEST * STRETCH // T, 0)).chance() is not None


def test_logits_that_are_not_numbers_are_told_not_fatal():
    """Catches an evaluation of a run that diverged, which dies of an index."""
    gaps = Gaps(15)
    gaps.add(torch.full((10, 256, 3), math.nan), torch.zeros(10, 256, dtype=torch.long))
    found = gaps.chance()
    assert found is None or math.isnan(found.spread)
