"""Kill a run with SIGKILL at random moments, resume it, and compare its weights bit by bit.

    python -m experiments.kill_and_resume --kills 3

One run goes through undisturbed; the other is killed again and again after a random time and resumed from its
newest checkpoint. On a CPU in float32 the final weights must be identical. Writes results/resume.md.
"""

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from cli import parse, run_main
from experiments.arms import ROOT, run_script
from files import write_atomic
from training.checkpoint import WEIGHTS, find
from training.hardware import git_state, processor_name, versions


@dataclass(frozen=True)
class Settings:
    """Kill, resume, compare."""

    preset: str = "avatarl-char"
    """The preset to run."""
    steps: int = 300
    """Optimiser steps."""
    checkpoint_every: int = 25
    """Steps between checkpoints."""
    kills: int = 3
    """How often the second run is killed."""
    seed: int = 1
    """Seed of the run, and of the moments of the kills."""
    out: Path = ROOT / "results" / "resume.md"
    """Where the outcome is written."""


def kill_once(words: list[str], run: Path, draw: random.Random) -> int:
    """Start train.py, kill it a random while after its next checkpoint; the newest checkpoint's step then."""
    before = {p.name for p in (run / "checkpoints").glob("step-*")}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while {p.name for p in (run / "checkpoints").glob("step-*")} <= before:
        if process.poll() is not None:
            raise RuntimeError("the run ended before it could be killed; use more steps")
        time.sleep(0.02)
    time.sleep(draw.uniform(0.0, 1.0))
    process.kill()
    process.wait()
    return int(find(run / "checkpoints").name.split("-")[1])


def main(words: Sequence[str]) -> int:
    """Run both, compare, write; returns 0 when the weights are identical, else 1."""
    s = parse(Settings, words, prog="python -m experiments.kill_and_resume", description=__doc__ or "")
    draw = random.Random(s.seed)
    with tempfile.TemporaryDirectory() as folder:
        flags = [s.preset, "--run.out-dir", folder, "--run.seed", str(s.seed), "--train.steps", str(s.steps)]
        flags += ["--train.checkpoint-every", str(s.checkpoint_every), "--run.dtype", "float32"]
        flags += ["--data.corpus", "tinyshakespeare", "--eval.every", "0"]
        run_script("train.py", *flags, "--run.name", "whole")
        killed = Path(folder) / "killed"
        at = [kill_once([*flags, "--run.name", "killed"], killed, draw)]
        at += [kill_once(["--resume", str(killed)], killed, draw) for _ in range(s.kills - 1)]
        run_script("train.py", "--resume", str(killed))
        ends = [load_file(find(Path(folder) / name / "checkpoints") / WEIGHTS) for name in ("whole", "killed")]
    same = all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    verdict = "bit-identical" if same else "DIFFERENT"
    text = (
        f"# Kill and resume\n\n`python -m experiments.kill_and_resume --kills {s.kills} --steps {s.steps}` on "
        f"{processor_name()}, torch {versions()['torch']}, commit {git_state().get('commit', 'unknown')[:12]}, seed "
        f"{s.seed}.\n\nPreset {s.preset}, float32, {s.steps} steps; killed with SIGKILL and resumed from steps "
        f"{', '.join(map(str, at))}: the final weights are **{verdict}** to the undisturbed run's "
        f"({len(ends[0])} tensors, torch.equal).\n"
    )
    write_atomic(s.out, text)
    print(text)
    return 0 if same else 1


if __name__ == "__main__":
    run_main(main)
