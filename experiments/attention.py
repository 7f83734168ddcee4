"""Attention on a CPU: float32, bfloat16, and bfloat16 inputs cast to float32 for it, forward and backward in turn.

    python -m experiments.attention

The shapes are the default preset's. Writes results/attention.md.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cli import parse, run_main
from config import require
from experiments.arms import ROOT
from files import write_atomic
from training.hardware import git_state, processor_name, usable_cores, versions

SHAPE = (16, 2, 128, 64)  # (B, H, T, C)
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bfloat16 cast to float32": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """Time attention in three ways."""

    rounds: int = 30
    """Timings of each kind, in turn; the median counts."""
    seed: int = 1
    """Seed of the random queries, keys and values."""
    out: Path = ROOT / "results" / "attention.md"
    """Where the outcome is written."""

    def __post_init__(self) -> None:
        require(self.rounds >= 1, "rounds", self.rounds, "use a positive number")


def attend(kind: str, parts: list[Tensor]) -> None:
    """One forward and backward pass."""
    q, k, v = (p.float() for p in parts) if kind.endswith("cast to float32") else parts
    F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()


def main(words: Sequence[str]) -> int:
    """Time, write, print; returns the exit code."""
    s = parse(Settings, words, prog="python -m experiments.attention", description=__doc__ or "")
    torch.manual_seed(s.seed)
    parts = {kind: [torch.randn(SHAPE, dtype=d, requires_grad=True) for _ in range(3)] for kind, d in KINDS.items()}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(s.rounds + 3):
        for kind in KINDS:
            start = time.perf_counter()
            attend(kind, parts[kind])
            times[kind].append(1e3 * (time.perf_counter() - start))
    lines = [
        "# Attention on a CPU",
        "",
        f"`python -m experiments.attention --rounds {s.rounds} --seed {s.seed}` on {processor_name()}, "
        f"{usable_cores()} cores, torch {versions()['torch']}, commit {git_state().get('commit', 'unknown')[:12]}. "
        f"Forward and backward of {SHAPE} (batch, heads, positions, head width), causal; median and extremes in ms "
        "after 3 warm-up rounds.",
        "",
    ]
    for kind, measured in times.items():
        kept = measured[3:]
        lines.append(f"- {kind}: {statistics.median(kept):.2f} ({min(kept):.2f} to {max(kept):.2f})")
    write_atomic(s.out, "\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    run_main(main)
