"""The default run, from nothing, as a newcomer types it: wall time, memory, loss and calibration over seeds.

    python -m experiments.default_run --seeds 3

Every seed is a fresh `python train.py` in a new process, an empty folder and an empty cache, data preparation and
critic included in its time. Writes results/default-run/: runs.jsonl and table.md.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli import parse, run_main
from config import require
from experiments.arms import ROOT, last_evaluation
from experiments.tables import spread
from files import write_atomic
from training.hardware import git_state, processor_name, usable_cores, versions


@dataclass(frozen=True)
class Settings:
    """Repeat the default run."""

    seeds: int = 3
    """How many runs, with seeds from 1 on."""
    preset: str = "avatarl-char"
    """The preset to run."""
    out: Path = ROOT / "results" / "default-run"
    """Folder of the figures."""

    def __post_init__(self) -> None:
        require(self.seeds >= 1, "seeds", self.seeds, "use a positive number")


def run_once(preset: str, seed: int, folder: Path) -> dict[str, Any]:
    """One fresh run in its own process; its last evaluation, wall seconds and peak resident memory."""
    words = [sys.executable, str(ROOT / "train.py"), preset, "--run.seed", str(seed)]
    words += ["--data.corpus", "tinyshakespeare", "--run.out-dir", str(folder), "--run.name", f"seed{seed}"]
    environment = os.environ | {"AVATARL_CACHE": str(folder / f"cache{seed}")}  # nothing is there from before
    start = time.perf_counter()
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"seed {seed}: train.py ended with {process.returncode}")
    result = json.loads((folder / f"seed{seed}" / "result.json").read_text())
    return last_evaluation(folder / f"seed{seed}") | {
        "seed": seed,
        "wall_seconds": wall,
        "training_seconds": result["seconds"],
        "peak_memory_gb": usage.ru_maxrss * 1024 / 1e9,
        "best_val_ce": result["best_val_ce"],
    }


def table(runs: list[dict[str, Any]], settings: Settings) -> str:
    """The runs in Markdown, under the command and the machine that made them."""
    git = git_state().get("commit", "unknown")[:12]
    lines = [
        f"# The default run, `python train.py {settings.preset}`, from nothing",
        "",
        f"`python -m experiments.default_run --seeds {settings.seeds}` on {processor_name()}, {usable_cores()} cores, "
        f"torch {versions()['torch']}, commit {git}, {time.strftime('%Y-%m-%d')}. Whole validation split of "
        "tinyshakespeare; wall time and memory are the process's, set-up of data and critic included.",
        "",
        "| seed | val CE, nats | accuracy | ECE | wall, s | training, s | peak memory, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in runs:
        lines.append(
            f"| {r['seed']} | {r['val/ce']:.4f} | {r['val/accuracy']:.1%} | {r['val/ece']:.4f} | "
            f"{r['wall_seconds']:.0f} | {r['training_seconds']:.0f} | {r['peak_memory_gb']:.2f} |"
        )
    ce, ece = spread([r["val/ce"] for r in runs]), spread([r["val/ece"] for r in runs])
    wall = spread([r["wall_seconds"] for r in runs], digits=0)
    lines += ["", f"CE {ce}, ECE {ece}, wall {wall} s (mean ± standard deviation)."]
    return "\n".join(lines) + "\n"


def main(words: Sequence[str]) -> int:
    """Run, measure, write; returns the exit code."""
    settings = parse(Settings, words, prog="python -m experiments.default_run", description=__doc__ or "")
    with tempfile.TemporaryDirectory() as folder:
        runs = [run_once(settings.preset, seed, Path(folder)) for seed in range(1, settings.seeds + 1)]
    settings.out.mkdir(parents=True, exist_ok=True)
    stamp = {"versions": versions(), "git": git_state(), "processor": processor_name()}
    write_atomic(settings.out / "runs.jsonl", "".join(json.dumps(r | stamp) + "\n" for r in runs))
    write_atomic(settings.out / "table.md", table(runs, settings))
    print(table(runs, settings))
    return 0


if __name__ == "__main__":
    run_main(main)
