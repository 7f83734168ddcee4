"""Calibration of the likeliest tokens and the best temperature, against slow loops and known answers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from config import RunConfig
from data.batches import validation_windows
from training import calibration
from training.calibration import Calibration, halves, survey
from training.evaluation import evaluate
from training.hardware import choose
from training.resampling import Gaps

V = 9


def case(n: int = 4000, seed: int = 0, truth: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits (n, V), and gold (n,) drawn from softmax(logits / truth): a model whose best temperature is `truth`."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, V, generator=generator)
    gold = torch.multinomial((logits / truth).softmax(-1), 1, generator=generator)[:, 0]
    return logits, gold


def counted(logits: Tensor, gold: Tensor, k: int = 3, bins: int = 15) -> Calibration:
    """A calibration of both, in uneven parts."""
    found = Calibration.zero(k, bins)
    for part in (slice(0, 7), slice(7, None)):
        found.add(logits[part], gold[part])
    return found


def slow_top_k_error(logits: Tensor, gold: Tensor, k: int, bins: int) -> float:
    """The definition, one token after the other."""
    groups: dict[int, list[tuple[float, bool]]] = {}
    for row, token in zip(logits.double().tolist(), gold.tolist(), strict=True):
        total = math.fsum(math.exp(z) for z in row)
        likeliest = sorted(range(len(row)), key=lambda i: -row[i])[:k]
        mass = math.fsum(math.exp(row[i]) / total for i in likeliest)
        groups.setdefault(min(int(mass * bins), bins - 1), []).append((mass, token in likeliest))
    apart = (abs(sum(m for m, _ in g) / len(g) - sum(h for _, h in g) / len(g)) * len(g) for g in groups.values())
    return sum(apart) / len(gold)


@pytest.mark.parametrize(("k", "bins"), [(1, 15), (3, 15), (5, 4), (V, 15), (V + 3, 15)])
def test_the_top_k_error_is_its_definition(k, bins):
    """Catches hits counted for the first guess alone, bins by another number than the mass, and k beyond V."""
    logits, gold = case(300)
    assert counted(logits, gold, k, bins).top_k_error() == pytest.approx(
        slow_top_k_error(logits, gold, k, bins), abs=1e-6
    )


@pytest.mark.parametrize("k", [1, 3, V])
def test_what_lies_beyond_the_top_is_counted(k):
    """Catches mass and hits of the top itself, or of a bin: a tail that is starved would not show."""
    logits, gold = case(300)
    p, ranks = logits.softmax(-1), (logits > logits.gather(1, gold[:, None])).sum(1)
    mass, found = counted(logits, gold, k, 15).beyond()
    assert mass == pytest.approx(float(p.sort(descending=True).values[:, k:].sum(1).mean()), abs=1e-6)
    assert found == pytest.approx(float((ranks >= k).float().mean()), abs=1e-6)


def test_one_likeliest_token_gives_the_usual_error():
    """Catches a top-k error that is not ECE for k = 1."""
    table = 2 * torch.randn(V, V, generator=torch.Generator().manual_seed(1))
    tokens = np.random.default_rng(0).integers(V, size=200).astype(np.uint16)

    class Table(torch.nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return table[tokens]

    hardware = choose(RunConfig(device="cpu", dtype="float32", threads=1))
    gaps = Gaps(15)
    tally, found = survey(Table().train(), validation_windows(tokens, 8, 4), hardware, bins=15, k=1, gaps=gaps)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.cat(gaps.windows).sum(0), tally.bins[0] - tally.bins[1], atol=1e-5, rtol=0)
    usual = evaluate(Table(), validation_windows(tokens, 8, 4), hardware, bins=15).metrics(200)  # type: ignore[arg-type]
    assert tally.metrics(200) == usual and found.tokens == 199
    assert found.top_k_error() == pytest.approx(usual["val/ece"], abs=1e-6)
    assert found.cross_entropy() == pytest.approx(usual["val/ce"], rel=1e-6)
    assert sum(right for _, right in found.reliability()) > 0


@pytest.mark.parametrize("truth", [0.4, 0.8, 1.0, 1.3, 2.6])
def test_the_best_temperature_is_found(truth):
    """Catches its inverse, a point of the grid in its place, and a minimum of something else than the loss.

    The draw of 4,000 tokens moves the best temperature by up to about 5 %: no false alarm, as the seed is fixed.
    """
    logits, gold = case(truth=truth)
    found = counted(logits, gold)
    best = found.best_temperature()
    assert best == pytest.approx(truth, rel=0.1)
    exact = [float(F.cross_entropy(logits.double() / (best * f), gold)) for f in (1.0, 1.01, 0.99)]
    assert exact[0] == min(exact)
    assert found.cross_entropy(best) == pytest.approx(exact[0], abs=1e-5)
    assert found.cross_entropy(1.01 * best) == pytest.approx(exact[1], abs=1e-5)


def test_a_temperature_out_of_reach_is_the_nearest_in_reach():
    """Catches an endless search where a model is certain and right, or certain and wrong."""
    logits = torch.eye(V).repeat(5, 1) * 3
    right, wrong = torch.arange(V).repeat(5), (torch.arange(V).repeat(5) + 1) % V
    assert counted(logits, right).best_temperature() == pytest.approx(1 / 4)
    assert counted(logits, wrong).best_temperature() == pytest.approx(4)


def test_padding_counts_for_nothing_and_parts_add_up():
    """Catches padded targets among the losses, and halves that are not the whole."""
    logits, gold = case(50)
    padded = counted(torch.cat((logits, torch.full((3, V), 9.0))), torch.cat((gold, torch.full((3,), -1))))
    whole, parts = counted(logits, gold), counted(logits[:20], gold[:20]) + counted(logits[20:], gold[20:])
    for found in (padded, parts):
        assert found.tokens == 50
        torch.testing.assert_close(found.top, whole.top)
        torch.testing.assert_close(found.nll, whole.nll, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("length", "block"), [(100, 8), (97, 8), (10, 8), (9, 8), (5, 8), (2, 1)])
def test_halves_tile_into_the_windows_of_the_whole(length, block):
    """Catches a token that both halves count, one that none does, and a window that reads another context."""
    tokens = np.arange(length, dtype=np.uint16)
    cut = halves(length, block)

    def pairs(part: np.ndarray) -> list[tuple[int, ...]]:
        rows = [row for batch in validation_windows(part, block, 3) for row in zip(*batch, strict=True)]
        real = [(reads[after >= 0].tolist(), after[after >= 0].tolist()) for reads, after in rows]
        return [tuple(reads + after) for reads, after in real if reads]

    parts = [tokens[: cut + 1], tokens[cut:]] if cut else [tokens]
    assert [pair for part in parts for pair in pairs(part)] == pairs(tokens)
    assert (cut == 0) == (length - 1 <= block)


def test_bad_input():
    """Catches an error of 0 for no token at all."""
    with pytest.raises(ValueError, match="positive"):
        Calibration.zero(0, 15)
    with pytest.raises(ValueError, match="nothing to add"):
        Calibration.zero(1, 15) + Calibration.zero(2, 15)


def test_rows_are_looked_at_a_few_at_a_time(monkeypatch):
    """Catches sums that depend on how much memory is used, and rows that are lost between two looks."""
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    gold = torch.randint(-1, 7, (50,), generator=torch.Generator().manual_seed(1))
    whole, parts = Calibration.zero(2, 5), Calibration.zero(2, 5)
    whole.add(logits, gold)
    monkeypatch.setattr(calibration, "ENTRIES", 8 * 7)
    parts.add(logits, gold)
    torch.testing.assert_close(parts.top, whole.top)
    torch.testing.assert_close(parts.nll, whole.nll)
