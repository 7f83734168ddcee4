"""What things cost here: speed and memory, side by side in one process.

    python bench.py                          every part, on the GPU if there is one, else on the CPU
    python bench.py --parts step,loss        some parts: step, loss, generation, growth, precision, kernels, surgery
    python bench.py --gpu                    what only a GPU can show, in under ten minutes: tests, loss, char, large

Arms take turns: every ratio is between timings made within moments of each other. Writes results/bench: raw numbers
as JSON, and a page for this kind of device. Real text is needed (tinyshakespeare); the embedded corpus is refused.
"""

import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import GPU_PARTS, PARTS
from cli import parse, run_main
from config import require

if TYPE_CHECKING:
    from benchmarks.table import Table
    from benchmarks.timing import Conditions

ROOT = Path(__file__).resolve().parent
GPU_LIMIT = 585.0  # seconds after which `--gpu` is cut; what is done then is written


@dataclass(frozen=True)
class Settings:
    """What is timed, and for how long."""

    gpu: bool = False
    """What only a GPU can show, in under ten minutes. Ends with 2 where there is none."""
    parts: str = ""
    """Names of parts with commas between them; empty: all."""
    rounds: int = 30
    """Timings of each arm; medians and quartiles are over them."""
    seconds: float = 240.0
    """Time for each part: a table stops after the round in which its share is over (with --gpu: at most this)."""
    seed: int = 1
    """Seed of weights, batches and random numbers."""
    threads: int = 0
    """CPU threads of PyTorch; 0: one for every core this process may use."""
    out: Path = ROOT / "results" / "bench"
    """Folder of the outcome."""

    def __post_init__(self) -> None:
        for name in ("rounds", "seconds"):
            require(getattr(self, name) > 0, name, getattr(self, name), "use a positive number")
        require(self.seed >= 0, "seed", self.seed, "use 0 or a positive number")
        require(self.threads >= 0, "threads", self.threads, "use 0 (all cores) or a positive number")
        offered = tuple(GPU_PARTS) if self.gpu else PARTS
        for name in self.chosen:
            require(name in offered, "parts", name, f"use some of {', '.join(offered)}, with commas between them")

    @property
    def chosen(self) -> list[str]:
        """The parts, in order."""
        named = [name.strip() for name in self.parts.split(",") if name.strip()]
        return named or list(GPU_PARTS if self.gpu else PARTS)


class Cut(BaseException):
    """The time of `--gpu` is over. No `except Exception` on the way takes it for a failed arm."""


def parts_of(gpu: bool) -> dict[str, Callable[["Conditions"], Iterator["Table"]]]:
    """Every part by name: conditions in, tables out as they are done."""
    from benchmarks import generation, growth, kernels, loss, precision, step, surgery
    from benchmarks import gpu as only_gpu

    if gpu:
        return {
            "tests": only_gpu.tests,
            "loss": lambda c: loss.tables(c, vocabularies=(65, 50304), n=16384),
            "char": only_gpu.char,
            "large": only_gpu.large,
        }
    return {
        "step": step.tables,
        "loss": loss.tables,
        "generation": generation.tables,
        "growth": growth.tables,
        "precision": precision.tables,
        "kernels": kernels.tables,
        "surgery": surgery.tables,
    }


def run_part(
    name: str, make: Callable[["Conditions"], Iterator["Table"]], conditions: "Conditions", out: Path, command: str
) -> list[str]:
    """Measure one part, writing after every table; what went wrong, a line each."""
    from benchmarks.pages import circumstances, failures, place, write_part
    from benchmarks.table import Table, markdown

    folder, record, tables = place(out, conditions.device), circumstances(conditions, command), list[Table]()
    try:
        for table in make(conditions):
            tables.append(table)
            write_part(folder, name, record, tables)
            print(markdown(table), flush=True)
    except RuntimeError as error:
        tables.append(Table(name, failed=next(iter(str(error).splitlines()), type(error).__name__)))
        write_part(folder, name, record, tables)
    return failures(tables)


def watch(started: float) -> None:
    """Raise Cut when the time of `--gpu` is over, and again while something holds on."""

    def cut(*_: Any) -> None:
        raise Cut

    signal.signal(signal.SIGALRM, cut)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, started + GPU_LIMIT - time.monotonic()), 5.0)


def main(words: Sequence[str]) -> int:
    """Measure, write, print; returns the exit code: 1 where an arm, a test or a comparison of values failed."""
    started = time.monotonic()
    settings = parse(Settings, words, prog="bench.py", description=__doc__ or "")

    import torch  # --help need not wait for it

    from benchmarks.timing import Conditions
    from training.hardware import choose_device

    if settings.gpu:
        require(torch.cuda.is_available(), "gpu", True, "PyTorch sees no GPU here; leave --gpu out to time the CPU")
        watch(started)
    device, wrong = choose_device("auto"), list[str]()
    parts, command = parts_of(settings.gpu), shlex.join(["python", "bench.py", *words])
    try:
        with tempfile.TemporaryDirectory(prefix="avatarl-bench-") as scratch:
            for name in settings.chosen:
                seconds = min(settings.seconds, GPU_PARTS[name]) if settings.gpu else settings.seconds
                conditions = Conditions(
                    device, Path(scratch), settings.rounds, seconds, settings.seed, settings.threads
                )
                wrong += run_part(name, parts[name], conditions, settings.out, command)
    except Cut:
        wrong.append(f"--gpu was cut after {GPU_LIMIT:.0f} s; what was done by then is written")
    finally:
        if settings.gpu:
            signal.setitimer(signal.ITIMER_REAL, 0)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    run_main(main)
