"""Steps whose loss or gradient is not finite: skipped by all processes, counted, and no GPU waits for the host.

On a CPU the host looks at once. On a GPU the flag stays there: AdamW's fused kernel and Muon leave weights and
state alone where it is set, and the counts are read when numbers are logged or saved anyway.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer


def finite_everywhere(*values: Tensor) -> Tensor:
    """Whether all 0-d `values` are finite on every process: a 0-d bool on their device."""
    finite = torch.isfinite(torch.stack([v.float() for v in values])).all()
    if not dist.is_initialized():
        return finite
    votes = finite.int()
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return votes.bool()


def step_where(finite: Tensor, optimizers: list[Optimizer]) -> None:
    """One step of every optimiser, without effect where the 0-d bool `finite` is False."""
    if finite.device.type == "cpu":
        if finite:
            for optimizer in optimizers:
                optimizer.step()
        return
    found_inf = (~finite).float()
    for optimizer in optimizers:
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # what torch.amp.GradScaler sets
        optimizer.step()


class BadSteps:
    """Counts steps that were not finite, on their device: in a row, the longest row, and all."""

    def __init__(self, device: torch.device, in_a_row: int, total: int) -> None:
        self._counts = torch.tensor([in_a_row, in_a_row, total], device=device)

    def count(self, finite: Tensor) -> None:
        """Take in one step."""
        bad = (~finite).long()
        row = (self._counts[0] + bad) * bad
        self._counts = torch.stack((row, torch.maximum(self._counts[1], row), self._counts[2] + bad))

    def read(self) -> tuple[int, int, int]:
        """(in a row until now, longest row since the last reading, all); the host waits for the device."""
        row, longest, total = self._counts.tolist()
        self._counts[1] = row
        return row, longest, total
