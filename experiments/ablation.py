"""What every choice of the default preset is worth: change one at a time, equal tokens, several seeds.

    python -m experiments.ablation --seeds 2 --steps 500

A quarter of the default run's length, so that the whole table takes minutes. Writes results/ablation/: runs.jsonl
and table.md. Runs lie in runs/ablation and are not repeated: an interrupted study continues.
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli import parse, run_main
from config import require
from experiments.arms import ROOT, Arm, run_all
from experiments.protocol import spread
from files import write_atomic
from training.hardware import git_state, processor_name, usable_cores, versions

CONSTANT = ("--method.critic-weight-schedule", "", "--method.reality-weight-schedule", "")
VARIANTS: dict[str, tuple[str, ...]] = {
    "default": (),
    "cross-entropy": ("--train.objective", "cross-entropy"),
    "4 layers": ("--model.n-layer", "4"),
    "2 layers": ("--model.n-layer", "2"),
    "4 heads": ("--model.n-head", "4"),
    "learned positions": ("--model.position", "learned"),
    "no QK-norm": ("--model.no-qk-norm",),
    "squared ReLU": ("--model.activation", "relu2"),
    "float32": ("--run.dtype", "float32"),
    "AdamW": ("--optim.name", "adamw"),
    "half the rates": ("--optim.lr", "0.002", "--optim.muon-lr", "0.015"),
    "twice the rates": ("--optim.lr", "0.008", "--optim.muon-lr", "0.06"),
    "context 256, 8 rows": ("--model.block-size", "256", "--train.batch-size", "8"),
    "critic's weight constant, 0.3": (*CONSTANT, "--method.critic-weight", "0.3", "--method.reality-weight", "0.7"),
    "published reward": ("--method.sparsify", "above_mean", "--method.normalize", "cap"),
    "critic sees 3 characters": ("--critic.ngram-context", "3"),
    "critic keeps its own occurrence": ("--critic.no-leave-one-out",),
}


@dataclass(frozen=True)
class Settings:
    """One change at a time around the default preset."""

    seeds: int = 2
    """Seeds per variant, from 1 on."""
    steps: int = 500
    """Optimiser steps of every run, 2,048 tokens each."""
    preset: str = "avatarl-char"
    """The preset that is varied."""
    jobs: int = 2
    """Runs at a time."""
    threads: int = 1
    """CPU threads of each run."""
    out: Path = ROOT / "results" / "ablation"
    """Folder of the figures."""
    runs: Path = ROOT / "runs" / "ablation"
    """Folder of the runs."""

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "jobs", "threads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "use a positive number")


def arms(settings: Settings) -> list[tuple[str, Arm]]:
    """Every variant with every seed: (variant, run)."""
    common = ["--train.steps", str(settings.steps), "--eval.every", "0", "--eval.sample-tokens", "0"]
    common += ["--optim.warmup-steps", str(max(1, settings.steps // 20)), "--data.corpus", "tinyshakespeare"]
    made = []
    for seed in range(1, settings.seeds + 1):
        for i, (variant, flags) in enumerate(VARIANTS.items()):
            words = (*common, *flags, "--run.seed", str(seed))
            made.append((variant, Arm(f"{i:02}-{settings.steps}-seed{seed}", settings.preset, words)))
    return made


def table(rows: dict[str, list[dict[str, Any]]], settings: Settings) -> str:
    """The variants in Markdown, best first, under the command and the machine that made them."""
    git = git_state().get("commit", "unknown")[:12]
    lines = [
        f"# What the choices of {settings.preset} are worth",
        "",
        f"`python -m experiments.ablation --seeds {settings.seeds} --steps {settings.steps}` on {processor_name()}, "
        f"{usable_cores()} cores, torch {versions()['torch']}, commit {git}, {time.strftime('%Y-%m-%d')}. "
        f"{settings.steps:,} steps of 2,048 tokens, {settings.jobs} runs at a time with {settings.threads} thread "
        "each; mean ± standard deviation over seeds; whole validation split. Tokens per second are a rough guide: "
        "neighbours share the machine.",
        "",
        "| variant | val CE, nats | − default | ECE | tokens/s |",
        "|---|---|---|---|---|",
    ]
    base = [f["val/ce"] for f in rows["default"]]
    for variant, finals in sorted(rows.items(), key=lambda row: statistics.mean(f["val/ce"] for f in row[1])):
        ce = [f["val/ce"] for f in finals]
        gap = statistics.mean(ce) - statistics.mean(base)
        ece = spread([f["val/ece"] for f in finals])
        rate = statistics.mean(f["tokens"] / f["seconds"] for f in finals)
        lines.append(f"| {variant} | {spread(ce)} | {gap:+.4f} | {ece} | {rate:,.0f} |")
    return "\n".join(lines) + "\n"


def main(words: Sequence[str]) -> int:
    """Run the study and write its figures; returns the exit code."""
    settings = parse(Settings, words, prog="python -m experiments.ablation", description=__doc__ or "")
    planned = arms(settings)
    finals = run_all([arm for _, arm in planned], settings.runs, settings.jobs, settings.threads)
    rows: dict[str, list[dict[str, Any]]] = {}
    for (variant, _), final in zip(planned, finals, strict=True):
        rows.setdefault(variant, []).append(final)
    settings.out.mkdir(parents=True, exist_ok=True)
    stamp = {"versions": versions(), "git": git_state(), "processor": processor_name()}
    write_atomic(
        settings.out / "runs.jsonl",
        "".join(json.dumps({"variant": v, "seeds": f} | stamp) + "\n" for v, f in rows.items()),
    )
    write_atomic(settings.out / "table.md", table(rows, settings))
    print(table(rows, settings))
    return 0


if __name__ == "__main__":
    run_main(main)
