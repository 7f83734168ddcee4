"""What all studies share: entries over seeds, each tuned by the same small search, at equal tokens or equal time.

An entry is one row of a study's table. `conduct` tunes every entry with the first seed, trains it with the others
and returns rows; experiments/tables.py and figures.py say what they hold, and `publish` writes it down. Runs lie in
runs/<study>/ and are not repeated: an interrupted study continues.
"""

import json
import math
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from config import preset as preset_of
from config import require
from experiments.arms import ROOT, Arm, Outcome, built, run_all
from files import write_atomic, write_json
from training.hardware import git_state, processor_name, usable_cores, versions


@dataclass(frozen=True)
class StudySettings:
    """What every study can be told."""

    steps: int = 2000
    """Optimiser steps of every run."""
    seeds: int = 3
    """Seeds of every entry, from 1 on."""
    tune: bool = True
    """Give every entry its own best learning rate, found with seed 1; else all take their preset's."""
    tune_only_baselines: bool = False
    """Tune the baselines alone: cheaper, and to their advantage."""
    scales: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Learning rates tried, as multiples of the preset's (both of muon's rates are scaled)."""
    evaluations: int = 8
    """Evaluations along a run, the last at its end: the points of its curve."""
    jobs: int = 2
    """Runs at a time."""
    threads: int = 1
    """CPU threads of each run."""
    also: tuple[str, ...] = ()
    """Further settings of every run, such as run.device=cuda; paths are seen from the checkout."""
    runs: Path | None = None
    """Folder of the runs. Unset: runs/<study>."""
    out: Path | None = None
    """Folder of the figures. Unset: results/<study>."""

    def __post_init__(self) -> None:
        for name in ("steps", "seeds", "evaluations", "jobs", "threads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "use a positive number")
        positive = len(self.scales) > 0 and all(0 < s < math.inf for s in self.scales)
        require(positive, "scales", self.scales, "use factors above 0, such as 0.5 1 2")
        for word in self.also:
            require("=" in word and "." in word.partition("=")[0], "also", word, "write group.field=value")

    @property
    def further(self) -> dict[str, Any]:
        """`also` as settings: a value that JSON reads is what it says (8, 0.5, true), any other is text."""
        return {key: typed(value) for key, _, value in (word.partition("=") for word in self.also)}


def typed(text: str) -> Any:
    """A word of the command line as a number, a bool or text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float | bool) else text


@dataclass(frozen=True)
class Entry:
    """One row of a study: a label, a preset, and the settings {"group.field": value} that make it differ."""

    label: str
    preset: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""
    """Rows of a group are compared with its baseline."""
    baseline: bool = False


@dataclass(frozen=True)
class Knob:
    """Something to tune: values of some settings, tried one after the other and beyond the ends of the grid."""

    name: str
    fields: tuple[str, ...]
    values: tuple[float, ...]
    relative: bool = True
    """The values multiply what the entry has, and the grid grows by factors; else they replace it, and it grows by
    adding."""
    stride: float = 2.0
    """Factor or addend from the best at an end of the grid to the next value beyond."""
    low: float = 1 / 16
    high: float = 16.0
    """Nothing outside is tried."""

    def applied(self, preset: str, settings: Mapping[str, Any], value: float) -> dict[str, Any]:
        """The settings with this knob at `value`."""
        if not self.relative:
            return {**settings, **dict.fromkeys(self.fields, value)}
        now = built(preset, settings).to_dict()
        have = {f: now[f.partition(".")[0]][f.partition(".")[2].replace("-", "_")] for f in self.fields}
        return {**settings, **{f: old * value for f, old in have.items()}}

    def beyond(self, tried: Mapping[float, float]) -> float | None:
        """The next value to try where the best is at an end of those tried; None where it is enclosed, or far out.

        tried: {value: loss}.
        """
        best = min(tried, key=lambda value: tried[value])
        further = set()
        if best == max(tried):
            further.add(best * self.stride if self.relative else best + self.stride)
        if best == min(tried):
            further.add(best / self.stride if self.relative else best - self.stride)
        rounded = [float(f"{value:.6g}") for value in sorted(further)]
        new = [v for v in rounded if self.low <= v <= self.high and v not in tried]
        return new[-1] if new else None


def rate(how: StudySettings) -> Knob:
    """The learning rates, both of muon's together."""
    return Knob("rate", ("optim.lr", "optim.muon-lr"), how.scales)


def common(preset: str, steps: int, evaluations: int) -> dict[str, Any]:
    """Settings of every run of a study: real text, a warm-up of at most a tenth of the run, nothing that costs time."""
    return {
        "data.corpus": "tinyshakespeare",
        "train.steps": steps,
        "train.keep": 1,
        "optim.warmup-steps": min(preset_of(preset).optim.warmup_steps, max(1, steps // 10)),
        "eval.every": max(1, steps // evaluations),
        "eval.sample-tokens": 0,
        "eval.ladder": 0,
    }


OF_LENGTH = ("train.steps", "optim.warmup-steps", "eval.every")


def of_length(preset: str, steps: int, evaluations: int) -> dict[str, Any]:
    """Those settings of `common` that a run's length decides: for an entry of another length than its study's."""
    return {k: v for k, v in common(preset, steps, evaluations).items() if k in OF_LENGTH}


@dataclass(frozen=True)
class Row:
    """An entry and what it reached with seeds 1, 2, … at its best choice."""

    entry: Entry
    outcomes: tuple[Outcome, ...]
    choice: dict[str, float] = field(default_factory=dict)
    """{knob: the value chosen}."""
    tried: dict[str, dict[float, float]] = field(default_factory=dict)
    """{knob: {value: cross-entropy of seed 1}}."""
    losers: tuple[Outcome, ...] = ()
    """Seed 1 at the other values."""

    @property
    def seconds_per_step(self) -> float:
        """Median over the seeds of training seconds a step."""
        return statistics.median(o.final["seconds"] / max(1, o.final["step"]) for o in self.outcomes)


@dataclass
class Search:
    """The tuning of one entry, coordinate by coordinate."""

    entry: Entry
    settings: dict[str, Any]
    choice: dict[str, float] = field(default_factory=dict)
    tried: dict[str, dict[float, float]] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def arm(self, seed: int, knob: Knob | None = None, value: float = 1.0) -> Arm:
        """A run at what is chosen so far, or with one knob at another value."""
        settings = knob.applied(self.entry.preset, self.settings, value) if knob else self.settings
        said = f", {knob.name} {value:g}" if knob else ""
        return Arm(f"{in_group(self.entry)}{said}", self.entry.preset, {**settings, "run.seed": seed})

    def settle(self, knob: Knob) -> None:
        """Choose the best of what was tried."""
        tried = self.tried[knob.name]
        self.choice[knob.name] = min(tried, key=lambda value: tried[value])
        self.settings = knob.applied(self.entry.preset, self.settings, self.choice[knob.name])


def in_group(entry: Entry) -> str:
    """An entry's label, with its group before it where there is one."""
    return f"{entry.group} · {entry.label}" if entry.group else entry.label


Train = Callable[[Sequence[Arm]], list[Outcome]]


def conduct(
    entries: Sequence[Entry], how: StudySettings, study: str, knobs: Sequence[Knob] = (), by: str = "final"
) -> list[Row]:
    """Tune entries over `knobs` in turn, train all of them with every seed; rows in the order of the entries.

    A choice is made by the cross-entropy of seed 1's "final" or "best" evaluation.
    """
    searches = [
        Search(e, {**common(e.preset, how.steps, how.evaluations), **e.settings, **how.further}) for e in entries
    ]
    folder = (how.runs or ROOT / "runs" / study).resolve()  # the runs start in ROOT
    train: Train = partial(run_all, folder=folder, jobs=how.jobs, threads=how.threads)
    tuned = [search for search in searches if search.entry.baseline or not how.tune_only_baselines]
    for knob in knobs if how.tune else ():
        tune(tuned, knob, train, by)
    seeds = range(1, how.seeds + 1)
    outcomes = iter(train([search.arm(seed) for search in searches for seed in seeds]))
    return [row_of(search, [next(outcomes) for _ in seeds]) for search in searches]


def tune(searches: Sequence[Search], knob: Knob, train: Train, by: str) -> None:
    """Settle one knob of every search: the grid, and beyond its ends until the best is enclosed."""
    wanted = [(search, value) for search in searches for value in knob.values]
    while wanted:
        found = train([search.arm(1, knob, value) for search, value in wanted])
        for (search, value), outcome in zip(wanted, found, strict=True):
            search.tried.setdefault(knob.name, {})[value] = outcome.loss(by)
            search.outcomes[outcome.arm.name] = outcome
        further = [(search, knob.beyond(search.tried[knob.name])) for search in searches]
        wanted = [(search, value) for search, value in further if value is not None]
    for search in searches:
        search.settle(knob)


def row_of(search: Search, outcomes: Sequence[Outcome]) -> Row:
    """The finished row of a search."""
    kept = {o.arm.name for o in outcomes}
    outcomes = [replace(o, arm=replace(o.arm, label=in_group(search.entry))) for o in outcomes]
    losers = tuple(o for name, o in search.outcomes.items() if name not in kept)
    return Row(search.entry, tuple(outcomes), search.choice, search.tried, losers)


def steps_for_equal_time(seconds_per_step: float, seconds: float) -> int:
    """How many steps of an arm fit into the wall time that its rival trained for; at least one."""
    return max(1, round(seconds / seconds_per_step))


def at_equal_time(rows: Sequence[Row], how: StudySettings, tolerance: float = 0.02) -> list[Entry]:
    """Entries for the rows that took longer than their baseline: the same with as many steps as fit into its time.

    Each has its row's choice and a whole schedule of its own, as a curve whose rate is still high says little about
    where it ends. They hold all their settings: conduct them without tuning and without `also`.
    """
    entries = []
    for row, base in with_baselines(rows):
        if base is None or row is base or row.seconds_per_step <= base.seconds_per_step * (1 + tolerance):
            continue
        seconds = base.seconds_per_step * base.outcomes[0].final["step"]
        steps = steps_for_equal_time(row.seconds_per_step, seconds)
        chosen = {k: v for k, v in row.outcomes[0].arm.settings.items() if k != "run.seed"}
        settings = {**chosen, **of_length(row.entry.preset, steps, how.evaluations)}
        entries.append(replace(row.entry, settings=settings, label=f"{row.entry.label}, {steps:,} steps"))
    return entries


def with_baselines(rows: Sequence[Row]) -> list[tuple[Row, Row | None]]:
    """Every row beside the baseline of its group."""
    bases = {row.entry.group: row for row in rows if row.entry.baseline}
    return [(row, bases.get(row.entry.group)) for row in rows]


def stamp(study: str, words: Sequence[str]) -> dict[str, Any]:
    """What a study's numbers were made by and on: command, commit, versions, processor, date. To be called first."""
    return {
        "study": study,
        "command": shlex.join(["python", "-m", f"experiments.{study}", *words]),
        "started": time.strftime("%Y-%m-%d"),
        "git": git_state(),
        "versions": versions(),
        "processor": processor_name(),
        "cores": usable_cores(),
    }


def publish(how: StudySettings, made: dict[str, Any], rows: Sequence[Row], table: str, figure: str) -> Path:
    """Write record.json, runs.jsonl, table.md and figure.svg of a study and print the table; their folder."""
    out = how.out or ROOT / "results" / made["study"]
    out.mkdir(parents=True, exist_ok=True)
    runs = [(row, o, "row") for row in rows for o in row.outcomes] + [(r, o, "tuning") for r in rows for o in r.losers]
    write_json(out / "record.json", made | {"settings": plain(how), "commits": commits(rows)})
    write_atomic(out / "runs.jsonl", "".join(json.dumps(run_line(*run)) + "\n" for run in runs))
    write_atomic(out / "table.md", table)
    write_atomic(out / "figure.svg", figure)
    print(f"\n{table}\n{out}")
    return out


def run_line(row: Row, outcome: Outcome, role: str) -> dict[str, Any]:
    """One run for runs.jsonl."""
    arm = outcome.arm
    return {
        "label": row.entry.label,
        "group": row.entry.group,
        "role": role,
        "seed": arm.seed,
        "run": arm.name,
        "preset": arm.preset,
        "settings": dict(arm.settings),
        "arm": arm.label,
        "diverged": outcome.diverged,
        "evaluations": list(outcome.evaluations),
    }


def commits(rows: Sequence[Row]) -> list[str]:
    """The commits that the runs were trained at, which a resumed study may have several of."""
    found = set()
    for outcome in (o for row in rows for o in (*row.outcomes, *row.losers)):
        record = json.loads((outcome.folder / "config.json").read_text())
        found.add(commit_name(record.get("git", {})))
    return sorted(found)


def commit_name(git: Mapping[str, Any]) -> str:
    """A commit in words."""
    return str(git.get("commit", "unknown"))[:12] + (" with uncommitted changes" if git.get("dirty") else "")


def plain(how: StudySettings) -> dict[str, Any]:
    """Settings as JSON holds them; folders left out, which only this machine has."""
    return {k: v for k, v in vars(how).items() if not isinstance(v, Path)}
