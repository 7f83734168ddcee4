"""Slopes by level of probability: what they leave alone, what they mend, and that little text changes little."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avatarl.critics import DenseOpinion
from avatarl.imagination import Writer
from avatarl.levels import LEVELS, fit_slopes, levelled, surer

V = 12
TRUTH = torch.randn(V, V, generator=torch.Generator().manual_seed(0)).mul(2.5).softmax(-1)


class Table:
    """Writes by a table of logits after each token (V, V)."""

    vocab_size, reach = V, 1

    def __init__(self, logits: Tensor) -> None:
        self.log_p = logits.log_softmax(-1)

    def after(self, context: Tensor) -> DenseOpinion:
        return DenseOpinion(self.log_p[context[:, -1]])


def drawn(length: int, seed: int) -> np.ndarray:
    """A text in which TRUTH says what follows each token."""
    ladder, uniform = TRUTH.double().cumsum(-1).numpy(), np.random.default_rng(seed).random(length)
    text = [0]
    for u in uniform:
        text.append(min(V - 1, int(np.searchsorted(ladder[text[-1]], u))))
    return np.array(text, dtype=np.uint16)


def loss(writer: Writer, text: np.ndarray) -> float:
    """Cross-entropy of a text under a writer of one token's reach."""
    stream = torch.from_numpy(text.astype(np.int64))
    return torch.nn.functional.nll_loss(writer.after(stream[:-1, None]).full(), stream[1:]).item()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-0.9, 0.9), min_size=len(LEVELS), max_size=len(LEVELS)), st.integers(0, 999))
def test_levels_are_the_formula(slopes, seed):
    """Catches a level that another slope belongs to, and probabilities that do not sum to 1."""
    log_p = torch.randn(5, V, generator=torch.Generator().manual_seed(seed)).mul(4).double().log_softmax(-1)
    found = levelled(log_p, torch.tensor(slopes, dtype=torch.float64))
    for row, judged in zip(log_p.tolist(), found, strict=True):
        scores = [x + sum(s * max(x, level) for s, level in zip(slopes, LEVELS, strict=True)) for x in row]
        assert judged.tolist() == pytest.approx(torch.tensor(scores, dtype=torch.float64).log_softmax(-1).tolist())
    assert torch.allclose(levelled(log_p, torch.zeros(len(LEVELS))), log_p)


@pytest.mark.parametrize("power", [0.7, 1.4], ids=["too modest", "too sure"])
def test_a_writer_becomes_as_sure_as_it_should_be(power):
    """Catches slopes of the wrong sign, or fitted to what the writer says instead of to what comes."""
    writer: Any = Table(power * TRUTH.log())
    mended, new = surer(writer, drawn(20_000, seed=1)), drawn(20_000, seed=2)
    best = loss(Table(TRUTH.log()), new)
    assert loss(mended, new) < best + 0.2 * (loss(writer, new) - best)
    favourite = mended.after(torch.from_numpy(new[:-1, None].astype(np.int64))).full().exp().max(-1)
    right = (favourite.indices.numpy() == new[1:]).mean()
    assert favourite.values.mean().item() == pytest.approx(right, abs=0.01)


def test_no_other_slopes_suit_the_text_better():
    """Catches a fit that stops before it is there, and one that looks at other contexts than the text's."""
    writer, text = Table(0.7 * TRUTH.log()), drawn(5_000, seed=3)
    slopes = fit_slopes(writer, text)
    stream = torch.from_numpy(text.astype(np.int64))
    log_p = writer.after(stream[:-1, None]).full().double()

    def at(shift: Tensor) -> float:
        fit = torch.nn.functional.nll_loss(levelled(log_p, slopes + shift), stream[1:]).item()
        return fit + (slopes + shift).square().sum().item() / (0.5 * (len(text) - 1))

    for shift in 0.05 * torch.eye(len(LEVELS), dtype=torch.float64):
        assert at(torch.zeros_like(shift)) < min(at(shift), at(-shift))


def test_little_text_changes_little():
    """Catches slopes that run away where a few tokens are all there is, and a text within the writer's reach."""
    writer = Table(TRUTH.log())
    assert not fit_slopes(writer, drawn(0, seed=0)).any()
    assert fit_slopes(writer, drawn(3, seed=0)).abs().max() < 1
    assert surer(writer, drawn(3, seed=0)).reach == 1
