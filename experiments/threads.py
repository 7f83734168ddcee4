"""What binding OpenMP's threads to cores does to training speed: short default runs, bound and unbound in turn.

    python -m experiments.threads --pairs 6

A single run says nothing here: on a virtual machine both kinds come in two speeds. Writes results/threads.md.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cli import parse, run_main
from config import require
from experiments.arms import ROOT, last_line, run_script
from files import write_atomic
from training.hardware import git_state, processor_name, usable_cores, versions


@dataclass(frozen=True)
class Settings:
    """Bound against unbound threads."""

    pairs: int = 6
    """Runs of each kind."""
    steps: int = 60
    """Optimiser steps of every run."""
    seed: int = 1
    """Seed of every run."""
    out: Path = ROOT / "results" / "threads.md"
    """Where the outcome is written."""

    def __post_init__(self) -> None:
        for name in ("pairs", "steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "use a positive number")


def speed(bound: bool, settings: Settings) -> float:
    """Tokens per second over the second half of one short run in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    if bound:
        environment |= {"OMP_PROC_BIND": "true", "OMP_NUM_THREADS": str(usable_cores())}
    steps = settings.steps
    with tempfile.TemporaryDirectory() as folder:
        words = ["avatarl-char", "--train.steps", str(steps), "--optim.warmup-steps", "1", "--run.out-dir", folder]
        words += ["--log.every", str(max(1, steps // 2)), "--eval.every", "0", "--run.seed", str(settings.seed)]
        words += ["--eval.sample-tokens", "0", "--data.corpus", "tinyshakespeare"]
        run_script("train.py", *words, environment=environment)
        return last_line(Path(folder) / "avatarl-char", "train/tokens_per_second")["train/tokens_per_second"]


def main(words: Sequence[str]) -> int:
    """Run, compare, write; returns the exit code."""
    s = parse(Settings, words, prog="python -m experiments.threads", description=__doc__ or "")
    found: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(s.pairs):
        for bound in found:
            found[bound].append(speed(bound, s))
    lines = [
        "# Threads bound to cores",
        "",
        f"`python -m experiments.threads --pairs {s.pairs} --steps {s.steps} --seed {s.seed}` on {processor_name()}, "
        f"{usable_cores()} cores, torch {versions()['torch']}, commit {git_state().get('commit', 'unknown')[:12]}, "
        f"{time.strftime('%Y-%m-%d')}. Tokens per second of `avatarl-char`, runs in turn, each in its own process.",
        "",
    ]
    for bound, rates in found.items():
        kind = "bound" if bound else "unbound"
        lines.append(
            f"- {kind}: median {statistics.median(rates):,.0f}, in order: {', '.join(f'{r:,.0f}' for r in rates)}"
        )
    write_atomic(s.out, "\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    run_main(main)
