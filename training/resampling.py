"""How much of a calibration error is chance: the text that it was measured on is drawn again, stretch by stretch.

An error over bins is a sum of absolute values, so a policy that is right does not have 0 on a finite text, and two
policies differ by chance. Tokens of one page are surprising together, so it is stretches of text that are drawn, with
replacement, as many as there are: the bootstrap of blocks (Künsch, 1989).
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

STRETCH = 2048
"""Tokens of a stretch, at least: whole windows, or one that is longer."""
FEWEST = 8
"""Stretches, without which nothing is said."""
DRAWS = 2000


class Chance(NamedTuple):
    """What another text of the same kind and length would change."""

    spread: float
    """Standard deviation of the calibration error."""
    alone: float
    """The mean error of a policy that is right, by chance alone."""
    stretches: int
    """How many were drawn from."""


@dataclass
class Gaps:
    """Confidence minus hits of the likeliest token, summed by window and bin of its confidence."""

    bins: int
    windows: list[Tensor] = field(default_factory=list)
    """Of every batch, (b, bins)."""
    tokens: int = 0
    block: int = 1

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count logits (b, T, V) against targets (b, T); targets of −1 are padding."""
        top, guess = logits.float().softmax(-1).max(-1)  # (b, T)
        confidence, real = top.double(), targets >= 0
        slot = (confidence.nan_to_num() * self.bins).long().clamp(max=self.bins - 1)
        gap = (confidence - (guess == targets).double()) * real
        self.windows.append(gap.new_zeros(len(targets), self.bins).scatter_add_(1, slot, gap).cpu())
        self.tokens += int(real.sum())
        self.block = targets.shape[1]

    def chance(self) -> Chance | None:
        """What is chance in the calibration error over these bins; None for a text of too few stretches."""
        if not self.windows:
            return None
        each = -(-STRETCH // self.block)
        found = torch.stack([part.sum(0) for part in torch.cat(self.windows).split(each)])  # (S, bins)
        count = len(found)
        if count < FEWEST:
            return None
        picks = torch.randint(count, (DRAWS, count), generator=torch.Generator().manual_seed(0))
        drawn = torch.zeros(DRAWS, count).double().scatter_add_(1, picks, torch.ones(DRAWS, count).double())
        sums = drawn @ found  # (draws, bins)
        errors, apart = sums.abs().sum(1) / self.tokens, (sums - found.sum(0)).abs().sum(1) / self.tokens
        return Chance(float(errors.std()), float(apart.mean()), count)
