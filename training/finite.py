"""Steps whose loss or gradient is not finite: skipped by all processes, counted, and no GPU waits for the host.

On a CPU the host looks at once. On a GPU the flag stays there: AdamW's fused kernel and Muon leave weights and
state alone where it is set, and the counts are read when numbers are logged or saved anyway. No process asks the
others: what is not finite on one of them makes the sum of the gradients so.
"""

import torch
from torch import Tensor
from torch.optim import Optimizer


def share_of(loss: Tensor, parts: int) -> Tensor:
    """loss / parts; where the 0-d loss is not finite, all gradients of it are NaN.

    Gradients are summed over processes, so their norm then says the same to all, and nobody has to ask.
    """
    return loss / torch.where(torch.isfinite(loss.detach()), parts, torch.nan)


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
