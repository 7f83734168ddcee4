"""Comparisons with cross-entropy on one page, read from what the studies kept; nothing is trained.

    python -m experiments.overview

A line is a study's own row beside its baseline, seed by seed: lines differ in text, length and machine, and so are not
to be compared with each other. Reads results/<study>/runs.jsonl; writes results/overview/: table.md and figure.svg.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cli import parse, run_main
from config import ConfigError
from experiments.arms import ROOT, Arm, Outcome
from experiments.figures import COLOURS, dot, framed, labelled_rows, row_height, stacked, text
from experiments.study import Entry, Row
from experiments.tables import gap_text, gaps, spread, values_of
from files import write_atomic

CROSS_ENTROPY = "cross-entropy"
ROOM = 115.0
"""To the right of the figures, for their legends."""


@dataclass(frozen=True)
class Settings:
    """Where the studies lie, and where the page goes."""

    results: Path = ROOT / "results"
    """Folder of the studies' results."""
    out: Path = ROOT / "results" / "overview"
    """Folder of the page."""


@dataclass(frozen=True)
class Comparison:
    """A row of a study against its cross-entropy."""

    label: str
    study: str
    row: str
    """The row's label in results/<study>/runs.jsonl."""
    group: str = ""
    at: str = "final"
    """The evaluation that is compared, "final" or "best"."""
    rival: tuple[str, str] | None = None
    """Group and label of the cross-entropy that it is compared with. Unset: the one of its own group."""
    timed: bool = True
    """The machine was quiet enough to compare times."""


LONGER = ("2,040 steps", "cross-entropy, 2,040 steps")
CRITIC_ALONE = "distillation from AvataRL's critic"
WORDS = "AvataRL, mixed, w_c 1 → 0.9, w_r 0.1 → 0.4, 2 imagined"
WORDS_PLAIN = "AvataRL, mixed, w_c 1 → 0.6, w_r 0 → 0.6"
COMPARISONS = (
    Comparison("characters, 2,000 steps: imagined text", "imagined", "AvataRL, 3 imagined"),
    Comparison("… no imagined text", "compare", "AvataRL", "muon", timed=False),
    Comparison("… no imagined text, 0.1 M parameters, not 0.8", "sizes", "AvataRL", "2x64", timed=False),
    Comparison("… no imagined text, 2.7 M parameters", "sizes", "AvataRL", "6x192", timed=False),
    Comparison("… the critic imitated, no reality", "compare", CRITIC_ALONE, "muon", timed=False),
    Comparison("… published settings, n-grams", "compare", "published settings, n-gram critic", "muon", timed=False),
    Comparison("characters, imagined text: 600 steps against 2,000", "tokens", "AvataRL, 0.3 of the steps"),
    Comparison("… 1,600 steps against 8,000", "tokens-long", "AvataRL, 0.2 of the steps"),
    Comparison("a tenth of the text, read 7.7 times: at best", "repeated-fall", "AvataRL, imagined", at="best"),
    Comparison("pieces of words, read once: imagined text", "words", WORDS),
    Comparison("… no imagined text", "words-plain", WORDS_PLAIN, timed=False),
    Comparison("… imagined text: 600 steps against 2,040", "words-time", WORDS, rival=LONGER),
    Comparison("pieces of words, read 3.2 times: imagined text", "words-long", WORDS, timed=False),
)


def rows_of(record: Path) -> list[Row]:
    """The rows of a study as its runs.jsonl has them: labels, groups and evaluations; no folders, no tuning.

    Raises ConfigError where the file is not there.
    """
    if not record.is_file():
        raise ConfigError(f"{record} is not there: run its study, whose command is in results/README.md")
    found: dict[tuple[str, str], list[Outcome]] = {}
    for line in map(json.loads, record.read_text(encoding="utf-8").splitlines()):
        if line["role"] != "row":
            continue
        arm = Arm(line["arm"], line["preset"], line["settings"])
        outcome = Outcome(arm, Path(line["run"]), tuple(line["evaluations"]), line["diverged"])
        found.setdefault((line["group"], line["label"]), []).append(outcome)
    return [
        Row(Entry(label, runs[0].arm.preset, group=group, baseline=label == CROSS_ENTROPY), tuple(runs))
        for (group, label), runs in found.items()
    ]


def pair(comparison: Comparison, results: Path) -> tuple[Row, Row]:
    """The row and its cross-entropy. Raises ConfigError where a study lacks either."""
    record = results / comparison.study / "runs.jsonl"
    rows = {(row.entry.group, row.entry.label): row for row in rows_of(record)}
    mine, theirs = (comparison.group, comparison.row), comparison.rival or (comparison.group, CROSS_ENTROPY)
    for group, label in (mine, theirs):
        if (group, label) not in rows:
            raise ConfigError(f"{record} has no row {label!r} in the group {group!r}")
    return rows[mine], rows[theirs]


Pairs = Sequence[tuple[Comparison, Row, Row]]


def ratio(row: Row, base: Row, key: str, at: str) -> str:
    """The row's mean of a metric over its baseline's."""
    mine, theirs = (statistics.mean(values_of(r, key, at)) for r in (row, base))
    return f"{mine / theirs:.2f}" if theirs > 0 and math.isfinite(mine) else "—"


def errors(row: Row, base: Row, at: str) -> str:
    """Both calibration errors and their ratio: "0.0097 of 0.0240: 0.40"."""
    mine, theirs = (statistics.mean(values_of(r, "val/ece", at)) for r in (row, base))
    return f"{mine:.4f} of {theirs:.4f}: {ratio(row, base, 'val/ece', at)}"


def line(comparison: Comparison, row: Row, base: Row) -> str:
    """A comparison as a line of the table."""
    at = comparison.at
    tokens = row.outcomes[0].final["tokens"] / base.outcomes[0].final["tokens"]
    cells = [comparison.label, spread(values_of(base, "val/ce", at)), spread(values_of(row, "val/ce", at))]
    cells += [gap_text(gaps(row, base, at=at)), errors(row, base, at), f"{tokens:.2g}"]
    cells += [ratio(row, base, "seconds", "final") if comparison.timed else "not compared"]
    return "| " + " | ".join([*cells, f"[{comparison.study}](../{comparison.study}/table.md)"]) + " |"


COLUMNS = (
    "",
    "cross-entropy, nats",
    "AvataRL, nats",
    "difference, by seed",
    "calibration error, of cross-entropy's: times",
    "tokens, times",
    "training time, times",
    "study",
)


def table(pairs: Pairs) -> str:
    """The page in Markdown."""
    return "\n".join(
        [
            "# AvataRL against cross-entropy, study by study",
            "",
            "`python -m experiments.overview`, from what the studies kept. The last column names the study whose page",
            "has command, machine, commit, tuning and all rows. Losses on validation text and their differences, seed",
            "by seed: mean ± standard deviation. Lines differ in text, length and machine: read each by itself.",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|---" * len(COLUMNS) + "|",
            *(line(*each) for each in pairs),
            "",
        ]
    )


def figure(pairs: Pairs) -> str:
    """Differences of every seed around zero, and both methods' calibration errors."""
    return stacked(
        {
            "Validation loss minus cross-entropy's, a dot for every seed": differences(pairs),
            "Calibration error, means over seeds": calibration(pairs),
        }
    )


MINE, THEIRS = COLOURS[:2]


def differences(pairs: Pairs) -> str:
    """Dots beside the line of zero: to its left AvataRL has the lower loss."""
    found = [gaps(row, base, at=c.at) for c, row, base in pairs]
    plot, height, parts = labelled_rows([c.label for c, *_ in pairs], [*found, [0.0]], "nats", ROOM)
    parts.append(f'<path d="M{plot.x(0):.1f} 6V{height - 40:g}" stroke="{THEIRS}" stroke-width="1.5"/>')
    parts += [dot(plot.x(v), row_height(i), MINE) for i, values in enumerate(found) for v in values]
    parts.append(text(plot.x(0) + 6, 14, CROSS_ENTROPY, fill=THEIRS))
    return framed(parts, plot.left + plot.width + ROOM, height)


def calibration(pairs: Pairs) -> str:
    """Both methods' errors on one scale from zero, joined."""
    found = [[statistics.mean(values_of(r, "val/ece", c.at)) for r in each] for c, *each in pairs]
    plot, height, parts = labelled_rows([c.label for c, *_ in pairs], [*found, [0.0]], "ECE", ROOM)
    for i, (mine, theirs) in enumerate(found):
        y = row_height(i)
        parts.append(f'<path d="M{plot.x(mine):.1f} {y}H{plot.x(theirs):.1f}" stroke="#888" stroke-width="2"/>')
        parts += [dot(plot.x(mine), y, MINE), dot(plot.x(theirs), y, THEIRS)]
    at = plot.left + plot.width + 14
    parts += [text(at, 25, "AvataRL", fill=MINE), text(at, 43, CROSS_ENTROPY, fill=THEIRS)]
    return framed(parts, plot.left + plot.width + ROOM, height)


def main(words: Sequence[str]) -> int:
    """Write the page; returns the exit code."""
    settings = parse(Settings, words, prog="python -m experiments.overview", description=__doc__ or "")
    pairs = [(c, *pair(c, settings.results)) for c in COMPARISONS]
    settings.out.mkdir(parents=True, exist_ok=True)
    write_atomic(settings.out / "table.md", table(pairs))
    write_atomic(settings.out / "figure.svg", figure(pairs))
    print(f"{table(pairs)}\n{settings.out}")
    return 0


if __name__ == "__main__":
    run_main(main)
