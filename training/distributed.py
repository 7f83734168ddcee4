"""Processes: one here, or many under torchrun.

Nothing else in the project asks the environment about ranks. Without torchrun every function is a no-op on a
world of one.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from config import ConfigError
from training.rendezvous import meet, torchruns_store

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

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

    On a CPU the process keeps to cores of its own meanwhile (see `own_cores`).

    An error of the machinery, such as that of a partner that died, is marked `leave_at_once`: to free what still
    waits for that partner would mean to wait for ever, and torchrun would not see that this process failed.
    """
    if world.size == 1:
        yield
        return
    # gloo stands beside nccl so that flags and sums on the host need no GPU.
    backends = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    with own_cores(world) if device.type == "cpu" else contextlib.nullcontext():
        yield from _joined(world, backends)


def _joined(world: World, backends: str) -> Iterator[None]:
    store = torchruns_store()
    if store is None:
        try:
            dist.init_process_group(backends)
        except ValueError as error:  # RANK and WORLD_SIZE without the rest, left by a batch system perhaps
            fix = "RANK and WORLD_SIZE are set; start with torchrun, or unset them"
            raise ConfigError(f"{fix} ({error})") from None
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


@contextlib.contextmanager
def own_cores(world: World) -> Iterator[None]:
    """Within the block this thread, and those that it starts, run on this process's share of the machine's cores.

    So no thread that carries messages can push one that computes onto the core of another, where both would wait
    for the scheduler's next look. Nothing where processes outnumber cores, or the system does not let them choose.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    begin, end = (rank * len(cores) // world.local_size for rank in (world.local_rank, world.local_rank + 1))
    with contextlib.ExitStack() as before:
        if len(cores) >= world.local_size:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, cores[begin:end])
                before.callback(os.sched_setaffinity, 0, cores)
        yield


def all_sum(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def ask_all(mine: Callable[[], bool]) -> Callable[[], bool]:
    """Ask whether `mine` is true on any process; what is returned gives the answer, the same on all of them.

    Processes answer what holds now, and compute while the votes travel; a process alone answers when it is asked.
    """
    if not dist.is_initialized():
        return mine
    votes = torch.tensor(float(mine()))
    counting = dist.all_reduce(votes, async_op=True)

    def answer() -> bool:
        counting.wait()
        return bool(votes > 0)

    return answer


def from_all(world: World, mine: Result) -> list[Result]:
    """What every process gives, in the order of their ranks, on every process."""
    if world.size == 1:
        return [mine]
    box: list[Any] = [None] * world.size
    dist.all_gather_object(box, mine)
    return box


def shared_out(stacks: list[list[Tensor]], work: Callable[[Tensor], Tensor]) -> list[list[Tensor]]:
    """The matrices of work(stack) for each stack of matrices of one shape; processes share the matrices.

    `work` takes M of them at once, (M, rows, columns), treats each alone and keeps their shape. One process does a
    matrix and sends it to all, so that all have the same bits; everything travels in one exchange.
    """
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size == 1:
        return [list(work(torch.stack(stack)).unbind()) for stack in stacks]
    owners = divided([(len(stack), *stack[0].shape) for stack in stacks], size)
    rank = dist.get_rank()
    made, lengths, places = list[Tensor](), [0] * size, list[tuple[int, int]]()
    for stack, whose in zip(stacks, owners, strict=True):
        mine = [m for m, owner in zip(stack, whose, strict=True) if owner == rank]
        made.append(work(torch.stack(mine) if mine else stack[0].new_empty(0, *stack[0].shape)).flatten())
        for owner in whose:
            places.append((owner, lengths[owner]))
            lengths[owner] += stack[0].numel()
    sent = torch.cat([*made, made[0].new_zeros(max(lengths) - lengths[rank])])
    found = sent.new_empty(size, len(sent))
    dist.all_gather(list(found), sent)
    place = iter(places)
    return [
        [found[owner, at:][: m.numel()].view_as(m) for m in stack for owner, at in [next(place)]] for stack in stacks
    ]


def divided(shapes: Sequence[tuple[int, ...]], size: int) -> list[list[int]]:
    """Which of `size` processes does each matrix of stacks of `shapes` (M, rows, columns): all have about equal work.

    A matrix costs as much as its product with its own transpose; the dearest are given away first.
    """
    costs = [(max(sides) * min(sides) ** 2, k, i) for k, (count, *sides) in enumerate(shapes) for i in range(count)]
    owners, load = [[0] * s[0] for s in shapes], [0] * size
    for cost, k, i in sorted(costs, key=lambda c: -c[0]):
        owners[k][i] = rank = load.index(min(load))
        load[rank] += cost
    return owners


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


def is_share(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether every process holds a share of this tensor only. Asked so, nobody has to import DTensor: a second."""
    return hasattr(tensor, "full_tensor")


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()
