"""How well probabilities mean what they say: calibration of the k likeliest tokens, and the best temperature.

`survey` runs a model once over validation windows and keeps sums, nothing of size (N, V): the tally of
evaluation.py and a Calibration. The temperature T divides logits (Guo et al., 2017); T > 1 says that the model is too
sure of itself. Its loss is convex in 1 / T, and known on a grid with two derivatives, so that a quintic between two
points of the grid gives it anywhere without a second pass.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from model import GPT
from training.evaluation import Tally
from training.hardware import Hardware
from training.resampling import Gaps

GRID = tuple(2.0 ** (i / 2) for i in range(-4, 5))
"""Factors 1 / T on the logits, from 1/4 to 4."""
ENTRIES = 2**25
"""Logits that are looked at together, of which several copies in float32 live meanwhile."""
STEP = math.log(2.0) / 2
"""Between neighbours of the grid, in ln(1 / T)."""


@dataclass
class Calibration:
    """Sums over predicted tokens."""

    k: int
    top: Tensor
    """(3, bins): mass of the k likeliest tokens, how often gold was among them, tokens, by that mass."""
    nll: Tensor
    """(3, len(GRID)): negative log-likelihood at each factor on the logits, and its first and second derivative by
    the logarithm of the factor."""

    @staticmethod
    def zero(k: int, bins: int) -> "Calibration":
        """Nothing counted yet. Raises ValueError for k or bins below 1."""
        if k < 1 or bins < 1:
            raise ValueError(f"k = {k}, bins = {bins}: use positive numbers")
        return Calibration(k, torch.zeros(3, bins, dtype=torch.float64), torch.zeros(3, len(GRID), dtype=torch.float64))

    @property
    def tokens(self) -> float:
        """How many were counted."""
        return float(self.top[2].sum())

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count logits (n, V) against targets (n,); targets of −1 are padding. Takes few rows at a time."""
        rows = max(1, ENTRIES // logits.shape[1])
        for some, golds in zip(logits.split(rows), targets.split(rows), strict=True):
            self._add(some, golds)

    def _add(self, logits: Tensor, targets: Tensor) -> None:
        real = targets >= 0
        logits, targets = logits[real].float(), targets[real]
        mass, ids = logits.softmax(-1).topk(min(self.k, logits.shape[-1]), dim=-1)  # (n, k)
        mass, hit = mass.sum(-1).double().clamp(max=1.0), (ids == targets[:, None]).any(-1)
        bins = self.top.shape[1]
        slot = (mass.nan_to_num() * bins).long().clamp(max=bins - 1)
        rows = torch.stack((mass, hit.double(), torch.ones_like(mass)))
        self.top += torch.zeros(3, bins, dtype=torch.float64, device=rows.device).index_add_(1, slot, rows).cpu()
        gold = logits.gather(-1, targets[:, None])[:, 0]  # (n,)
        for i, factor in enumerate(GRID):
            log_p = (factor * logits).log_softmax(-1)  # (n, V)
            p = log_p.exp()
            mean = (p * logits).sum(-1)  # of the logits, under the tempered policy
            spread = (p * (logits - mean[:, None]).square()).sum(-1)
            slope = factor * (mean - gold)
            found = (-log_p.gather(-1, targets[:, None])[:, 0], slope, slope + factor**2 * spread)
            self.nll[:, i] += torch.stack(found).sum(-1, dtype=torch.float64).cpu()

    def __add__(self, other: "Calibration") -> "Calibration":
        """Both together; they must have the same k and bins."""
        if self.k != other.k:
            raise ValueError(f"k = {self.k} and {other.k}: nothing to add")
        return Calibration(self.k, self.top + other.top, self.nll + other.nll)

    def top_k_error(self) -> float:
        """Top-k calibration error: the gap between the mass of the k likeliest tokens and how often gold is there.

        Expected over equal-width bins of that mass, as ECE is for k = 1.
        """
        mass, hits, _ = self.top
        return float((mass - hits).abs().sum()) / self.tokens

    def beyond(self) -> tuple[float, float]:
        """The mean mass beyond the k likeliest tokens, and how often gold is there."""
        mass, hits, _ = self.top.sum(1).tolist()
        return 1 - mass / self.tokens, 1 - hits / self.tokens

    def reliability(self) -> list[tuple[float, float]]:
        """Per bin that holds tokens: (mean mass of the k likeliest, share of tokens with gold among them)."""
        return [(m / n, h / n) for m, h, n in self.top.T.tolist() if n]

    def cross_entropy(self, temperature: float = 1.0) -> float:
        """Mean negative log-likelihood in nats with logits divided by `temperature`, from 1/4 to 4."""
        place = (math.log(1 / temperature) - math.log(GRID[0])) / STEP
        i = min(max(math.floor(place), 0), len(GRID) - 2)
        return float(self.quintic(i)(place - i)) / self.tokens

    def best_temperature(self) -> float:
        """The temperature with the lowest cross-entropy on what was counted, within 1/4 and 4."""
        slopes = self.nll[1].tolist()
        if slopes[0] >= 0:
            return 1 / GRID[0]
        for i, (before, after) in enumerate(pairwise(slopes)):
            if before < 0 <= after:
                slope, low, high = self.quintic(i).deriv(), 0.0, 1.0
                for _ in range(50):  # bisection: it changes sign between 0 and 1
                    middle = (low + high) / 2
                    low, high = (low, middle) if slope(middle) >= 0 else (middle, high)
                return 1 / (GRID[i] * math.exp(STEP * low))
        return 1 / GRID[-1]

    def quintic(self, i: int) -> Polynomial:
        """The summed loss between points i and i + 1 of the grid, by the share of the way."""
        (y0, m0, a0), (y1, m1, a1) = (
            (float(y), STEP * float(m), STEP**2 * float(a)) for y, m, a in (self.nll[:, i], self.nll[:, i + 1])
        )
        rise = y1 - y0
        third = 10 * rise - 6 * m0 - 4 * m1 - 1.5 * a0 + 0.5 * a1
        fourth = -15 * rise + 8 * m0 + 7 * m1 + 1.5 * a0 - a1
        fifth = 6 * rise - 3 * (m0 + m1) - 0.5 * (a0 - a1)
        return Polynomial((y0, m0, a0 / 2, third, fourth, fifth))


@torch.no_grad()
def survey(
    model: GPT,
    windows: Iterable[tuple[Tensor, Tensor]],
    hardware: Hardware,
    *,
    bins: int,
    k: int,
    gaps: Gaps,
) -> tuple[Tally, Calibration]:
    """Tally and calibration of `model` over (tokens, targets) windows (b, T), in this process alone; adds to `gaps`."""
    tally, calibration = Tally.zero(bins), Calibration.zero(k, bins)
    was_training = model.training
    model.eval()
    for tokens, targets in windows:
        with hardware.autocast():
            rows = model(tokens.to(hardware.device))  # (b, T, V)
        targets = targets.to(hardware.device)
        gaps.add(rows, targets)
        logits, gold = rows.flatten(0, 1), targets.flatten()
        tally.add(logits, gold)
        calibration.add(logits, gold)
    model.train(was_training)
    return tally, calibration


def halves(length: int, block_size: int) -> int:
    """Where to cut a validation split of `length` tokens, so that both parts tile into the whole's own windows.

    Token number cut is the last target of the first part and the first token of the second; 0 where there is only
    one window.
    """
    return math.ceil((length - 1) / block_size) // 2 * block_size
