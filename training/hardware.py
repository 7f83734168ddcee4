"""What this machine is and how a run uses it: device, precision, threads, compilation, peaks.

Every choice is made once, from what is really there, and comes with the sentence that start-up prints.
"""

import contextlib
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from config import RunConfig, require
from model import GPT, attention_backend

LIBRARIES = (
    "torch",
    "numpy",
    "safetensors",
    "tyro",
    "tokenizers",
    "tiktoken",
    "transformers",
    "flash-attn",
    "wandb",
)


@dataclass(frozen=True)
class Hardware:
    """The choices of one run on one machine."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    attention: str
    notes: tuple[str, ...]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of matrix products, as a context."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_compiler() -> bool:
    """Whether torch.compile finds a C++ compiler for CPU kernels."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the processor has instructions for bfloat16 products; emulated ones are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in checks)


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """The device of `run.device` for this process. Raises ConfigError for a GPU that is not there."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(wanted)
    if device.type == "cuda":
        require(torch.cuda.is_available(), "run.device", wanted, "PyTorch sees no GPU here; use --run.device cpu")
        index = device.index if device.index is not None else local_rank
        count = torch.cuda.device_count()
        require(index < count, "run.device", wanted, f"this machine has {count} GPUs, numbered from 0")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def openmp_threads() -> int:
    """What OMP_NUM_THREADS says of the outermost level, as in "4" or "4,2"; 0 where it says nothing usable."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() else 0


def choose(run: RunConfig, local_rank: int = 0, local_world: int = 1) -> Hardware:
    """Settle device, precision, threads, attention and compilation for a run, and say why."""
    device = choose_device(run.device, local_rank)
    fix = "each process of a machine needs a GPU of its own; use cuda"
    require(local_world == 1 or ":" not in run.device, "run.device", run.device, fix)
    notes = []
    if device.type == "cpu":
        # Where OpenMP binds its threads, this one may run on one core only: the count that was asked for comes first.
        wanted = openmp_threads() if local_world == 1 else 0
        threads = run.threads or wanted or max(1, usable_cores() // local_world)
        torch.set_num_threads(threads)
        notes.append(f"{threads} CPU thread{'s' * (threads > 1)}")
    else:
        torch.set_float32_matmul_precision("high")
        notes.append(torch.cuda.get_device_name(device))
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(run.dtype)
    if dtype is None:
        fast = multiplies_bfloat16(device)
        dtype = torch.bfloat16 if fast else torch.float32
        notes.append("bfloat16 products" if fast else "float32 products: no bfloat16 instructions here")
    attention = attention_backend(device, dtype)
    notes.append(f"attention: {attention}")
    compiled = run.compile == "on" or (run.compile == "auto" and device.type == "cuda")
    if compiled and device.type == "cpu" and not has_compiler():
        compiled = False
        notes.append("eager: torch.compile needs a C++ compiler (apt-get install g++)")
    else:
        notes.append("torch.compile" if compiled else "eager")
    return Hardware(device, dtype, compiled, attention, tuple(notes))


def prepare_model(model: GPT, hardware: Hardware, *, all_there: bool = True) -> GPT:
    """The model on its device, with the chosen attention and, where it pays, compiled up to the head.

    Unless it is to be `all_there`, its blocks stay where they are, until they are sharded.
    """
    for name, part in model.named_children():
        if all_there or name != "blocks":
            part.to(hardware.device)
    model.rotary = None if model.rotary is None else model.rotary.to(hardware.device)
    model.use_attention(hardware.attention)
    if hardware.compile:
        model.compile_hidden()
    return model


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of a large square matrix product, measured: the best of several within `seconds`."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, deadline = float("inf"), time.perf_counter() + seconds
    a @ b
    synchronise(device)
    while best == float("inf") or time.perf_counter() < deadline:
        start = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB (10⁹ bytes): the allocator's on a GPU, the whole process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def processor_name() -> str:
    """The CPU's name, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe(hardware: Hardware) -> dict[str, Any]:
    """The hardware of a run, for config.json."""
    found: dict[str, Any] = {
        "device": str(hardware.device),
        "dtype": str(hardware.dtype).removeprefix("torch."),
        "compile": hardware.compile,
        "attention": hardware.attention,
        "processor": processor_name(),
        "cores": max(usable_cores(), torch.get_num_threads()),
        "threads": torch.get_num_threads(),
    }
    if hardware.device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(hardware.device)
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def git_state() -> dict[str, Any]:
    """Commit of the checkout and whether it has uncommitted changes; empty outside a repository."""
    here = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {}
