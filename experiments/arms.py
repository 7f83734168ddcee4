"""Runs of a study: each arm is trained once, in its own process, and found again when the study is resumed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Arm:
    """One run: a name, a preset and the flags that make it differ."""

    name: str
    preset: str
    flags: tuple[str, ...] = ()

    @property
    def seed(self) -> int:
        """The seed among its flags."""
        return int(self.flags[self.flags.index("--run.seed") + 1])


def run_arm(arm: Arm, folder: Path, threads: int) -> dict[str, Any]:
    """Train `arm` below `folder` unless it stands there complete; returns its last evaluation.

    Raises RuntimeError with the run's own error when it fails.
    """
    place = folder / arm.name
    if not (place / "result.json").is_file():
        words = [sys.executable, str(ROOT / "train.py")]
        if (place / "checkpoints" / "latest").is_file():
            words += ["--resume", str(place)]
        else:
            shutil.rmtree(place, ignore_errors=True)  # cut off before its first checkpoint
            words += [arm.preset, *arm.flags, "--run.name", arm.name, "--run.out-dir", str(folder)]
            words += ["--run.threads", str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=ROOT)
        if done.returncode:
            raise RuntimeError(f"{arm.name} failed: {done.stderr.strip().splitlines()[-1:]}")
    return last_evaluation(place)


def last_line(run: Path, key: str) -> dict[str, Any]:
    """The last line of a run's metrics.jsonl that holds `key`."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if key in line][-1]


def last_evaluation(run: Path) -> dict[str, Any]:
    """A run's last evaluation."""
    return last_line(run, "val/ce")


def run_all(arms: Sequence[Arm], folder: Path, jobs: int, threads: int) -> list[dict[str, Any]]:
    """Train every arm, `jobs` at a time, saying what each reached; their last evaluations, in order."""

    def one(arm: Arm) -> dict[str, Any]:
        found = run_arm(arm, folder, threads)
        print(f"{arm.name:44} val CE {found['val/ce']:.4f}  ECE {found['val/ece']:.4f}", flush=True)
        return found

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        return list(pool.map(one, arms))
