"""Processes: one here, or many under torchrun.

Nothing else in the project asks the environment about ranks. Without torchrun every function is a no-op on a
world of one.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

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
    """Join the process group of `world` for the duration of the block; nothing for a world of one."""
    if world.size == 1:
        yield
        return
    # gloo stands beside nccl so that flags and sums on the host need no GPU.
    dist.init_process_group("cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
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
