"""Does surgery lift a student off its plateau? hybrid.py with several seeds, and the verdict over them.

    python -m experiments.surgery --seeds 3
    python -m experiments.surgery --seeds 3 --also surgeon=td3 surgery.rank=16

Every seed is a run of hybrid.py with all its arms, and with a phase 1 that is long enough to stagnate; lengths are
chosen so that three seeds take about 45 minutes of 2 cores. Arms of a seed share phase 1, so their differences are
paired. Runs lie in runs/surgery/ and are not repeated: an interrupted study continues. Writes results/surgery/:
table.md, figure.svg, runs.jsonl, record.json; and runs/surgery/report.html.
"""

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli import parse, run_main
from config import require
from experiments.arms import ROOT, lines
from experiments.figures import Line, chart, paired, stacked
from experiments.study import commit_name, stamp
from files import write_atomic, write_json
from report import write_report
from reporting.numbers import percent
from reporting.surgery import ARMS, compared, read_result, table, told, verdict


@dataclass(frozen=True)
class Settings:
    """The three phases over seeds."""

    seeds: int = 3
    """Seeds, from 1 on. A verdict over seeds takes 2 or more."""
    grpo_steps: int = 8000
    """Longest phase 1; it ends when it stagnates."""
    both_steps: int = 900
    """Optimiser steps of phase 3."""
    surgeon_rounds: int = 100
    """Rounds of phase 2."""
    also: tuple[str, ...] = ()
    """Further settings of hybrid.py, such as surgeon=td3 or surgery.rank=16."""
    jobs: int = 3
    """Seeds at a time: small students use two cores better as processes of one thread. Time is then that of a shared
    machine, for surgery and for the steps of the arm that is given it alike; 1 seed at a time measures it alone."""
    threads: int = 1
    """CPU threads of each run; 0: all cores."""
    runs: Path = ROOT / "runs" / "surgery"
    """Folder of the runs."""
    out: Path = ROOT / "results" / "surgery"
    """Folder of the figures."""

    def __post_init__(self) -> None:
        for name in ("seeds", "grpo_steps", "both_steps", "jobs"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "use a positive number")
        for word in self.also:
            require("=" in word, "also", word, "write setting=value, such as surgery.rank=16")

    def words(self, seed: int) -> list[str]:
        """What hybrid.py is told."""
        phases = {"grpo-steps": self.grpo_steps, "both-steps": self.both_steps, "surgeon-rounds": self.surgeon_rounds}
        found = ["--data.corpus", "tinyshakespeare", "--run.seed", str(seed), "--eval.ladder", "0"]
        found += [word for name, value in phases.items() for word in (f"--phases.{name}", str(value))]
        for setting in self.also:
            name, _, value = setting.partition("=")
            found += [f"--{name}", *value.split()]
        return found

    def folder(self, seed: int) -> Path:
        """The run of a seed: another one for other settings."""
        digest = hashlib.sha256(json.dumps(self.words(seed)).encode()).hexdigest()[:8]
        return self.runs.resolve() / f"seed{seed}-{digest}"


def run_seed(settings: Settings, seed: int) -> dict[str, Any]:
    """The result of one seed, run or continued where it is not there yet. Raises RuntimeError when it fails."""
    folder = settings.folder(seed)
    if (result := read_result(folder)) is not None:
        return result
    words = [sys.executable, str(ROOT / "hybrid.py")]
    if (folder / "config.json").is_file():
        words += ["--resume", str(folder)]
    else:
        words += [*settings.words(seed), "--run.out-dir", str(folder.parent), "--run.name", folder.name]
        words += ["--run.threads", str(settings.threads)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    result = read_result(folder)
    if done.returncode or result is None:
        raise RuntimeError(f"seed {seed}: hybrid.py ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    print(f"seed {seed}: {verdict([result])}", flush=True)
    return result


def losses(folder: Path, since: int) -> dict[int, float]:
    """{steps of phase 3: validation CE} of an arm whose phase 1 took `since` steps."""
    return {line["step"] - since: line["val/ce"] for line in lines(folder, "val/ce") if line["step"] >= since}


def curve(arm: str, results: Sequence[dict[str, Any]], folders: Sequence[Path]) -> Line:
    """An arm's way through phase 3, at the evaluations that all seeds with it have."""
    pairs = zip(results, folders, strict=True)
    found = [losses(folder / arm, result["phase_1"]["steps"]) for result, folder in pairs if arm in result["arms"]]
    shared = set.intersection(*map(set, found)) if found else set()
    points = [(float(step), [of_seed[step] for of_seed in found]) for step in sorted(shared)]
    return Line(ARMS[arm], [(x, values) for x, values in points if all(map(math.isfinite, values))])


def figure(results: Sequence[dict[str, Any]], folders: Sequence[Path]) -> str:
    """Where every arm of every seed ended, seeds joined, and the arms' means on the way there."""
    there = [arm for arm in ARMS if any(arm in result["arms"] for result in results)]
    ends = {ARMS[arm]: [result["arms"].get(arm, {}).get("val_ce") for result in results] for arm in there}
    names = [f"seed {result['seed']}" for result in results]
    ways = [line for arm in there if (line := curve(arm, results, folders)).points]
    return stacked(
        {
            "At the end of phase 3": paired(ends, names, "validation CE, nats"),
            "On the way: mean and band over seeds": chart(ways, "optimiser steps of phase 3"),
        }
    )


def page(results: Sequence[dict[str, Any]], made: dict[str, Any]) -> str:
    """The study in Markdown: verdict, arms over all seeds, and the paired differences of each."""
    lines = [
        "# Surgery over seeds",
        "",
        f"**{verdict(results)}**",
        "",
        f"`{made['command']}` on {made['processor']}, {made['cores']} cores, torch {made['versions']['torch']}, commit "
        f"{commit_name(made['git'])}, {made['started']}. Whole validation split of tinyshakespeare.",
        "",
        *table(results),
        "",
        "Means ± standard deviations over seeds. Gain: cross-entropy of nobody on the same tokens minus this arm's, "
        "paired by seed; above 0 is better.",
        "",
        "| seed | phase 1 ended | stagnated | CE, accuracy there | gain over nobody | same wall time | random edits |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        one = result["phase_1"]
        gains = [compared([result], arm) for arm in ("none", "none-same-time", "random")]
        cells = [
            str(result["seed"]),
            f"step {one['steps']:,}",
            "yes" if one["stagnated"] else "no",
            f"{one['val_ce']:.4f}, {percent(one['val_accuracy'])}",
            *("—" if gain is None else told(gain) for gain in gains),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "There ± is two standard errors over the windows of the validation text."]
    return "\n".join(lines) + "\n"


def main(words: Sequence[str]) -> int:
    """Run every seed, compare, write; returns the exit code."""
    settings = parse(Settings, words, prog="python -m experiments.surgery", description=__doc__ or "")
    made = stamp("surgery", words)
    seeds = range(1, settings.seeds + 1)
    with ThreadPoolExecutor(max_workers=settings.jobs) as pool:
        try:
            results = list(pool.map(lambda seed: run_seed(settings, seed), seeds))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # seeds that wait are not started
            raise
    text = page(results, made)
    settings.out.mkdir(parents=True, exist_ok=True)
    write_json(settings.out / "record.json", made)
    write_atomic(settings.out / "runs.jsonl", "".join(json.dumps(result) + "\n" for result in results))
    write_atomic(settings.out / "table.md", text)
    write_atomic(settings.out / "figure.svg", figure(results, [settings.folder(seed) for seed in seeds]))
    print(f"\n{text}\n{settings.out}")
    print(write_report([settings.folder(seed) for seed in seeds], settings.runs / "report.html"))
    return 0


if __name__ == "__main__":
    run_main(main)
