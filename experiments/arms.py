"""Runs of a study: each arm is trained once, in its own process, and found again when the study is resumed."""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import Config, ConfigError, differences, override, preset, require
from reporting.numbers import duration
from reporting.read import NOT_FINITE

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = ("run.name", "run.out_dir", "run.threads", "log.")
"""Settings that say where and how a run happens, not what it computes: the same run without them."""


def built(name: str, settings: Mapping[str, Any]) -> Config:
    """The config of a preset with some {"group.field": value} replaced. Raises ConfigError as the command line does."""
    groups: dict[str, dict[str, Any]] = {}
    known = Config().to_dict()
    for key, value in settings.items():
        group, _, field = key.replace("-", "_").partition(".")
        require(field in known.get(group, {}), key, value, "there is no such setting; see python train.py --help")
        groups.setdefault(group, {})[field] = value
    try:
        return override(preset(name), **groups)
    except TypeError as error:  # text where a number is wanted
        raise ConfigError(f"{dict(settings)}: a setting has the wrong type ({error})") from None


def flags(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Settings as words of train.py's command line: {"optim.lr": 0.003} → ("--optim.lr", "0.003")."""
    words: list[str] = []
    for key, value in settings.items():
        if isinstance(value, bool):
            group, _, field = key.partition(".")
            words.append(f"--{key}" if value else f"--{group}.no-{field}")
        else:
            words += [f"--{key}", str(value)]
    return tuple(words)


@dataclass(frozen=True)
class Arm:
    """One run: what it is in words, a preset, and the settings that make it differ, `run.seed` among them."""

    label: str
    preset: str
    settings: Mapping[str, Any]

    @property
    def seed(self) -> int:
        """The seed among its settings."""
        return int(self.settings["run.seed"])

    @property
    def config(self) -> Config:
        """All settings of the run."""
        return built(self.preset, self.settings)

    @property
    def name(self) -> str:
        """The run's folder: by what it computes, so that another label or an equal arm finds the same run."""
        changed = differences(Config(), self.config)
        kept = {k: v for k, (_, v) in changed.items() if not k.startswith(ELSEWHERE)}
        digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.preset}-seed{self.seed}-{digest}"


@dataclass(frozen=True)
class Outcome:
    """What a run reached: its evaluations in the order of their steps, lines of metrics.jsonl with val/…"""

    arm: Arm
    folder: Path
    evaluations: tuple[dict[str, Any], ...]
    diverged: bool = False
    """It was given up because its losses were not finite."""

    @property
    def final(self) -> dict[str, Any]:
        """The last evaluation."""
        return self.evaluations[-1]

    @property
    def best(self) -> dict[str, Any]:
        """The evaluation with the lowest cross-entropy."""
        return min(self.evaluations, key=lambda e: finite_or_inf(e["val/ce"]))

    def loss(self, by: str) -> float:
        """The cross-entropy that a choice goes by: of the "final" or the "best" evaluation; inf if it diverged."""
        return math.inf if self.diverged else finite_or_inf(getattr(self, by)["val/ce"])


def finite_or_inf(value: float) -> float:
    """The value, or inf in place of NaN, which no comparison orders."""
    return value if math.isfinite(value) else math.inf


def lines(run: Path, key: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl that hold `key`, numbers that were not finite as floats."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: NOT_FINITE.get(v, v) if isinstance(v, str) else v for k, v in f.items()} for f in found if key in f]


def last_line(run: Path, key: str) -> dict[str, Any]:
    """The last line of a run's metrics.jsonl that holds `key`."""
    return lines(run, key)[-1]


def last_evaluation(run: Path) -> dict[str, Any]:
    """A run's last evaluation."""
    return last_line(run, "val/ce")


def run_script(script: str, *words: str, environment: Mapping[str, str] | None = None) -> None:
    """Run a script of the checkout to its end. Raises RuntimeError with its own last words when it fails."""
    command = [sys.executable, str(ROOT / script), *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script} ended with {done.returncode}: {done.stderr.strip()[-300:]}")


def run_arm(arm: Arm, folder: Path, threads: int) -> Outcome:
    """Train `arm` below `folder` unless it stands there complete.

    A run that was given up for losses that are not finite is an outcome too; for any other failure RuntimeError is
    raised with the run's own error.
    """
    place = folder / arm.name
    diverged = False
    if not (place / "result.json").is_file():
        words = [sys.executable, str(ROOT / "train.py")]
        if (place / "checkpoints" / "latest").is_file():
            words += ["--resume", str(place)]
        else:
            shutil.rmtree(place, ignore_errors=True)  # cut off before its first checkpoint
            words += [arm.preset, *flags(arm.settings), "--run.name", arm.name, "--run.out-dir", str(folder)]
            words += ["--run.threads", str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=ROOT)
        diverged = bool(re.search(r"^error: .*not finite", done.stderr or "", re.MULTILINE))
        if done.returncode and not diverged:
            raise RuntimeError(f"{arm.label}, {arm.name} failed: {done.stderr.strip().splitlines()[-1:]}")
    return Outcome(arm, place, tuple(lines(place, "val/ce")), diverged)


class Progress:
    """Says what every run reached, how many are left, and how long they may take."""

    def __init__(self, count: int, jobs: int) -> None:
        self._count, self._jobs = count, jobs
        self._done, self._seconds = 0, list[float]()
        self._lock = threading.Lock()

    def say(self, outcome: Outcome, seconds: float) -> None:
        """One run is there, trained or found; runs that took under a second were found."""
        with self._lock:
            self._done += 1
            self._seconds += [seconds] if seconds >= 1 else []
            left, eta = self._count - self._done, ""
            if left and self._seconds:
                eta = f", about {duration(left * sum(self._seconds) / len(self._seconds) / self._jobs)} left"
            label = f"{outcome.arm.label}, seed {outcome.arm.seed}"
            reached = f"val CE {outcome.loss('final'):.4f}  ECE {outcome.final['val/ece']:.4f}"
            print(f"[{self._done}/{self._count}{eta}] {label:44} {reached}  {outcome.folder.name}", flush=True)


def run_all(arms: Sequence[Arm], folder: Path, jobs: int, threads: int) -> list[Outcome]:
    """Train every arm, `jobs` at a time, saying what each reached; their outcomes, in order.

    Arms that compute the same are one run. Where one fails, those that wait are not started.
    """
    unique = {arm.name: arm for arm in arms}
    progress = Progress(len(unique), jobs)

    def one(arm: Arm) -> Outcome:
        start = time.perf_counter()
        outcome = run_arm(arm, folder, threads)
        progress.say(outcome, time.perf_counter() - start)
        return outcome

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        try:
            done = dict(zip(unique, pool.map(one, unique.values()), strict=True))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [done[arm.name] for arm in arms]
