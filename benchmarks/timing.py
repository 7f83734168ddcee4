"""Several things timed side by side: one after the other in every round, and each round in another order.

    table = measure("loss", [Arm("a", a), Arm("b", b, baselines=["a"])], conditions)

Machines drift: clocks, neighbours, heat. Arms that take turns drift together, so `Table.ratios` compares what was
measured within moments of each other.
"""

import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.memory import peak_bytes
from benchmarks.table import Row, Table
from config import RunConfig
from training.hardware import Hardware, choose, matmul_peak, synchronise

UNIT_SECONDS = 0.05  # the fastest arm of a table is called this long for one timing, so that clock and caches settle
FEWEST_ROUNDS = 3  # made however short the time


@dataclass(frozen=True)
class Conditions:
    """Under which everything of a benchmark is measured."""

    device: torch.device
    scratch: Path
    """A folder for what runs need to write."""
    rounds: int = 30
    """Timings of each arm."""
    seconds: float = 240.0
    """For a whole part: once they are over, a table stops after the round it is in."""
    seed: int = 1
    threads: int = 0


@dataclass
class Arm:
    """One of the things that are compared."""

    name: str
    run: Callable[[], object]
    """One unit of work."""
    baselines: list[str] = field(default_factory=list)
    """Arms of the same table that this one is compared with."""
    flops: float = 0.0
    """Matrix-product FLOPs of a unit of work."""
    dtype: torch.dtype = torch.float32
    """Type of its matrix products."""
    precision: str = "highest"
    """torch's float32 matmul precision while it runs."""
    held: int | None = None
    """Bytes that it holds between calls, where they are known."""


def settle(
    conditions: Conditions, dtype: str = "auto", compile: str = "auto", precision: str = ""
) -> tuple[Hardware, str]:
    """What training.hardware chooses, and the float32 matmul precision that it sets, or else `precision`."""
    torch.set_float32_matmul_precision("highest")
    run = RunConfig(device=str(conditions.device), dtype=dtype, compile=compile, threads=conditions.threads)  # type: ignore[arg-type]
    hardware = choose(run)
    return hardware, precision or torch.get_float32_matmul_precision()


def forget_compiled() -> None:
    """Drop what torch.compile made for an earlier table: its limit of recompilations is for a whole process."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype, precision: str) -> float:
    """FLOP/s of a large matrix product in that precision, measured once: the best within 2 s."""
    torch.set_float32_matmul_precision(precision)
    return matmul_peak(device, dtype, seconds=2.0)


def timed(arm: Arm, calls: int, device: torch.device) -> float:
    """Mean seconds of so many calls of an arm, until the device has done them."""
    torch.set_float32_matmul_precision(arm.precision)
    synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        arm.run()
    synchronise(device)
    return (time.perf_counter() - start) / calls


def in_turn(count: int, round_: int) -> list[int]:
    """The order of `count` arms in a round: every arm comes first, second, … equally often."""
    return [(i + round_) % count for i in range(count)]


def measure(title: str, arms: Sequence[Arm], conditions: Conditions, *, share: float = 1.0) -> Table:
    """Time `arms` in turn within a `share` of the part's seconds, then their memory.

    An arm whose first calls raise RuntimeError (no memory, no compiler) is left out, and its row says why.
    """
    print(f"{title} …", flush=True)
    device, deadline = conditions.device, time.perf_counter() + conditions.seconds * share
    table = Table(title, rows=[_row(arm, device) for arm in arms])
    alive, second = [], [math.inf]
    for arm, row in zip(arms, table.rows, strict=True):
        try:
            row.first_seconds = timed(arm, 1, device)
            second.append(timed(arm, 1, device))
            alive.append((arm, row))
        except RuntimeError as error:
            row.failed = next(iter(str(error).splitlines()), type(error).__name__)
    table.repeats = max(1, math.ceil(UNIT_SECONDS / min(second)))
    for round_ in range(conditions.rounds):
        if round_ >= FEWEST_ROUNDS and time.perf_counter() > deadline:
            break
        for i in in_turn(len(alive), round_):
            arm, row = alive[i]
            row.seconds.append(timed(arm, table.repeats, device))
    for arm, row in alive:
        torch.set_float32_matmul_precision(arm.precision)
        row.memory = peak_bytes(arm.run, device)
    return table


def _row(arm: Arm, device: torch.device) -> Row:
    peak = peak_flops(device, arm.dtype, arm.precision) if arm.flops else 0.0
    kind = str(arm.dtype).removeprefix("torch.")
    precision = f"{kind}, {arm.precision}" if arm.dtype == torch.float32 else kind
    precision = precision if arm.flops else ""
    return Row(arm.name, list(arm.baselines), held=arm.held, flops=arm.flops, peak=peak, precision=precision)
