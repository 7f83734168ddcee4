"""Learning from nothing: every bootstrapping preset as it stands, beside the n-gram ladder.

    python -m experiments.bootstrapping --seeds 2 --jobs 1 --threads 2
    python -m experiments.bootstrapping --only best --seeds 3 --jobs 1 --threads 2

When each run passes which rung (by accuracy and by cross-entropy, in seconds of training), when the health monitor
speaks, how many decisions a second; and what the runs are there to show, each claim with its figures
(bootstrap_facts.py). Times are only worth something with one run at a time. Interrupted, the command goes on where it
was. Writes results/bootstrapping/: record.json, runs.jsonl, table.md; figure.svg (accuracy of the presets by tokens, a
line for every rung), collapse.svg (cross-entropy where policies collapse), growth.svg and confidence.svg (expected
reward, accuracy, plain mean of the rewards).
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cli import parse, run_main
from config import PRESETS, require
from config import preset as preset_of
from experiments.arms import Outcome, lines
from experiments.bootstrap_facts import curve, noticed, passed, rungs, told
from experiments.figures import Line, chart, finite
from experiments.study import Entry, Row, StudySettings, conduct, publish, stamp
from experiments.tables import LABEL, SECONDS, Column, metric, page, spread
from files import write_atomic

NAMES = [name for name in PRESETS if name.startswith("bootstrap-")]
RUNGS = (1, 2, 3, 4, 6)
"""Contexts of the rungs in the table: bigram, trigram, 4-gram, 5-gram and 7-gram."""
CONTRASTS: dict[str, tuple[str, dict[str, Any]]] = {
    "exhaustive, weights free of π": ("bootstrap-exhaustive", {"bootstrap.policy-weighting": "reinforce"}),
    "bigrams alone, exact gradient": (
        "bootstrap-exhaustive",
        {
            "bootstrap.exact-weight": 0.0,
            "bootstrap.ngram-weight": 1.0,
            "bootstrap.ngram-orders": "0,1",
            "bootstrap.credit": "raw",
        },
    ),
    "sampled, no guidance": ("bootstrap-sampled", {"bootstrap.guidance-schedule": "0:0,1:0"}),
    "sampled, weak KL": ("bootstrap-sampled", {"bootstrap.kl-coef-schedule": "0:0.1,1:0.1"}),
    "self-play, no opponent": ("bootstrap-selfplay", {"bootstrap.opponent": "none"}),
    "best, gold alone": (
        "bootstrap-best",
        {"bootstrap.exact-weight-schedule": "0:1,1:1", "bootstrap.soft-weight-schedule": "0:0,1:0"},
    ),
    "best, plain n-grams": ("bootstrap-best", {"bootstrap.soft": "ngram", "bootstrap.soft-context": 4}),
    "best, three times as long": ("bootstrap-best", {"train.steps": 2700}),
}
"""What tells a preset's reason from chance: each with one thing changed. FACTS say which claims need them."""


@dataclass(frozen=True)
class Settings(StudySettings):
    """The bootstrapping presets beside the n-gram ladder."""

    steps: int = 100_000
    """Optimiser steps at most; the presets have fewer of their own."""
    seeds: int = 2
    """Seeds of every preset, from 1 on."""
    tune: bool = False
    """Never: the presets stand as they are."""
    jobs: int = 1
    """Runs at a time; more make the seconds worthless."""
    threads: int = 2
    """CPU threads of each run."""
    contrasts: bool = True
    """Also train what differs from a preset in one thing."""
    only: tuple[str, ...] = ()
    """Only entries whose label holds one of these words."""


def own_length(name: str, changes: Mapping[str, Any], most: int) -> dict[str, Any]:
    """The changes with the preset's own length, unless they say another, and rhythm, where a study would set them."""
    config = preset_of(name)
    steps = min(most, changes.get("train.steps", config.train.steps))
    return {
        **changes,
        "train.steps": steps,
        "optim.warmup-steps": min(config.optim.warmup_steps, max(1, steps // 10)),
        "eval.every": config.eval.every,
        "eval.ladder": config.eval.ladder,
        "eval.sample-tokens": config.eval.sample_tokens,
    }


def entries(settings: Settings) -> list[Entry]:
    """Every preset, then the contrasts. Raises ConfigError where `only` leaves none."""
    named = {name.removeprefix("bootstrap-"): (name, dict[str, Any]()) for name in NAMES}
    wanted = {**named, **(CONTRASTS if settings.contrasts else {})}
    found = [
        Entry(label, name, own_length(name, changes, settings.steps))
        for label, (name, changes) in wanted.items()
        if not settings.only or any(word in label for word in settings.only)
    ]
    require(len(found) > 0, "only", settings.only, f"no entry is called so; there are {', '.join(wanted)}")
    return found


def rate_of(outcome: Outcome) -> float:
    """Median decisions per second."""
    key = "bootstrap/decisions_per_second"
    return statistics.median(line[key] for line in lines(outcome.folder, key))


def of_seeds(title: str, value: Callable[[Outcome], float | None], digits: int = 0) -> Column:
    """A number of every seed; a dash where none has it, and how many have where not all do."""

    def cell(row: Row, base: Row | None) -> str:
        values = [value(o) for o in row.outcomes]
        found = [v for v in values if v is not None]
        part = f" ({len(found)} of {len(values)})" if len(found) < len(values) else ""
        return spread(found, digits) + part if found else "—"

    return title, cell


def rung_column(context: int) -> Column:
    """When a rung was passed."""
    return of_seeds(f"past context {context}, s", lambda outcome: passed(outcome, context), 1)


COLUMNS: list[Column] = [
    LABEL,
    metric("val CE, nats", "val/ce"),
    metric("best CE", "val/ce", at="best"),
    metric("accuracy", "val/accuracy", digits=3),
    of_seeds("best accuracy", lambda o: max(float(e["val/accuracy"]) for e in o.evaluations), 3),
    metric("ECE", "val/ece", digits=3),
    *(rung_column(context) for context in RUNGS),
    of_seeds("called bad at step", noticed),
    of_seeds("decisions/s", rate_of),
    SECONDS,
]


def figure(rows: Sequence[Row]) -> str:
    """Validation accuracy of the presets by tokens, mean and band over seeds, and a line for every rung."""
    shown = [row for row in rows if row.entry.label not in CONTRASTS] or list(rows)
    found = [line(row.entry.label, row, "val/accuracy") for row in shown]
    last, ladder = max(x for shown_line in found for x, _ in shown_line.points), rungs(rows[0].outcomes[0])
    for context in RUNGS:
        if context in ladder:
            accuracy = float(ladder[context]["accuracy"])
            found.append(Line(f"context of {context}", [(0.0, [accuracy]), (last, [accuracy])]))
    return chart(found, "tokens trained on", "validation accuracy")


def line(label: str, row: Row, key: str) -> Line:
    """A logged number of a row by tokens, as far as all of its seeds have it."""
    seeds = [curve(o.folder, key) for o in row.outcomes]
    together = zip(*seeds, strict=False)
    return Line(label, finite([(points[0][0], [v for _, v in points]) for points in together]))


COLLAPSING = ("exhaustive", "exhaustive, weights free of π", "bigrams alone, exact gradient", "confidence")
REWARDED = {
    "train/reward": "expected reward",
    "val/accuracy": "accuracy",
    "bootstrap/reward_mean": "plain mean of rewards",
}


def facts_figures(rows: Sequence[Row]) -> dict[str, str]:
    """Further figures, by file name: where policies collapse, and what tells of growth; those that have entries."""
    by_label = {row.entry.label: row for row in rows}
    falling = [line(label, by_label[label], "val/ce") for label in COLLAPSING if label in by_label]
    found = {"collapse.svg": chart(falling, "tokens trained on")} if falling else {}
    for label, name in (("exhaustive, weights free of π", "growth.svg"), ("confidence", "confidence.svg")):
        if label in by_label:
            told_by = [line(said, by_label[label], key) for key, said in REWARDED.items()]
            found[name] = chart(told_by, "tokens trained on", label)
    return found


def main(words: Sequence[str]) -> int:
    """Run the study and write its figures; returns the exit code."""
    settings = parse(Settings, words, prog="python -m experiments.bootstrapping", description=__doc__ or "")
    made = stamp("bootstrapping", words)
    rows = conduct(entries(settings), settings, "bootstrapping")
    ladder = rungs(rows[0].outcomes[0])
    said = "; ".join(f"context {n}: {r['accuracy']:.1%}, {r['ce']:.3f} nats" for n, r in ladder.items())
    note = f"The n-gram ladder on the same text: {said}. A rung is passed when accuracy and cross-entropy both beat it."
    text = page("Learning from nothing", made, settings, rows, shown=COLUMNS, note=note, after=told(rows))
    out = publish(settings, made, rows, text, figure(rows))
    for name, drawn in facts_figures(rows).items():
        write_atomic(out / name, drawn)
    return 0


if __name__ == "__main__":
    run_main(main)
