"""How much memory a call needs at its worst: the allocator's peak on a GPU, the kernel's on a CPU.

Linux keeps the largest resident size of a process (VmHWM) and forgets it when 5 is written to its clear_refs.
What the C library holds in reserve is given back first, or a call could be served from it unseen.
"""

import contextlib
import ctypes
import gc
from collections.abc import Callable
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
