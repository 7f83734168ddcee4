"""How much memory a call needs at its worst: the allocator's peak on a GPU, the kernel's on a CPU.

Linux keeps the largest resident size of a process (VmHWM) and forgets it when 5 is written to its clear_refs.
What the C library holds in reserve is given back first, or a call could be served from it unseen. What is held for a
while, rather than needed at the worst moment, is what the C library has handed out and not got back.
"""

import contextlib
import ctypes
import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that run() holds at its worst beyond what was held before; None where the system can't tell.

    What the call leaves behind counts as well: let it drop its results.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    resting = forget_peak()
    run()
    return None if resting is None else max(0, resident("VmHWM") - resting)


class Mallinfo(ctypes.Structure):
    """What glibc tells of its heap, from version 2.33 on: bytes, and numbers of chunks."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def held_bytes(hold: Callable[[], AbstractContextManager[object]], device: torch.device) -> int | None:
    """Bytes that are held inside the context hold() and were not before; None where the system can't tell.

    What is made and dropped on the way in does not count; hold() is entered once before, for what it keeps for good.
    """
    with hold():
        pass
    gc.collect()
    before = in_use(device)
    with hold() as kept:
        after = in_use(device)
        del kept
    return None if before is None or after is None else after - before


def in_use(device: torch.device) -> int | None:
    """Bytes that the allocator has handed out: PyTorch's on a GPU, the C library's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return None
    ask.restype = Mallinfo
    heap = ask()
    return heap.uordblks + heap.hblkhd


def forget_peak() -> int | None:
    """Give spare memory back and start a new peak; returns what is resident, bytes, or None where nothing tells."""
    with contextlib.suppress(AttributeError, OSError):  # other C libraries keep less
        ctypes.CDLL(None).malloc_trim(0)
    try:
        (PROCESS / "clear_refs").write_text("5")
        resident("VmHWM")
        return resident("VmRSS")
    except (OSError, KeyError):
        return None


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes. Raises KeyError or OSError where the system has no such number."""
    lines = (PROCESS / "status").read_text().splitlines()
    values = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    return 1024 * int(values[field][0])
