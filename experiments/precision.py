"""Whether bfloat16 products change what is learned: the same runs in float32 and bfloat16, seed by seed.

    python -m experiments.precision --seeds 3 --steps 600

Both methods on the protocol, validation along the way and at the end. Writes results/precision/: record.json,
runs.jsonl, table.md and figure.svg.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cli import parse, run_main
from experiments.figures import curves
from experiments.rivals import METHODS, rival
from experiments.study import Entry, Row, StudySettings, conduct, publish, rate, stamp, with_baselines
from experiments.tables import along, page, values_of

KINDS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Settings(StudySettings):
    """float32 against bfloat16."""

    steps: int = 600
    """Optimiser steps of every run."""
    tune: bool = False
    """Give every entry its own best learning rate; else all take their preset's, so that only the type differs."""
    evaluations: int = 6
    """Evaluations along a run, the last at its end."""
    jobs: int = 1
    """Runs at a time."""
    threads: int = 2
    """CPU threads of each run."""


def entries(settings: Settings) -> list[Entry]:
    """Both types for both methods."""
    return [
        rival(method, {"run.dtype": kind}, kind, group=method, baseline=kind == KINDS[0])
        for method in METHODS
        for kind in KINDS
    ]


def compared(rows: Sequence[Row]) -> list[str]:
    """The curves side by side, and how far seeds differ in float32: the scale to read the differences by."""
    said: list[str] = []
    for row, base in with_baselines(rows):
        if base is None or row is base:
            continue
        seen = values_of(base, "val/ce")
        said += [f"{row.entry.group}, validation cross-entropy in nats along the run:", "", *along(row, base), ""]
        said += [f"Largest difference between seeds in float32 at the end: {max(seen) - min(seen):.4f} nats.", ""]
    return said


def main(words: Sequence[str]) -> int:
    """Train, compare, write; returns the exit code."""
    settings = parse(Settings, words, prog="python -m experiments.precision", description=__doc__ or "")
    made = stamp("precision", words)
    rows = conduct(entries(settings), settings, "precision", [rate(settings)])
    title = "bfloat16 products against float32"
    publish(settings, made, rows, page(title, made, settings, rows, after=compared(rows)), curves(rows))
    return 0


if __name__ == "__main__":
    run_main(main)
