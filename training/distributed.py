"""Processes: one here, or many under torchrun.

Nothing else in the project asks the environment about ranks. Without torchrun every function is a no-op on a
world of one.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from training.rendezvous import meet, torchruns_store

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """This process among all: rank of size, and its place on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0


def world_from_environment() -> World:
    """The world that torchrun describes, or a world of one."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World()
    names = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
    return World(*(int(os.environ.get(name, default)) for name, default in names))


@contextlib.contextmanager
def process_group(world: World, device: torch.device) -> Iterator[None]:
    """Join the process group of `world` for the duration of the block; nothing for a world of one.

    An error of the machinery, such as that of a partner that died, is marked `leave_at_once`: to free what still
    waits for that partner would mean to wait for ever, and torchrun would not see that this process failed.
    """
    if world.size == 1:
        yield
        return
    # gloo stands beside nccl so that flags and sums on the host need no GPU.
    backends = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    store = torchruns_store()
    if store is None:
        dist.init_process_group(backends)
    else:
        ours = meet(store, world.rank, world.size)
        dist.init_process_group(backends, store=ours, rank=world.rank, world_size=world.size)
    try:
        yield
    except (RuntimeError, OSError) as error:
        error.leave_at_once = True  # type: ignore[union-attr]
        raise
    except BaseException:
        _leave_group()
        raise
    _leave_group()


def _leave_group() -> None:
    """Destroy the process group once gloo's threads are idle.

    One that still lets go of a tensor waits for Python's lock, which this thread holds while it waits for that one.
    """
    time.sleep(0.05)
    dist.destroy_process_group()


def all_sum(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any process: the same answer on all of them."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor(float(flag))
    dist.all_reduce(votes)
    return bool(votes > 0)


def from_all(world: World, mine: Result) -> list[Result]:
    """What every process gives, in the order of their ranks, on every process."""
    if world.size == 1:
        return [mine]
    box: list[Any] = [None] * world.size
    dist.all_gather_object(box, mine)
    return box


def shared_out(items: Tensor, work: Callable[[Tensor], Tensor], turn: int = 0) -> Tensor:
    """work(items) for `work` that keeps the shape of items (M, …) and treats each alone; processes share the items.

    Item i is done by process i + `turn`, and sent to all: so all have the same bits, and several calls with turns
    of their own even out.
    """
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size == 1:
        return work(items)
    first = (dist.get_rank() - turn) % size
    each = -(-len(items) // size)
    made = work(items[first::size])
    made = F.pad(made.contiguous(), (0, 0) * (items.ndim - 1) + (0, each - len(made)))  # (each, …)
    found = made.new_empty(size, *made.shape)
    dist.all_gather(list(found), made)
    in_turn = found.roll(-turn, 0)
    return in_turn.transpose(0, 1).flatten(0, 1)[: len(items)]


def from_first(world: World, make: Callable[[], Result]) -> Result:
    """What `make` returns on rank 0, on every process; its exception is raised on every process too."""
    if world.size == 1:
        return make()
    box: list[Any] = [None, None]
    if world.first:
        try:
            box[0] = make()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()
