"""One objective on many processes: replicated (DDP), or cut into shares (FSDP2, `run.parallel = fsdp`).

Sharded, a process keeps its share of every parameter, of its gradient and of the optimiser's state. A block's
weights are gathered while the block computes, those outside the blocks (embedding, head, last norm) for the whole
of the objective's forward pass, where the loss is made: so every use of a parameter is seen (DESIGN section 1).
Whoever wants the model outside that pass asks through `gathered`. Products run under the same autocast as in DDP:
what is gathered and summed is float32. Frozen critics are no part of the objective and stay whole everywhere.
"""

import contextlib
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model import GPT
from training.distributed import World, is_share

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

Result = TypeVar("Result")


def call(work: Callable[..., Result], *rest: Any, **options: Any) -> Result:
    """work(*rest, **options); FSDP2 makes a forward pass of it."""
    return work(*rest, **options)


def shard(objective: nn.Module, world: World, device: torch.device) -> None:
    """Cut the objective's models into shares in place, block by block; a world of one keeps them whole.

    Before the optimisers are built: they hold the shares. Blocks may still lie on the host; each moves to `device`
    when it is cut, so the whole model never lies there.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if world.size == 1:
        objective.to(device)
        return
    mesh = init_device_mesh(device.type, (world.size,))
    for model in objective.modules():
        if isinstance(model, GPT):
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    objective.call = call  # type: ignore[assignment]
    register_fsdp_forward_method(objective, "call")
    gathered(objective, touch, objective)


def touch(objective: nn.Module) -> None:
    """Gather and let go of every block once: what FSDP2 first makes in inference mode could never be trained."""
    for part in objective.modules():
        if part is not objective and is_sharded(part):
            part.unshard()
            part.reshard()


def is_sharded(module: nn.Module) -> "TypeGuard[FSDPModule]":
    """Whether `shard` cut it. Asked so, nobody has to import FSDP2 who does not use it: that takes a second."""
    return hasattr(module, "unshard")


def wrapped(objective: nn.Module, world: World, device: torch.device) -> nn.Module:
    """The module whose forward and backward keep all processes' parameters the same."""
    if world.size == 1 or is_sharded(objective):
        return objective
    gpu = device.type == "cuda"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 calls it forward_sync_buffers, 2.9 does not
        module = DistributedDataParallel(
            objective,
            device_ids=[device.index] if gpu else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            # Said so, the first bucket is no smaller: on a CPU its exchange would only disturb the backward pass.
            bucket_cap_mb=None if gpu else 25,
        )
    settle_buckets(module, objective)
    return module


def settle_buckets(module: DistributedDataParallel, objective: nn.Module) -> None:
    """Let DDP lay out its buckets as it does after its first backward pass, before there is anything in them.

    More than two gradients are added in an order that depends on where they lie, so a resumed run, whose first step
    had other buckets than that step of an uninterrupted one, would differ from it in the last bits.
    """

    def nothing() -> Tensor:
        parts = [(0 * p).sum() for p in objective.parameters() if p.requires_grad]
        return torch.stack(parts).sum()

    objective.forward = nothing  # type: ignore[method-assign]  # on this object alone, and only here
    try:
        module().backward()
    finally:
        del objective.forward
    module.zero_grad(set_to_none=True)


def backward_of(module: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """A context for the forward and backward pass of one micro-batch; gradients are exchanged after the `last`."""
    if is_sharded(module):
        module.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return contextlib.nullcontext()


def gathered(objective: nn.Module, work: Callable[..., Result], *rest: Any, **options: Any) -> Result:
    """work(*rest, **options), which may use the objective's models; of a sharded one all processes call it."""
    if not is_sharded(objective):
        return work(*rest, **options)
    result: Result = objective.call(work, *rest, **options)  # type: ignore[attr-defined]
    objective.reshard()
    return result


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which every process may have a share only, in full; all processes call it."""
    return tensor.full_tensor() if is_share(tensor) else tensor


def cut_like(full: Tensor, like: Tensor) -> Tensor:
    """This process's share of `full`, cut as `like` is; nothing is sent."""
    if not is_share(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
