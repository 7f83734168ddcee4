"""Reading a run folder as it is found: complete, still running, interrupted or damaged (DESIGN section 6).

Whatever is missing or unreadable becomes a note on the run instead of an error; only a folder that holds
neither config.json nor metrics.jsonl is refused.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from config import ConfigError
from reporting.metrics import AXES

SAMPLE_HEAD = re.compile(r"^=== step (\d{1,15})\b[^\n]*\n", re.MULTILINE)


class Point(NamedTuple):
    """One logged value; a missing axis is NaN. `gap`: a non-finite value was left out just before it."""

    step: float
    tokens: float
    seconds: float
    value: float
    gap: bool = False


class Rung(NamedTuple):
    """The n-gram ladder at one context length: cross-entropy in nats, accuracy as a share."""

    context: int
    ce: float
    accuracy: float


@dataclass(frozen=True)
class Run:
    """What a run folder says."""

    name: str
    info: dict[str, Any] = field(default_factory=dict)
    """config.json as it stands."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Lines of metrics.jsonl in the order of their steps."""
    ladder: tuple[Rung, ...] = ()
    samples: list[tuple[int, str]] = field(default_factory=list)
    """(step, text), in the order of samples.txt."""
    result: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What was missing or could not be read, a sentence each."""

    @property
    def config(self) -> dict[str, Any]:
        """The settings, flat: {"group.field": value}."""
        groups = self.info.get("config")
        return flatten(groups) if isinstance(groups, dict) else {}

    @property
    def corpus(self) -> dict[str, Any]:
        """The record of the text that was really used; {} where there is none."""
        corpus = self.info.get("corpus")
        return corpus if isinstance(corpus, dict) else {}

    def logged(self) -> list[str]:
        """Numeric keys that occur in metrics.jsonl, axes apart, in order of appearance."""
        seen = {key: None for row in self.rows for key, value in row.items() if is_number(value)}
        return [key for key in seen if key not in AXES]

    def points(self, key: str) -> list[Point]:
        """The finite values of `key`; of two lines with the same step the later counts."""
        latest: dict[float, Point] = {}
        gap = False
        for row in self.rows:
            value = row.get(key)
            if not is_number(value):
                continue
            if not math.isfinite(value):
                gap = True
                continue
            step, tokens, seconds = (_float(row.get(axis)) for axis in AXES)
            latest[step] = Point(step, tokens, seconds, float(value), gap)
            gap = False
        return list(latest.values())

    def lost(self, key: str) -> int:
        """How many values of `key` are not finite."""
        return sum(is_number(row.get(key)) and not math.isfinite(row[key]) for row in self.rows)


NOT_FINITE = {str(v): v for v in (math.nan, math.inf, -math.inf)}
"""JSON has no NaN: such values are written as these strings."""
LARGEST = 1e100
"""Larger magnitudes count as infinite: nothing sensible can be drawn with them."""


def is_number(value: object) -> TypeGuard[float]:
    """Whether a JSON value is a number (True and False are none)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders and give them names that differ. Raises ConfigError for a folder that is no run."""
    unique = {folder.resolve(): folder for folder in map(Path, folders)}
    if not unique:
        raise ConfigError("no run folder given; write python report.py runs/NAME")
    last = [path.name for path in unique]
    names = [p.name if last.count(p.name) == 1 else f"{p.parent.name}/{p.name}" for p in unique]
    repeated = {name for name in names if names.count(name) > 1}
    return [
        read_run(folder, name if name not in repeated else f"{name} ({number})")
        for number, (folder, name) in enumerate(zip(unique.values(), names, strict=True), 1)
    ]


def read_run(folder: Path, name: str) -> Run:
    """Read one run folder. Raises ConfigError unless it holds config.json or metrics.jsonl."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give a run folder such as runs/NAME")
    if not any((folder / file).is_file() for file in ("config.json", "metrics.jsonl")):
        raise ConfigError(f"{folder} is no run: it holds neither config.json nor metrics.jsonl")
    notes: list[str] = []
    info = _read_json(folder / "config.json", notes, required=True)
    ladder = _read_json(folder / "ladder.json", notes)
    result = _read_json(folder / "result.json", notes)
    return Run(
        name=name,
        info=info if isinstance(info, dict) else {},
        rows=_read_rows(folder / "metrics.jsonl", notes),
        ladder=_rungs(ladder),
        samples=_read_samples(folder / "samples.txt"),
        result=result if isinstance(result, dict) else {},
        notes=notes,
    )


def _float(value: object) -> float:
    return float(value) if is_number(value) else math.nan


def _logged_value(value: Any) -> Any:
    if isinstance(value, str):
        return NOT_FINITE.get(value, value)
    return math.inf if is_number(value) and abs(value) > LARGEST else value


def _read_text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _read_json(path: Path, notes: list[str], required: bool = False) -> Any:
    text = _read_text(path)
    if text is None:
        if required:
            notes.append(f"{path.name} is missing.")
        return None
    try:
        return json.loads(text)
    except ValueError:
        notes.append(f"{path.name} is damaged and was left out.")
        return None


def _read_rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    text = _read_text(path)
    if text is None:
        notes.append("metrics.jsonl is missing: there are no curves.")
        return []
    lines = [line for line in text.split("\n") if line.strip()]
    rows, bad = [], []
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and is_number(row.get("step")) and abs(row["step"]) < LARGEST:
            rows.append({key: _logged_value(value) for key, value in row.items()})
        else:
            bad.append(number)
    if bad == [len(lines) - 1]:
        notes.append("The last line of metrics.jsonl is incomplete and was left out.")
    elif bad:
        notes.append(f"{len(bad)} of {len(lines)} lines of metrics.jsonl are unreadable and were left out.")
    if not lines:
        notes.append("metrics.jsonl is empty: there are no curves.")
    return sorted(rows, key=lambda row: row["step"])


def _rungs(value: object) -> tuple[Rung, ...]:
    rungs = []
    for entry in value if isinstance(value, list) else []:
        found = [_float(entry.get(key)) for key in Rung._fields] if isinstance(entry, dict) else [math.nan]
        if all(map(math.isfinite, found)):
            rungs.append(Rung(int(found[0]), *found[1:]))
    return tuple(sorted(rungs))


def _read_samples(path: Path) -> list[tuple[int, str]]:
    parts = SAMPLE_HEAD.split(_read_text(path) or "")[1:]  # step, text, step, text, …
    return [(int(step), text.rstrip("\n")) for step, text in zip(parts[::2], parts[1::2], strict=True)]
