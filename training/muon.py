"""Muon with the precision of its orthogonalisation as a choice, and matrices of one shape taken together.

torch.optim.Muon orthogonalises in bfloat16, one matrix at a time. In bfloat16 the sign of a rounding error decides
the last digits of an update, so a float32 run would depend on how its batch was split among processes; and a small
model spends its time on calls, not on products. Everything else (momentum, decay, rates) is torch's.

On many processes each orthogonalises some of the matrices and sends them to the others, because the work does not
shrink with the batch. Where FSDP2 has cut the matrices into rows, whole ones are put together for that alone.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training.distributed import is_share, shared_out

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

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


def own_rows(matrix: Tensor) -> Tensor:
    """The rows of a sharded matrix that this process holds, or a whole matrix as it is; no copy."""
    return matrix.to_local() if is_share(matrix) else matrix


def of_whole(rows: Tensor, like: "DTensor", work: Callable[[Tensor], Tensor]) -> Tensor:
    """work on whole matrices (m, rows, columns), given this process's rows of M matrices that are cut as `like` is.

    Rows are exchanged for whole matrices, which the processes share, and back: (M, own rows, columns) both ways.
    """
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((len(rows), *like.shape))
    by_rows = DTensor.from_local(rows, like.device_mesh, [Shard(1)], shape=shape, stride=contiguous(shape))
    mine = by_rows.redistribute(placements=[Shard(0)]).to_local()
    made = DTensor.from_local(work(mine), like.device_mesh, [Shard(0)], shape=shape, stride=contiguous(shape))
    return made.redistribute(placements=[Shard(1)]).to_local()


def contiguous(shape: torch.Size) -> tuple[int, ...]:
    """Strides of a contiguous (M, rows, columns)."""
    return shape[1] * shape[2], shape[2], 1


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
            ahead = [self._follow(parameters, group) for parameters in stacks.values()]
            orthogonal = partial(orthogonalize, steps=group["ns_steps"], dtype=self.dtype)
            cut = [parameters[0] for parameters in stacks.values() if is_share(parameters[0])]
            if cut:
                stacked = zip(map(torch.stack, ahead), cut, strict=True)
                updates = [list(of_whole(rows, like, orthogonal).unbind()) for rows, like in stacked]
            else:
                updates = shared_out(ahead, orthogonal)
            for parameters, update in zip(stacks.values(), updates, strict=True):
                self._update(parameters, update, group)
        return loss

    def _follow(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Let the momenta of matrices of one shape follow their gradients; returns what is to be orthogonalised."""
        momenta = []
        for p in parameters:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            momenta.append(own_rows(state["momentum_buffer"]))
        gradients = [own_rows(p.grad) for p in parameters if p.grad is not None]
        bad = getattr(self, "found_inf", None)
        if bad is not None:  # momentum that meets itself stays
            gradients = [torch.where(bad > 0, m, g) for m, g in zip(momenta, gradients, strict=True)]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        return list(torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta)

    def _update(self, parameters: list[Tensor], updates: list[Tensor], group: dict[str, Any]) -> None:
        """Decay and move matrices of one shape; the rate has torch's default adjustment to it."""
        rows, columns = parameters[0].shape
        rate = group["lr"] * max(1.0, rows / columns) ** 0.5
        decay = group["lr"] * group["weight_decay"]
        bad = getattr(self, "found_inf", None)
        if bad is not None:  # multiplied by 0
            rate, decay = rate * (1 - bad), decay * (1 - bad)
        moved = [update.float() for update in updates]
        torch._foreach_mul_(moved, -rate)
        whole = list(map(own_rows, parameters))
        torch._foreach_mul_(whole, 1 - decay)
        torch._foreach_add_(whole, moved)
