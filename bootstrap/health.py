"""Health of a run: is the policy calibrated, has its confidence collapsed, is its gradient stable?

    metrics |= measure(log_pi, gold)             # on a training batch: health/ece, confidence_gap, entropy
    seen = monitor.observe(line)                 # each line of metrics: adds health/grad_spike and health/status

The monitor judges finished lines of metrics, by the thresholds of thresholds.py; it says each change of state once.
The loop hands it lines without knowing what it is: an objective that has a `monitor` is watched. Its memory is a
buffer of the objective's, hence in every checkpoint, so that a resumed run says the same.

Shapes: N decisions, V vocabulary, S signs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bootstrap.thresholds import SIGNS, STATES, STATUS, Sign

BINS = 15  # of confidence, as for val/ece
PER_BIN = 32  # decisions a bin at least: then chance alone makes an error of about 0.06
MEMORY = 50  # measurements of each sign that are remembered; the gradient's median is over these
LEAST_NORMS = 5  # gradient norms that a median needs before another is compared with it


@torch.no_grad()
def measure(log_pi: Tensor, gold: Tensor) -> dict[str, Tensor]:
    """Calibration error, mean confidence − accuracy, and mean entropy in nats, of log π (N, V) against gold (N,).

    The calibration error is the expected gap, over equal-width bins of the largest probability, between it and how
    often its token is gold. It has fewer bins for few decisions, whose shares would be chance. 0-d float32 each.
    """
    confidence, guess = log_pi.float().max(-1)
    confidence, right = confidence.exp(), (guess == gold).float()  # (N,)
    bins = max(1, min(BINS, len(gold) // PER_BIN))
    slot = (confidence.nan_to_num() * bins).long().clamp(max=bins - 1)  # the sums below still say NaN
    gaps = confidence.new_zeros(bins).index_add_(0, slot, confidence - right)
    return {
        "health/ece": gaps.abs().sum() / len(gold),
        "health/confidence_gap": (confidence - right).mean(),
        "health/entropy": torch.special.entr(log_pi.float().exp()).sum(-1).mean(),
    }


@dataclass(frozen=True)
class Observation:
    """What the monitor makes of a line of metrics."""

    metrics: dict[str, float]
    """To be added to the line."""
    warnings: list[str]
    """Changes of state, a sentence each."""
    shown: str
    """The state and its signs, for the bar."""


class HealthMonitor(nn.Module):
    """Watches the lines of metrics that a run writes, for as many of the signs as they have (DESIGN section 8)."""

    memory: Tensor
    """(S + 1, MEMORY) float64: the last measurements of each sign, and gradient norms, newest last; NaN: none yet."""
    states: Tensor
    """(S,) int64: the place of each sign's state in STATES."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.full((len(SIGNS) + 1, MEMORY), math.nan, dtype=torch.float64))
        self.register_buffer("states", torch.zeros(len(SIGNS), dtype=torch.int64))

    def observe(self, line: Mapping[str, float]) -> Observation:
        """Take in a line of metrics: {key: value}, with `train/grad_norm` and what `measure` found."""
        added: dict[str, float] = {}
        if "train/grad_norm" in line:
            spike = self._spike(line["train/grad_norm"])
            added |= {} if spike is None else {"health/grad_spike": spike}
        measured, warnings = {**line, **added}, []
        for place, (key, sign) in enumerate(SIGNS.items()):
            if key in measured:
                self._remember(place, measured[key], math.inf if sign.worse == "above" else -math.inf)
                recent = self.memory[place, -sign.patience :]
                if not recent.isnan().any():
                    warnings += self._judge(place, sign, float(recent.median()))
        worst = int(self.states.max())
        added[STATUS] = float(worst)
        ill = [sign.name for sign, state in zip(SIGNS.values(), self.states.tolist(), strict=True) if state == worst]
        return Observation(added, warnings, f"{STATES[worst]}: {', '.join(ill)}" if worst else STATES[0])

    def _spike(self, norm: float) -> float | None:
        """A gradient norm over the median of those before it; None before there are enough to compare it with."""
        before = self.memory[-1][self.memory[-1].isfinite()]
        self._remember(-1, norm, math.inf)
        if not math.isfinite(norm):
            return math.inf
        if len(before) < LEAST_NORMS:
            return None
        median = float(before.median())
        return norm / median if median > 0 else (math.inf if norm > 0 else 1.0)

    def _remember(self, place: int, value: float, worst: float) -> None:
        """Add a measurement; one that is not finite counts as the worst there is."""
        row = self.memory[place]
        row.copy_(torch.cat((row[1:], row.new_tensor([value if math.isfinite(value) else worst]))))

    def _judge(self, place: int, sign: Sign, value: float) -> list[str]:
        """Note the state of a sign; a sentence if it is not what it was."""
        state, before = STATES.index(sign.state(value)), int(self.states[place])
        self.states[place] = state
        if state == before:
            return []
        if state == 0:
            return [f"{sign.name} is {value:.3g}, and well again"]
        threshold = sign.bad if STATES[state] == "bad" else sign.warn
        return [f"{sign.name} is {value:.3g}, {sign.worse} {threshold:g} ({STATES[state]}): {sign.advice}"]
