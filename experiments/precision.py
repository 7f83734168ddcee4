"""Whether bfloat16 products change what is learned: the same runs in float32 and bfloat16, seed by seed.

    python -m experiments.precision --seeds 3 --steps 600

Arms are presets of both methods; validation along the way and at the end. Writes results/precision.md.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cli import parse, run_main
from config import require
from experiments.arms import ROOT, Arm, run_all
from files import write_atomic
from training.hardware import git_state, processor_name, usable_cores, versions

PRESETS = ("protocol-avatarl", "protocol-pretrain")
KINDS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Settings:
    """float32 against bfloat16."""

    seeds: int = 3
    """Seeds 1, 2, … of every arm."""
    steps: int = 600
    """Optimiser steps of every run."""
    every: int = 100
    """Steps between validations."""
    threads: int = 2
    """CPU threads of a run."""
    folder: Path = ROOT / "runs" / "precision"
    """Where the runs are kept; finished ones are not repeated."""
    out: Path = ROOT / "results" / "precision.md"
    """Where the outcome is written."""

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "every", "threads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "use a positive number")


def arm(preset: str, kind: str, seed: int, settings: Settings) -> Arm:
    """One run."""
    flags = ["--run.dtype", kind, "--run.seed", seed, "--train.steps", settings.steps, "--eval.every", settings.every]
    flags += ["--eval.sample-tokens", 0, "--data.corpus", "tinyshakespeare", "--log.every", settings.every]
    return Arm(f"{preset}-{kind}-{seed}-{settings.steps}", preset, tuple(map(str, flags)))


def curve(run: Path) -> dict[int, float]:
    """Validation cross-entropy of a run by step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["val/ce"] for line in lines if "val/ce" in line}


def table(settings: Settings) -> list[str]:
    """For each preset and validation: both means, and the difference seed by seed."""
    lines = ["| preset | step | float32 | bfloat16 | bfloat16 − float32, by seed |", "|---|---|---|---|---|"]
    seeds = range(1, settings.seeds + 1)
    for preset in PRESETS:
        found = {k: [curve(settings.folder / arm(preset, k, s, settings).name) for s in seeds] for k in KINDS}
        for step in found[KINDS[0]][0]:
            exact, half = ([c[step] for c in found[k]] for k in KINDS)
            gaps = ", ".join(f"{b - a:+.4f}" for a, b in zip(exact, half, strict=True))
            lines.append(f"| {preset} | {step} | {statistics.mean(exact):.4f} | {statistics.mean(half):.4f} | {gaps} |")
    return lines


def spread(settings: Settings) -> str:
    """How far seeds differ in float32 at the last step, the scale to read the differences by."""
    parts = []
    for preset in PRESETS:
        runs = [settings.folder / arm(preset, "float32", s, settings).name for s in range(1, settings.seeds + 1)]
        ends = [curve(run)[settings.steps] for run in runs]
        parts.append(f"{preset} {max(ends) - min(ends):.4f}")
    return "Largest difference between seeds in float32 at the last step, nats: " + ", ".join(parts) + "."


def main(words: Sequence[str]) -> int:
    """Train, compare, write; returns the exit code."""
    s = parse(Settings, words, prog="python -m experiments.precision", description=__doc__ or "")
    arms = [arm(p, k, seed, s) for p in PRESETS for seed in range(1, s.seeds + 1) for k in KINDS]
    run_all(arms, s.folder, 1, s.threads)
    commit = git_state().get("commit", "unknown")[:12]
    machine = f"{processor_name()}, {usable_cores()} cores, torch {versions()['torch']}, commit {commit}"
    lines = [
        "# bfloat16 against float32 on a CPU",
        "",
        f"`python -m experiments.precision --seeds {s.seeds} --steps {s.steps} --every {s.every}`; {machine}. "
        "Validation cross-entropy in nats; seeds 1, 2, … in order.",
        "",
        *table(s),
        "",
        spread(s),
    ]
    write_atomic(s.out, "\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    run_main(main)
