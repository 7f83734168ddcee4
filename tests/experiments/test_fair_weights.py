"""The study of weights that teach no modesty: against summing by hand, and on a little text."""

import math
from pathlib import Path

import pytest
import torch

from experiments import fair_weights
from experiments.fair_weights import bias, fair_weight, mean_consensus
from tests.tiny_train import here

P = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]], dtype=torch.float64)


def by_hand(p: list[float], reality: float, critic: float, epsilon: float) -> list[float]:
    """The mean consensus of one position, draw by draw."""
    size, mean = len(p), [0.0] * len(p)
    for gold in range(size):
        experts = [1 - epsilon if a == gold else epsilon / (size - 1) for a in range(size)]
        score = [experts[a] ** reality * p[a] ** critic for a in range(size)]
        mean = [m + p[gold] * s / sum(score) for m, s in zip(mean, score, strict=True)]
    return mean


def test_the_mean_is_over_gold_as_the_critic_draws_it():
    """Catches gold in the wrong column, a column that is put back elsewhere, and draws that weigh the same."""
    weights = {"reality_weight": 0.6, "critic_weight": 0.5, "epsilon": 0.1}
    expected = torch.tensor([by_hand(p, 0.6, 0.5, 0.1) for p in P.tolist()], dtype=torch.float64)
    torch.testing.assert_close(mean_consensus(P, **weights), expected)
    own = (P * (P / expected).log()).sum(-1).mean().item()
    assert bias(P, **weights).kl == pytest.approx(own)
    assert bias(P, **weights).modesty == pytest.approx((P[:, 0] - expected[:, 0]).mean().item())


def test_one_expert_alone_teaches_no_modesty():
    """Catches a mean that is biased where DESIGN's formula is not: the critic alone, and reality alone."""
    torch.testing.assert_close(mean_consensus(P, reality_weight=0.0, critic_weight=1.0, epsilon=0.1), P)
    alone = mean_consensus(P, reality_weight=1.0, critic_weight=0.0, epsilon=1e-9)
    torch.testing.assert_close(alone, P, atol=1e-8, rtol=0)


@pytest.mark.parametrize(("reality", "epsilon"), [(0.1, 0.1), (0.5, 0.1), (0.8, 0.03)])
def test_the_fair_weight_has_the_least_kl(reality, epsilon):
    """Catches a search that runs the wrong way or stops far from the minimum."""
    fair = fair_weight(P, reality, epsilon)

    def kl(critic: float) -> float:
        return bias(P, reality_weight=reality, critic_weight=critic, epsilon=epsilon).kl

    assert kl(fair) <= min(kl(fair - 0.02), kl(fair + 0.02), kl(1 - reality))
    assert kl(fair) < kl(1 - reality) / 1.2 and math.isfinite(kl(fair))


def test_it_measures_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a row or a line of the figure that is missing, and bad settings that are a traceback."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("To be, or not to be: that is the question.\n" * 200)
    words = ["--corpus", "text.txt", "--positions", "100", "--top-k", "3", "--out", "out"]
    words += ["--reality-weights", "0.3", "0.6", "--epsilons", "0.1"]
    outcome = here(*words, main=fair_weights.main)
    assert outcome.code == 0, outcome.err
    page = Path("out/table.md").read_text()
    assert page.count("\n| 0.1 | 0.") == 2 and "likeliest 6 tokens, at 100 positions" in page
    assert "fair, ε = 0.1" in Path("out/figure.svg").read_text()
    assert here("--epsilons", "1", main=fair_weights.main).code == 2
