"""What a model knows of the validation split: cross-entropy, bits per byte, accuracy, calibration error.

Every process measures its share of the windows; sums are added over processes and divided at the end, so the
numbers depend neither on how many processes there are nor on the batch size (DESIGN section 6, `val/…`).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT
from training.distributed import all_sum
from training.hardware import Hardware


@dataclass
class Tally:
    """Sums over predicted tokens; `bins` (3, bins): confidence, hits and tokens by top-1 confidence."""

    nll: Tensor
    bins: Tensor

    @staticmethod
    def zero(bins: int) -> "Tally":
        return Tally(torch.zeros((), dtype=torch.float64), torch.zeros(3, bins, dtype=torch.float64))

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count logits (n, V) against targets (n,); targets of −1 are padding."""
        real = targets >= 0
        logits, targets = logits[real].float(), targets[real]
        log_p = logits.log_softmax(-1)
        self.nll += F.nll_loss(log_p, targets, reduction="sum").double().cpu()
        top, guess = log_p.max(-1)
        confidence = top.exp().double()
        count = self.bins.shape[1]
        slot = (confidence.nan_to_num() * count).long().clamp(max=count - 1)  # the sums below still say NaN
        rows = torch.stack((confidence, (guess == targets).double(), torch.ones_like(confidence)))
        self.bins += torch.zeros(3, count, dtype=torch.float64, device=rows.device).index_add_(1, slot, rows).cpu()

    def metrics(self, byte_count: int) -> dict[str, float]:
        """The logged values; `byte_count` UTF-8 bytes were predicted."""
        confidence, hits, tokens = self.bins
        total = float(tokens.sum())
        ce = float(self.nll) / total
        return {
            "val/ce": ce,
            "val/ppl": math.exp(min(ce, 700.0)),
            "val/bpb": float(self.nll) / math.log(2) / byte_count,
            "val/accuracy": float(hits.sum()) / total,
            "val/ece": float((confidence - hits).abs().sum()) / total,
        }


@torch.no_grad()
def evaluate(model: GPT, windows: Iterable[tuple[Tensor, Tensor]], hardware: Hardware, *, bins: int) -> Tally:
    """Tally `model` over this process's (tokens, targets) windows (b, T) and add up all processes'."""
    tally = Tally.zero(bins)
    was_training = model.training
    model.eval()
    for tokens, targets in windows:
        with hardware.autocast():
            logits = model(tokens.to(hardware.device))  # (b, T, V)
        tally.add(logits.flatten(0, 1), targets.to(hardware.device).flatten())
    model.train(was_training)
    all_sum(tally.nll)
    all_sum(tally.bins)
    return tally
