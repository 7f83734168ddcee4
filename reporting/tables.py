"""What a page says in words and numbers: summary, warnings, facts, n-gram ladder, configuration."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bootstrap.thresholds import STATUS
from config import Config
from reporting import health
from reporting.charts import COLOURS
from reporting.html import Best, Html, chip, markup, setting, table, words
from reporting.numbers import compact, duration, fixed, number, percent
from reporting.read import Run, Rung, flatten, is_number

HEADINGS = ("run.name",)
"""Settings that every page shows as a heading anyway."""
FACTS = ("preset", "corpus", "parameters", "vocab_size", "critics", "hardware", "versions", "git")
"""Entries of config.json that come first among the facts; whatever else there is follows."""
FACT_TITLES = {"vocab_size": "Vocabulary", "git": "Commit"}
HASH_LENGTH = 12


@dataclass(frozen=True)
class Column:
    """One number of the summary; `better` orders the runs, `scope` says which runs may be ordered at all."""

    title: str
    value: Callable[[Run], float]
    show: Callable[[float], str]
    better: Callable[[list[float]], float] | None = None
    scope: str = ""
    """"text": same validation text; "tokens": the same tokenizer too; "": always."""
    remark: Callable[[Run], str] | None = None


def final(key: str) -> Callable[[Run], float]:
    """A metric's last value, finite or not; result.json helps out where metrics.jsonl has none."""

    def value(run: Run) -> float:
        known = [row[key] for row in run.rows if is_number(row.get(key))]
        found = known[-1] if known else run.result.get(key.replace("/", "_"))
        return float(found) if is_number(found) else math.nan

    return value


def reached(axis: str) -> Callable[[Run], float]:
    """How far a run came along an axis."""

    def value(run: Run) -> float:
        known = [row[axis] for row in run.rows if is_number(row.get(axis)) and math.isfinite(row[axis])]
        told = run.result.get("steps" if axis == "step" else axis)
        found = known[-1] if known else told
        return float(found) if is_number(found) else math.nan

    return value


def throughput(run: Run) -> float:
    """Tokens a second over the whole run, or as last logged."""
    tokens, seconds = reached("tokens")(run), reached("seconds")(run)
    return tokens / seconds if tokens > 0 and seconds > 0 else final("train/tokens_per_second")(run)


def lowest(run: Run) -> float:
    """The best validation cross-entropy."""
    return min((p.value for p in run.points("val/ce")), default=math.nan)


def lowest_at(run: Run) -> str:
    """Where the best validation cross-entropy was, in words."""
    best = min(run.points("val/ce"), key=lambda p: p.value, default=None)
    return f"at step {best.step:,.0f}" if best else ""


def progress(run: Run) -> str:
    """How much of the planned length was reached, in words; "" where it was all."""
    planned = run.info.get("until", run.config.get("train.steps"))
    done = reached("step")(run)
    return f"of {planned:,} planned" if is_number(planned) and done < planned else ""


COLUMNS = (
    Column("Validation CE, nats", final("val/ce"), lambda v: fixed(v, 4), min, "tokens"),
    Column("Best CE", lowest, lambda v: fixed(v, 4), min, "tokens", lowest_at),
    Column("Perplexity", final("val/ppl"), lambda v: fixed(v, 3), min, "tokens"),
    Column("Bits per byte", final("val/bpb"), lambda v: fixed(v, 4), min, "text"),
    Column("Accuracy", final("val/accuracy"), lambda v: percent(v, 2), max, "tokens"),
    Column("Calibration error", final("val/ece"), lambda v: fixed(v, 4), min, "tokens"),
    Column("Steps", reached("step"), lambda v: fixed(v, 0), remark=progress),
    Column("Tokens", reached("tokens"), compact),
    Column("Training time", reached("seconds"), duration),
    Column("Tokens/s", throughput, lambda v: number(v, 4), max),
)

HEALTH = Column("Health", final(STATUS), health.state_of, remark=health.worst)
"""The summary of runs that were watched has it too."""


def columns(runs: Sequence[Run]) -> tuple[Column, ...]:
    """What the summary of these runs shows."""
    return (*COLUMNS, HEALTH) if any(STATUS in run.logged() for run in runs) else COLUMNS


def differing(runs: Sequence[Run]) -> set[str]:
    """What keeps the runs' validation numbers from being compared: "text", "tokens", both, or nothing."""

    def distinct(values: list[Any]) -> bool:
        return len({json.dumps(v) for v in values}) > 1

    def known(values: list[Any]) -> list[Any]:
        return [v for v in values if v is not None]

    found = set()
    settings = ("data.val_corpus", "data.val_fraction")
    if distinct(known([r.corpus.get("sha256", r.corpus.get("name")) for r in runs])) or any(
        distinct([r.config.get(s) for r in runs if s in r.config]) for s in settings
    ):
        found.add("text")
    if any(distinct(known([r.info.get(key) for r in runs])) for key in ("vocab_size", "tokenizer")):
        found.add("tokens")
    return found


def warnings(runs: Sequence[Run]) -> list[str]:
    """What a reader must know before believing a number."""
    said = []
    several = len(runs) > 1
    for run in runs:
        if run.corpus.get("fallback") is True:
            who = f"{run.name} was trained" if several else "This run was trained"
            said.append(
                f"{who} on the embedded fallback corpus “{words(run.corpus.get('name'))}”, because no corpus "
                "was named and tinyshakespeare could not be had. That text differs between Python versions: "
                "do not compare these numbers with other runs."
            )
    apart = differing(runs)
    if "text" in apart:
        said.append("These runs were validated on different text: do not compare their validation numbers.")
    elif "tokens" in apart:
        said.append("These runs have different tokens: compare bits per byte, not cross-entropy.")
    return said


def notes(runs: Sequence[Run]) -> list[str]:
    """What could not be read, and which runs are not complete."""
    said = []
    for run in runs:
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        said += [prefix + note for note in run.notes]
        if progress(run):
            said.append(f"{prefix}The run reached step {reached('step')(run):,.0f} {progress(run)} steps.")
    return said


def run_heads(runs: Sequence[Run]) -> list[Html]:
    """The runs as column headings: colour and name."""
    return [Html(chip(i, COLOURS) + markup(run.name)) for i, run in enumerate(runs)]


def tiles(run: Run) -> str:
    """The summary of one run."""
    cells = ""
    for column in columns([run]):
        remark = column.remark(run) if column.remark else ""
        value = column.show(column.value(run))
        cells += f"<div><dt>{markup(column.title)}</dt><dd>{markup(value)}"
        cells += f"<small>{markup(remark)}</small></dd></div>"
    return f'<dl class="tiles">{cells}</dl>'


def summary(runs: Sequence[Run]) -> str:
    """The summary of several runs: a row each, the best of every column marked where runs compare."""
    apart = differing(runs)
    shown, cells_of = columns(runs), []
    for column in shown:
        values = [column.value(run) for run in runs]
        known = [v for v in values if math.isfinite(v)]
        blocked = {"text": {"text"}, "tokens": {"text", "tokens"}}.get(column.scope, set()) & apart
        ordered = column.better is not None and len(known) > 1 and not blocked
        cells = []
        for run, value in zip(runs, values, strict=True):
            remark = column.remark(run) if column.remark else ""
            cell = markup(column.show(value)) + (f"<small>{markup(remark)}</small>" if remark else "")
            leading = ordered and column.better is not None and value == column.better(known)
            cells.append(Best(cell) if leading else Html(cell))
        cells_of.append(cells)
    head = ["Run", *(column.title for column in shown)]
    return table("Summary", head, zip(run_heads(runs), *cells_of, strict=True))


def fact(run: Run, key: str) -> object:
    """One entry of config.json besides the settings, in words."""
    value = run.info.get(key)
    if key == "corpus" and isinstance(value, dict):
        short = {k: v for k, v in value.items() if k not in ("name", "fallback")}
        short |= {"sha256": str(value["sha256"])[:HASH_LENGTH]} if "sha256" in value else {}
        fallback = " (embedded fallback)" if value.get("fallback") is True else ""
        return f"{words(value.get('name'))}{fallback}, {words(short)}"
    if key == "git" and isinstance(value, dict):
        dirty = " with uncommitted changes" if value.get("dirty") is True else ""
        return f"{str(value.get('commit') or '—')[:HASH_LENGTH]}{dirty}"
    if key == "tokenizer":
        return words(value)[:HASH_LENGTH]
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value


def facts(runs: Sequence[Run]) -> str:
    """Everything in config.json besides the settings: what ran where."""
    others = {key: None for run in runs for key in run.info if key != "config" and key not in FACTS}
    known = [key for key in FACTS if any(key in run.info for run in runs)]
    rows = [
        [FACT_TITLES.get(key, key.replace("_", " ").capitalize()), *(fact(run, key) for run in runs)]
        for key in [*known, *others]
    ]
    heads = ["", *run_heads(runs)] if len(runs) > 1 else []
    return table("Facts", heads, rows, "text") if rows else ""


def lead(run: Run) -> str:
    """One line under a run's name: preset, corpus, size, machine, commit."""
    size = run.info.get("parameters")
    hardware = run.info.get("hardware")
    if isinstance(hardware, dict) and (chip_name := hardware.get("gpu") or hardware.get("processor")):
        hardware = ", ".join(map(words, filter(None, [chip_name, hardware.get("dtype")])))
    parts = [
        run.info.get("preset") and f"preset {run.info['preset']}",
        run.corpus.get("name"),
        is_number(size) and f"{compact(size)} parameters",
        hardware,
        run.info.get("git") and f"commit {fact(run, 'git')}",
    ]
    return " · ".join(words(part) for part in parts if part)


def ladder_groups(runs: Sequence[Run]) -> dict[tuple[Rung, ...], list[int]]:
    """The distinct n-gram ladders and which runs have them."""
    groups: dict[tuple[Rung, ...], list[int]] = {}
    for i, run in enumerate(runs):
        if run.ladder:
            groups.setdefault(run.ladder, []).append(i)
    return groups


def ladder(runs: Sequence[Run]) -> str:
    """The n-gram ladder, and the evaluation at which each run passed each rung."""
    heads = run_heads(runs)
    said = ""
    for rungs, members in ladder_groups(runs).items():
        over = [heads[i] for i in members] if len(runs) > 1 else ["Passed"]
        rows = [
            [
                f"{rung.context}: {rung_name(rung.context)}",
                fixed(rung.ce, 4),
                percent(rung.accuracy),
                *(passed(runs[i], rung) for i in members),
            ]
            for rung in rungs
        ]
        said += table("N-gram ladder", ["N-gram context", "CE, nats", "Accuracy", *over], rows)
    return said


def passed(run: Run, rung: Rung) -> str:
    """The first evaluations that beat a rung in cross-entropy and in accuracy, in words."""
    below = (p.step for p in run.points("val/ce") if p.value < rung.ce)
    above = (p.step for p in run.points("val/accuracy") if p.value > rung.accuracy)
    by = {"CE": next(below, None), "accuracy": next(above, None)}
    told = [f"in {what} by step {step:,.0f}" for what, step in by.items() if step is not None]
    return ", ".join(told) or "not yet"


def rung_name(context: int) -> str:
    """What statistics with a context of n tokens are called."""
    return {0: "unigram", 1: "bigram", 2: "trigram"}.get(context, f"{context + 1}-gram")


def configuration(runs: Sequence[Run]) -> str:
    """One run: how it differs from the defaults of config.py. Several: where they differ from each other."""
    configs = [run.config for run in runs]
    defaults = flatten(json.loads(json.dumps(Config().to_dict())))
    absent = Html("—")
    if len(runs) == 1:
        rows = [
            [setting(key), setting(value), setting(defaults[key]) if key in defaults else absent]
            for key, value in configs[0].items()
            if key not in HEADINGS and (key not in defaults or defaults[key] != value)
        ]
        head: list[object] = ["Setting", "This run", "Default"]
        same = "Every setting has its default." if configs[0] else "No settings were recorded."
    else:
        keys = {key: None for config in configs for key in config if key not in HEADINGS}
        rows = [
            [setting(key), *(setting(c[key]) if key in c else absent for c in configs)]
            for key in keys
            if len({json.dumps(c.get(key), sort_keys=True) if key in c else "" for c in configs}) > 1
        ]
        head = ["Setting", *run_heads(runs)]
        same = "All settings are equal." if keys else "No settings were recorded."
    body = str(table("Settings that differ", head, rows, "text")) if rows else f"<p>{same}</p>"
    for run in runs:
        for title, record in (("Full configuration", run.info), ("result.json", run.result)):
            if record:
                text = markup(json.dumps(record, indent=2, ensure_ascii=False))
                name = f" of {markup(run.name)}" if len(runs) > 1 else ""
                body += f"<details><summary>{title}{name}</summary><pre>{text}</pre></details>"
    return body
