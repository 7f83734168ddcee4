"""Which weights of the two experts leave a student calibrated, if the critic is.

    python -m experiments.fair_weights
    python -m experiments.fair_weights --epsilons 0.1 0.03 --top-k 32

Suppose that the critic is right: gold is drawn from what it says. A student that hears the consensus again and again
learns its mean over those draws,

    q(a) = Σ_g p_c(g) p_ref(a | g),

and q should be p_c: then hearing a calibrated critic and reality together leaves it calibrated. It is with w_r = 0 and
w_c = 1, and with w_c = 0 and ε → 0. Between them a geometric mean is flatter than what it is made of: with
w_r + w_c = 1 the student is taught modesty. For every w_r and ε the study looks for the w_c of the smallest
KL(p_c ‖ q), over positions of the validation text, p_c and A being the mixed critic's likeliest 2k tokens. Nothing is
trained. Writes results/fair-weights/: table.md and figure.svg.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from avatarl.action_space import ActionSet
from avatarl.mixed import MixedCritic
from avatarl.reward import consensus
from cli import parse, run_main
from config import DataConfig, require
from data.prepare import prepare_real
from experiments.arms import ROOT
from experiments.figures import Line, chart
from experiments.study import stamp
from experiments.tables import machine
from files import write_atomic

STRETCH = 512  # tokens judged at a time, besides the context before them
STEPS = 12  # halvings of the interval in which the fair weight is looked for, by the golden section
GOLDEN = (5**0.5 - 1) / 2
MOST = 1.5  # the highest weight of the critic that is looked at


@dataclass(frozen=True)
class Settings:
    """Weights that teach no modesty."""

    corpus: str = "tinyshakespeare"
    """The corpus: a name, or a path. Tokens are characters."""
    positions: int = 2048
    """Positions of the validation text, evenly spread stretches of it."""
    top_k: int = 16
    """k: the action set holds the critic's likeliest 2k tokens."""
    reality_weights: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """w_r, for each of which a fair w_c is looked for."""
    epsilons: tuple[float, ...] = (0.1, 0.03)
    """ε of the reality expert."""
    out: Path = ROOT / "results" / "fair-weights"
    """Folder of the figures."""

    def __post_init__(self) -> None:
        require(self.positions >= 1, "positions", self.positions, "use a positive number")
        require(self.top_k >= 1, "top-k", self.top_k, "use a positive number")
        for name in ("reality_weights", "epsilons"):
            values = getattr(self, name)
            fine = len(values) > 0 and all(0 < v < 1 for v in values)
            require(fine, name.replace("_", "-"), values, "use numbers between 0 and 1")


class Bias(NamedTuple):
    """What the mean consensus makes of a critic that is right."""

    kl: float
    """KL(p_c ‖ q), nats."""
    modesty: float
    """How much less q gives to its favourite than p_c does, on average."""


def mean_consensus(p: Tensor, **weights: float) -> Tensor:
    """q (N, K): the consensus of experts with these weights, averaged over gold drawn from p (N, K), the critic's."""
    count, size = p.shape
    found = torch.zeros_like(p)
    valid = torch.ones(count, size, dtype=torch.bool)
    for gold in range(size):
        order = torch.tensor([gold, *(i for i in range(size) if i != gold)])  # gold stands first
        actions = ActionSet(order.expand(count, size), valid)
        p_ref = consensus(actions, p[:, order].log(), mean="geometric", **weights)
        found[:, order] += p[:, gold, None] * p_ref
    return found


def bias(p: Tensor, **weights: float) -> Bias:
    """How far the mean consensus is from the critic p (N, K)."""
    q = mean_consensus(p, **weights)
    kl = (p * (p.log() - q.log())).sum(-1).mean()
    top, favourite = q.max(-1)
    return Bias(float(kl), float((p.gather(1, favourite[:, None])[:, 0] - top).mean()))


def fair_weight(p: Tensor, reality_weight: float, epsilon: float) -> float:
    """The w_c of the smallest KL(p ‖ q), by golden section: it has one minimum below MOST."""

    def kl(critic_weight: float) -> float:
        return bias(p, reality_weight=reality_weight, critic_weight=critic_weight, epsilon=epsilon).kl

    low, high = 0.0, MOST
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = kl(left), kl(right)
    for _ in range(STEPS):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = kl(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = kl(right)
    return (low + high) / 2


def critic_over_actions(settings: Settings) -> Tensor:
    """What the mixed critic says of its likeliest 2k tokens on validation text, sums of 1: (N, 2k) float64."""
    dataset = prepare_real(DataConfig(corpus=settings.corpus), "studies")
    train, val = (part.astype(np.int64) for part in (dataset.train, dataset.val))
    critic = MixedCritic(train, dataset.tokenizer.vocab_size, strings=dataset.strings)
    stretches = max(1, -(-settings.positions // STRETCH))
    starts = np.linspace(critic.reach, max(critic.reach, len(val) - STRETCH - 1), stretches).astype(int)
    found = []
    for start in starts:
        tokens = torch.from_numpy(val[None, start - critic.reach : start + STRETCH])
        found.append(critic.opinion(tokens).full()[critic.reach :])
    log_p = torch.cat(found)[: settings.positions].double()
    size = min(2 * settings.top_k, log_p.shape[1])
    return log_p.topk(size).values.softmax(-1)


class Found(NamedTuple):
    """A row: what w_r and ε do beside w_c = 1 − w_r, and beside the fair one."""

    reality_weight: float
    epsilon: float
    usual: Bias
    fair: float
    there: Bias


def measured(p: Tensor, settings: Settings) -> list[Found]:
    """A row for every ε and w_r."""
    rows = []
    for epsilon in settings.epsilons:
        for reality in settings.reality_weights:
            fair = fair_weight(p, reality, epsilon)
            usual, there = (
                bias(p, reality_weight=reality, critic_weight=weight, epsilon=epsilon) for weight in (1 - reality, fair)
            )
            rows.append(Found(reality, epsilon, usual, fair, there))
            print(f"ε {epsilon:g}, w_r {reality:g}: fair w_c {fair:.3f}", flush=True)
    return rows


def page(rows: Sequence[Found], settings: Settings, made: Mapping[str, Any]) -> str:
    """The study in Markdown."""
    lines = [
        "# Weights that leave a student calibrated, if the critic is",
        "",
        f"`{made['command']}` on {machine(made)}.",
        "",
        f"Gold drawn from the mixed critic, over its likeliest {2 * settings.top_k} tokens, at {settings.positions:,} "
        f"positions of {settings.corpus}'s validation text: how far the mean of the consensus over those draws is from "
        "the critic. Modesty: how much less probability the favourite gets than it deserves.",
        "",
        "| ε | w_r | KL with w_c = 1 − w_r, nats | modesty | fair w_c | KL there | modesty there |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.epsilon:g} | {r.reality_weight:g} | {r.usual.kl:.4f} | {r.usual.modesty:+.3f} | **{r.fair:.2f}** | "
            f"{r.there.kl:.4f} | {r.there.modesty:+.3f} |"
        )
    return "\n".join(lines) + "\n"


def figure(rows: Sequence[Found], settings: Settings) -> str:
    """The fair weight of the critic by that of reality, a line for every ε, and 1 − w_r."""
    lines = [
        Line(f"fair, ε = {epsilon:g}", [(r.reality_weight, [r.fair]) for r in rows if r.epsilon == epsilon])
        for epsilon in settings.epsilons
    ]
    lines.append(Line("1 − w_r", [(w, [1 - w]) for w in settings.reality_weights]))
    return chart(lines, "weight of reality, w_r", "weight of the critic, w_c", whole=True)


def main(words: Sequence[str]) -> int:
    """Measure and write; returns the exit code."""
    settings = parse(Settings, words, prog="python -m experiments.fair_weights", description=__doc__ or "")
    made = stamp("fair_weights", words)
    rows = measured(critic_over_actions(settings), settings)
    text = page(rows, settings, made)
    settings.out.mkdir(parents=True, exist_ok=True)
    write_atomic(settings.out / "table.md", text)
    write_atomic(settings.out / "figure.svg", figure(rows, settings))
    print(text)
    return 0


if __name__ == "__main__":
    run_main(main)
