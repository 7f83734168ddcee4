"""Learning from nothing: every bootstrapping preset as it stands, beside the n-gram ladder.

    python -m experiments.bootstrapping --seeds 2 --jobs 1 --threads 2
    python -m experiments.bootstrapping --only best --seeds 3 --jobs 1 --threads 2

When each run passes which rung (by accuracy and by cross-entropy, in seconds of training), when the health monitor
speaks, how many decisions a second. Times are only worth something with one run at a time. Interrupted, the command
goes on where it was. Writes results/bootstrapping/: record.json, runs.jsonl, table.md and figure.svg (accuracy by
tokens, a line for every rung).
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cli import parse, run_main
from config import PRESETS, require
from config import preset as preset_of
from experiments.arms import Outcome, lines
from experiments.figures import Line, chart
from experiments.study import Entry, Row, StudySettings, conduct, publish, stamp
from experiments.tables import LABEL, SECONDS, Column, metric, page, spread

NAMES = [name for name in PRESETS if name.startswith("bootstrap-")]
RUNGS = (1, 2, 3, 4, 6)
"""Contexts of the rungs in the table: bigram, trigram, 4-gram, 5-gram and 7-gram."""
CONTRASTS: dict[str, tuple[str, dict[str, Any]]] = {
    "exhaustive, weights free of π": ("bootstrap-exhaustive", {"bootstrap.policy-weighting": "reinforce"}),
    "exhaustive, group advantages": ("bootstrap-exhaustive", {"bootstrap.advantage": "group"}),
    "bigrams alone, exact gradient": (
        "bootstrap-exhaustive",
        {
            "bootstrap.exact-weight": 0.0,
            "bootstrap.ngram-weight": 1.0,
            "bootstrap.ngram-orders": "0,1",
            "bootstrap.credit": "raw",
        },
    ),
    "sampled, two inner epochs": ("bootstrap-sampled", {"bootstrap.inner-epochs": 2}),
    "sampled, weak KL": ("bootstrap-sampled", {"bootstrap.kl-coef-schedule": "0:0.1,1:0.1"}),
    "sampled, no guidance": ("bootstrap-sampled", {"bootstrap.guidance-schedule": "0:0,1:0"}),
    "self-play against a twin": ("bootstrap-selfplay", {"bootstrap.opponent": "twin"}),
    "best, gold alone": (
        "bootstrap-best",
        {"bootstrap.exact-weight-schedule": "0:1,1:1", "bootstrap.soft-weight-schedule": "0:0,1:0"},
    ),
    "best, plain n-grams": ("bootstrap-best", {"bootstrap.soft": "ngram", "bootstrap.soft-context": 4}),
}
"""What tells a preset's reason from chance: each with one thing changed."""


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


def own_length(name: str, most: int) -> dict[str, Any]:
    """The preset's own length and rhythm, where a study would set them."""
    config = preset_of(name)
    steps = min(most, config.train.steps)
    return {
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
        Entry(label, name, {**own_length(name, settings.steps), **changes})
        for label, (name, changes) in wanted.items()
        if not settings.only or any(word in label for word in settings.only)
    ]
    require(len(found) > 0, "only", settings.only, f"no entry is called so; there are {', '.join(wanted)}")
    return found


def rungs(outcome: Outcome) -> dict[int, dict[str, float]]:
    """The ladder beside a run: {context: {"ce", "accuracy"}}; empty where it has none."""
    path = outcome.folder / "ladder.json"
    return {int(rung["context"]): rung for rung in json.loads(path.read_text())} if path.is_file() else {}


def passed(outcome: Outcome, context: int) -> float | None:
    """Training seconds at the first evaluation that beats a rung in accuracy and cross-entropy; None: never."""
    rung = rungs(outcome).get(context)
    if rung is None:
        return None
    for e in outcome.evaluations:
        if e["val/accuracy"] >= rung["accuracy"] and e["val/ce"] <= rung["ce"]:
            return float(e["seconds"])
    return None


def noticed(outcome: Outcome) -> int | None:
    """The first step at which the health monitor calls the run bad; None: never."""
    found = [line["step"] for line in lines(outcome.folder, "health/status") if line["health/status"] >= 2]
    return found[0] if found else None


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
    metric("accuracy", "val/accuracy", digits=3),
    of_seeds("best accuracy", lambda o: max(float(e["val/accuracy"]) for e in o.evaluations), 3),
    metric("ECE", "val/ece", digits=3),
    *(rung_column(context) for context in RUNGS),
    of_seeds("called bad at step", noticed),
    of_seeds("decisions/s", rate_of),
    SECONDS,
]


def figure(rows: Sequence[Row]) -> str:
    """Validation accuracy by tokens: a line for every row, mean and band over seeds, and one for every rung."""
    found = []
    for row in rows:
        shared = min(len(o.evaluations) for o in row.outcomes)
        points = [
            (row.outcomes[0].evaluations[i]["tokens"], [float(o.evaluations[i]["val/accuracy"]) for o in row.outcomes])
            for i in range(shared)
        ]
        found.append(Line(row.entry.label, points))
    last = max(x for line in found for x, _ in line.points)
    ladder = rungs(rows[0].outcomes[0])
    for context in RUNGS:
        if context in ladder:
            accuracy = float(ladder[context]["accuracy"])
            found.append(Line(f"context of {context}", [(0.0, [accuracy]), (last, [accuracy])]))
    return chart(found, "tokens trained on", "validation accuracy")


def main(words: Sequence[str]) -> int:
    """Run the study and write its figures; returns the exit code."""
    settings = parse(Settings, words, prog="python -m experiments.bootstrapping", description=__doc__ or "")
    made = stamp("bootstrapping", words)
    rows = conduct(entries(settings), settings, "bootstrapping")
    ladder = rungs(rows[0].outcomes[0])
    said = "; ".join(f"context {n}: {r['accuracy']:.1%}, {r['ce']:.3f} nats" for n, r in ladder.items())
    note = f"The n-gram ladder on the same text: {said}. A rung is passed when accuracy and cross-entropy both beat it."
    text = page("Learning from nothing", made, settings, rows, shown=COLUMNS, note=note)
    publish(settings, made, rows, text, figure(rows))
    return 0


if __name__ == "__main__":
    run_main(main)
