"""AvataRL against cross-entropy at equal model, tokens and batches, each at its own best learning rate.

    python -m experiments.protocol                     both optimisers, three seeds, 2,000 steps
    python -m experiments.protocol --seeds 1 --steps 500

Each arm first tries every rate of a small grid with the first seed, and beyond its ends until the best is enclosed;
the best goes on with the other seeds.
Writes results/protocol/: runs.jsonl (every run), table.md and figure.svg. Runs lie in runs/protocol and are not
repeated: an interrupted study continues.
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli import parse, run_main
from config import require
from experiments.arms import ROOT, Arm, run_all
from files import write_atomic, write_json
from training.hardware import git_state, processor_name, usable_cores, versions

METHODS = {"avatarl": "protocol-avatarl", "cross-entropy": "protocol-pretrain"}
PROTOCOL_LR = 3e-3


@dataclass(frozen=True)
class Settings:
    """The comparison of DESIGN section 3's protocol."""

    steps: int = 2000
    """Optimiser steps of every run, 768 tokens each."""
    seeds: int = 3
    """Seeds per arm, from 1 on."""
    scales: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Learning rates tried, as multiples of the protocol's (both of muon's rates are scaled)."""
    optimizers: tuple[str, ...] = ("muon", "adamw")
    """Optimisers compared."""
    jobs: int = 2
    """Runs at a time."""
    threads: int = 1
    """CPU threads of each run."""
    out: Path = ROOT / "results" / "protocol"
    """Folder of the figures."""
    runs: Path = ROOT / "runs" / "protocol"
    """Folder of the runs."""

    def __post_init__(self) -> None:
        for name in ("steps", "seeds", "jobs", "threads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "use a positive number")
        require(set(self.optimizers) <= {"muon", "adamw"}, "optimizers", self.optimizers, "use muon and adamw")


def arm(method: str, optimizer: str, scale: float, seed: int, steps: int) -> Arm:
    """One run of the protocol."""
    flags = ["--run.seed", str(seed), "--train.steps", str(steps), "--data.corpus", "tinyshakespeare"]
    flags += ["--optim.name", optimizer, "--optim.lr", f"{PROTOCOL_LR * scale:g}"]
    flags += ["--optim.muon-lr", f"{0.02 * scale:g}", "--optim.warmup-steps", str(min(100, steps))]
    flags += ["--run.dtype", "float32", "--eval.sample-tokens", "0", "--eval.every", str(max(1, steps // 4))]
    return Arm(f"{method}-{optimizer}-{steps}-x{scale:g}-seed{seed}", METHODS[method], tuple(flags))


def study(settings: Settings) -> list[dict[str, Any]]:
    """All rows of the table: method, optimiser, best scale, and CE, ECE, accuracy of every seed."""

    def train(arms: list[Arm]) -> list[dict[str, Any]]:
        return run_all(arms, settings.runs, settings.jobs, settings.threads)

    tried: dict[tuple[str, str], dict[float, dict[str, Any]]]
    tried = {(o, m): {} for o in settings.optimizers for m in METHODS}
    wanted = [(pair, scale) for pair in tried for scale in settings.scales]
    while wanted:
        found = train([arm(m, o, scale, 1, settings.steps) for (o, m), scale in wanted])
        for (pair, scale), final in zip(wanted, found, strict=True):
            tried[pair][scale] = final
        wanted = [(pair, further) for pair, finals in tried.items() if (further := beyond(finals)) is not None]
    best = {pair: best_scale(finals) for pair, finals in tried.items()}
    seeds = range(2, settings.seeds + 1)
    others = iter(train([arm(m, o, best[o, m], seed, settings.steps) for o, m in tried for seed in seeds]))
    return [
        {
            "method": m,
            "optimizer": o,
            "scale": best[o, m],
            "seeds": [finals[best[o, m]], *(next(others) for _ in seeds)],
            "tried": {f"{scale:g}": finals[scale]["val/ce"] for scale in sorted(finals)},
        }
        for (o, m), finals in tried.items()
    ]


def best_scale(finals: dict[float, dict[str, Any]]) -> float:
    """The scale with the lowest validation loss."""
    return min(finals, key=lambda scale: finals[scale]["val/ce"])


def beyond(finals: dict[float, dict[str, Any]]) -> float | None:
    """The next scale to try where the best is at an end of the grid; None where it is enclosed, or far out."""
    best = best_scale(finals)
    step = 2.0 if best == max(finals) else 0.5 if best == min(finals) else 0.0
    return best * step if step and 1 / 16 <= best * step <= 16 else None


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean ± standard deviation over seeds; the value alone where there is one seed."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    deviation = statistics.stdev(values)
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def table(rows: list[dict[str, Any]], settings: Settings) -> str:
    """The rows in Markdown, under the command and the machine that made them."""
    git = git_state().get("commit", "unknown")[:12]
    lines = [
        f"# AvataRL against cross-entropy, {settings.steps:,} steps of 768 tokens",
        "",
        f"`python -m experiments.protocol --steps {settings.steps} --seeds {settings.seeds}` on "
        f"{processor_name()}, {usable_cores()} cores, torch {versions()['torch']}, commit {git}, "
        f"{time.strftime('%Y-%m-%d')}. Seeds 1 to {settings.seeds}; mean ± standard deviation over seeds; whole "
        "validation split of tinyshakespeare. The learning rate of each row is the best of a grid that encloses it, by "
        "the first seed's validation loss (chosen alike for both methods).",
        "",
        "| optimiser | objective | rate x | val CE, nats | accuracy | ECE | CE by rate (seed 1) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        columns = [spread([f[f"val/{key}"] for f in row["seeds"]]) for key in ("ce", "accuracy", "ece")]
        tried = ", ".join(f"x{s}: {ce:.4f}" for s, ce in row["tried"].items())
        lines.append(f"| {row['optimizer']} | {row['method']} | {row['scale']:g} | {' | '.join(columns)} | {tried} |")
    lines += ["", *verdicts(rows)]
    return "\n".join(lines) + "\n"


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """Per optimiser, AvataRL minus cross-entropy, seed by seed."""
    said = []
    by_pair = {(r["optimizer"], r["method"]): r["seeds"] for r in rows}
    for optimizer in dict.fromkeys(r["optimizer"] for r in rows):
        ours, theirs = by_pair[optimizer, "avatarl"], by_pair[optimizer, "cross-entropy"]
        gaps = [a["val/ce"] - b["val/ce"] for a, b in zip(ours, theirs, strict=True)]
        ratio = statistics.mean(f["val/ece"] for f in ours) / statistics.mean(f["val/ece"] for f in theirs)
        better = sum(g < 0 for g in gaps)
        said.append(
            f"- {optimizer}: AvataRL − cross-entropy = {spread(gaps)} nats, lower in {better} of {len(gaps)} seeds, "
            f"at {ratio:.2f} times the calibration error."
        )
    return said


def figure(rows: list[dict[str, Any]]) -> str:
    """Validation CE of every seed as dots, one line per row: an SVG."""
    values = [f["val/ce"] for r in rows for f in r["seeds"]]
    low, high = min(values) - 0.01, max(values) + 0.01
    x = lambda ce: 230 + 430 * (ce - low) / (high - low)  # noqa: E731
    height = 60 + 34 * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="700" height="{height}" fill="white"/>',
    ]
    for i, row in enumerate(rows):
        y = 30 + 34 * i
        colour = "#c2410c" if row["method"] == "avatarl" else "#1d4ed8"
        parts.append(f'<text x="10" y="{y + 5}">{row["optimizer"]} · {row["method"]}</text>')
        parts.append(f'<line x1="230" x2="660" y1="{y}" y2="{y}" stroke="#ddd"/>')
        for f in row["seeds"]:
            parts.append(f'<circle cx="{x(f["val/ce"]):.1f}" cy="{y}" r="5" fill="{colour}" fill-opacity="0.7"/>')
    bottom = height - 12
    for tick in range(5):
        ce = low + (high - low) * tick / 4
        parts.append(f'<text x="{x(ce):.1f}" y="{bottom}" text-anchor="middle" fill="#555">{ce:.3f}</text>')
    parts.append(f'<text x="10" y="{bottom}" fill="#555">validation CE, nats</text></svg>')
    return "\n".join(parts) + "\n"


def main(words: Sequence[str]) -> int:
    """Run the study and write its figures; returns the exit code."""
    settings = parse(Settings, words, prog="python -m experiments.protocol", description=__doc__ or "")
    rows = study(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    record = {"command": sys.argv, "versions": versions(), "git": git_state(), "processor": processor_name()}
    write_json(settings.out / "record.json", record)
    write_atomic(settings.out / "runs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_atomic(settings.out / "table.md", table(rows, settings))
    write_atomic(settings.out / "figure.svg", figure(rows))
    print(table(rows, settings))
    return 0


if __name__ == "__main__":
    run_main(main)
