"""How sure a critic should be of what it writes, by text that its counts lack.

    writer = surer(critic, held_back_ids)       # writes and judges like `critic`, every level of p made right

A critic of counts is weighed on parts of its text (mixed.py) or not at all, and then speaks with all of its counts; it
is too modest, or too sure, at some levels of probability more than at others. Text that it doesn't know tells how much:

    log p(w) = l(w) + Σ_i slope_i · max(l(w), level_i) + constant,      l = log p_c,

with the slopes that give that text the highest likelihood. It is convex in them, and none makes p what it was.
"""

from typing import cast

import numpy as np
import torch
from torch import Tensor

from avatarl.critics import DenseOpinion
from avatarl.imagination import Writer

LEVELS = (-9.0, -6.0, -4.0, -2.5, -1.5, -0.7)  # log-probabilities at which the slope changes
FIT_ENTRIES = 2**25  # log-probabilities that the fit looks at
FIT_POSITIONS = 100_000
ASKED = 4096  # contexts at a time
PRIOR = 0.5  # standard deviation of a slope before any text is seen


def levelled(log_p: Tensor, slopes: Tensor) -> Tensor:
    """Log-probabilities (N, V), normalised, with every level of log_p (N, V) raised or lowered by slopes (LEVELS,)."""
    score = log_p
    for level, slope in zip(LEVELS, slopes.unbind(), strict=True):
        score = score + slope * log_p.clamp_min(level)
    return score.log_softmax(-1)


def fit_slopes(writer: Writer, text: np.ndarray) -> Tensor:
    """The slopes (LEVELS,) that suit `text` (L,), which the writer doesn't know; none for a text within its reach."""
    slopes = torch.zeros(len(LEVELS), dtype=torch.float64, requires_grad=True)
    count = min(len(text) - writer.reach, FIT_POSITIONS, FIT_ENTRIES // writer.vocab_size)
    if count < 1:
        return slopes.detach()
    at = np.linspace(0, len(text) - writer.reach - 1, count).astype(np.int64)
    stretches = torch.from_numpy(text[at[:, None] + np.arange(writer.reach + 1)].astype(np.int64))
    with torch.no_grad():
        log_p = torch.cat([writer.after(part[:, :-1]).full() for part in stretches.split(ASKED)])  # (n, V)
    gold = stretches[:, -1].to(log_p.device)
    optimizer = torch.optim.LBFGS([slopes], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        with torch.enable_grad():
            fit = torch.nn.functional.nll_loss(levelled(log_p, slopes.to(log_p)), gold)
            total = fit + slopes.square().sum().to(fit) / (2 * PRIOR**2 * count)
        total.backward()
        return total.item()

    optimizer.step(loss)
    return slopes.detach()


class Levelled:
    """A writer whose levels of probability were made right."""

    def __init__(self, writer: Writer, slopes: Tensor) -> None:
        self.vocab_size, self.slopes, self._writer = writer.vocab_size, slopes.float(), writer

    @property
    def reach(self) -> int:
        """The longest context that is used, in tokens."""
        return self._writer.reach

    def after(self, context: Tensor) -> DenseOpinion:
        """What follows each of contexts (N, C)."""
        log_p = self._writer.after(context).full()
        return DenseOpinion(levelled(log_p, self.slopes.to(log_p)))


def surer(writer: Writer, text: np.ndarray) -> Writer:
    """`writer`, as sure of every level as `text` (L,), which it doesn't know, says that it should be."""
    return cast(Writer, Levelled(writer, fit_slopes(writer, text)))
