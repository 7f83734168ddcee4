"""What a second process brings on this machine, and how long a killed worker costs: training runs, timed in turn.

    python -m experiments.scaling --rounds 5 --kills 3

Each process has one thread. The same global batch is trained by one process, by two under torchrun, and, as the
machine's own limit, by two that know nothing of each other and have half of it each. Writes table.md and record.json
below results/scaling.
"""

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL
from typing import Any

from benchmarks.table import quartiles
from cli import parse, run_main
from config import require
from experiments.arms import ROOT, flags, last_line
from experiments.study import commit_name
from files import write_atomic, write_json
from training.hardware import git_state, processor_name, usable_cores, versions

LARGER = {"model.n-layer": 6, "model.n-head": 4, "model.n-embd": 256, "model.block-size": 256, "train.batch-size": 8}
WORKLOADS: dict[str, dict[str, Any]] = {
    "default preset": {},
    "default preset, AdamW": {"optim.name": "adamw", "optim.lr": 3e-3},
    "6 x 256, context 256, batch 8": LARGER,
}
"""Differences from avatarl-char, by what they are."""


@dataclass(frozen=True)
class Settings:
    """One process against two, and restarts."""

    rounds: int = 5
    """Runs of each kind, in turn."""
    steps: int = 30
    """Optimiser steps of a run; the second half is timed."""
    kills: int = 3
    """Restarts that are timed."""
    also: tuple[str, ...] = ()
    """Further settings of every run, as group.field=value."""
    out: Path = ROOT / "results" / "scaling"
    """Where table.md and record.json are written."""

    def __post_init__(self) -> None:
        require(self.rounds >= 1, "rounds", self.rounds, "use a positive number")
        require(self.steps >= 4, "steps", self.steps, "use at least 4, of which 2 are timed")
        require(self.kills >= 0, "kills", self.kills, "must not be negative")
        for word in self.also:
            require("=" in word and "." in word.partition("=")[0], "also", word, "write group.field=value")

    def common(self, folder: str, steps: int) -> dict[str, Any]:
        """Settings of every run: real text, one thread, nothing but steps."""
        chosen: dict[str, Any] = {
            "run.out-dir": folder,
            "run.threads": 1,
            "data.corpus": "tinyshakespeare",
            "data.val-fraction": 0.01,
            "train.steps": steps,
            "optim.warmup-steps": 1,
            "log.every": max(1, steps // 2),
            "eval.every": 0,
            "eval.sample-tokens": 0,
            "eval.ladder": 0,
        }
        return chosen | dict(word.split("=", 1) for word in self.also)


def launched(words: Sequence[str], processes: int, restarts: int = 0) -> subprocess.Popen[bytes]:
    """train.py begun with these words, by torchrun where it is for more than one process."""
    launcher: list[str] = []
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
        launcher += [f"--max-restarts={restarts}"]
    return subprocess.Popen(
        [sys.executable, *launcher, "train.py", "avatarl-char", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a run. Raises RuntimeError with its last words when it failed."""
    _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(f"train.py ended with {process.returncode}: {said.decode().strip()[-300:]}")


def speed(settings: Mapping[str, Any], s: Settings, processes: int, alone: bool = False) -> float:
    """Tokens a second of one run on so many processes, or together of as many runs that each have a share of it."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = s.common(folder, s.steps) | dict(settings)
        if alone:
            batch = int(chosen.get("train.batch-size", 16))
            chosen["train.batch-size"] = batch // processes
        runs = [f"run{i}" for i in range(processes if alone else 1)]
        begun = [launched(flags(chosen | {"run.name": name}), 1 if alone else processes) for name in runs]
        for process in begun:
            finish(process)
        key = "train/tokens_per_second"
        return sum(float(last_line(Path(folder) / name, key)[key]) for name in runs)


def restart_seconds(s: Settings) -> float:
    """From the kill of one of two workers to the first step that is new, in a run of the default preset."""
    with tempfile.TemporaryDirectory() as folder:
        steps = 1000
        chosen = s.common(folder, steps) | {"log.every": 1, "train.checkpoint-every": 5, "run.name": "run"}
        process, run = launched(flags(chosen), 2, restarts=1), Path(folder) / "run"
        try:
            newest = run / "checkpoints" / "latest"
            wait(newest.exists, process)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            before = (run / "metrics.jsonl").stat().st_ino
            start = time.perf_counter()
            os.kill(int(children[-1]), SIGKILL)
            wait(lambda: (run / "metrics.jsonl").stat().st_ino != before, process)  # trimmed: written anew
            kept = steps_written(run)
            wait(lambda: steps_written(run) > kept, process)
            return time.perf_counter() - start
        finally:
            process.terminate()
            process.communicate()


def steps_written(run: Path) -> int:
    """How many steps a run has logged."""
    return (run / "metrics.jsonl").read_text().count("train/loss")


def wait(there: Callable[[], bool], process: subprocess.Popen[bytes], patience: float = 300.0) -> None:
    """Wait until `there()`. Raises RuntimeError when the run ends first or nothing comes."""
    deadline = time.monotonic() + patience
    while not there():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the run that was to be killed ended, or never came so far")
        time.sleep(0.02)


def table(record: Mapping[str, Any]) -> str:
    """What was measured, in Markdown."""
    made = record["machine"]
    text = [
        "# One process and two",
        "",
        f"`python -m experiments.scaling --rounds {record['rounds']} --steps {record['steps']} --kills "
        f"{len(record['restart_seconds'])}` on {made['processor']}, {made['cores']} cores, torch {made['torch']}, "
        f"commit {made['commit']}, {made['date']}. One thread a process, gloo, equal global batches; tokens a second "
        "over the second half of a run, medians of runs in turn; ratios round by round, quartiles in brackets.",
        "",
        "| workload | 1 process | 2 processes | ratio | 2 that share nothing: the machine's limit | share of it |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in record["tokens_per_second"].items():
        one, two, apart = found["1"], found["2"], found["2 apart"]
        middle = [f"{statistics.median(rates):,.0f}" for rates in (one, two)]
        low, median, high = quartiles([b / a for a, b in zip(one, two, strict=True)])
        limit = statistics.median(b / a for a, b in zip(one, apart, strict=True))
        text.append(
            f"| {name} | {middle[0]} | {middle[1]} | **{median:.2f}** ({low:.2f} to {high:.2f}) | {limit:.2f} | "
            f"{median / limit:.0%} |"
        )
    if record["restart_seconds"]:
        seconds = ", ".join(f"{s:.1f}" for s in record["restart_seconds"])
        text += ["", f"From SIGKILL of one of two workers to the first new step, default preset: {seconds} s."]
    return "\n".join(text) + "\n"


def main(words: Sequence[str]) -> int:
    """Run, time, write; returns the exit code."""
    s = parse(Settings, words, prog="python -m experiments.scaling", description=__doc__ or "")
    found: dict[str, dict[str, list[float]]] = {name: {"1": [], "2": [], "2 apart": []} for name in WORKLOADS}
    for round_ in range(s.rounds):
        for name, settings in WORKLOADS.items():
            found[name]["1"].append(speed(settings, s, 1))
            found[name]["2"].append(speed(settings, s, 2))
            found[name]["2 apart"].append(speed(settings, s, 2, alone=True))
            rates = {kind: f"{rates[-1]:,.0f}" for kind, rates in found[name].items()}
            print(f"round {round_ + 1} of {s.rounds}, {name}: {rates}", flush=True)
    restarts = [restart_seconds(s) for _ in range(s.kills)]
    record = {
        "machine": {
            "processor": processor_name(),
            "cores": usable_cores(),
            "torch": versions()["torch"],
            "commit": commit_name(git_state()),
            "date": time.strftime("%Y-%m-%d"),
        },
        "rounds": s.rounds,
        "steps": s.steps,
        "also": list(s.also),
        "workloads": WORKLOADS,
        "tokens_per_second": found,
        "restart_seconds": restarts,
    }
    s.out.mkdir(parents=True, exist_ok=True)
    write_json(s.out / "record.json", record)
    write_atomic(s.out / "table.md", table(record))
    print(f"\n{table(record)}")
    return 0


if __name__ == "__main__":
    run_main(main)
