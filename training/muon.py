"""Muon with the precision of its orthogonalisation as a choice, and matrices of one shape taken together.

torch.optim.Muon orthogonalises in bfloat16, one matrix at a time. In bfloat16 the sign of a rounding error decides
the last digits of an update, so a float32 run would depend on how its batch was split among processes; and a small
model spends its time on calls, not on products. Everything else (momentum, decay, rates) is torch's.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

# Newton-Schulz quintic with a steep slope at 0 (Jordan et al., 2024): singular values end near 1, not at it.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """About U Vᵀ for each matrix U S Vᵀ of a stack (M, rows, columns), by `steps` iterations in `dtype`."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # largest singular value at most 1
    for _ in range(steps):
        gram = x @ x.mT  # (M, short, short)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Muon):
    """torch.optim.Muon, orthogonalising in `dtype`. Parameters must be matrices."""

    def __init__(self, params: Any, *, dtype: torch.dtype, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient; of none where `found_inf` (0-d) is set to 1."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            stacks: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    stacks[p.shape].append(p)
            for shape, parameters in stacks.items():
                self._update(parameters, group, max(1.0, shape[0] / shape[1]) ** 0.5)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any], ratio: float) -> None:
        """Update matrices of one shape; the rate is multiplied by `ratio`, torch's default adjustment."""
        momenta = []
        for p in parameters:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            momenta.append(state["momentum_buffer"])
        gradients = [p.grad for p in parameters if p.grad is not None]
        rate, decay = group["lr"] * ratio, group["lr"] * group["weight_decay"]
        bad = getattr(self, "found_inf", None)
        if bad is not None:  # momentum that meets itself stays; the update is multiplied by 0
            gradients = [torch.where(bad > 0, m, g) for m, g in zip(momenta, gradients, strict=True)]
            rate, decay = rate * (1 - bad), decay * (1 - bad)
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
        updates = orthogonalize(torch.stack(list(ahead)), group["ns_steps"], self.dtype).float()
        torch._foreach_mul_(parameters, 1 - decay)
        torch._foreach_add_(parameters, list(updates.mul_(-rate).unbind()))
