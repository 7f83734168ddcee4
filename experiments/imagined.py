"""What text of the critic's own is worth beside the corpus's: imagined windows, at equal tokens of the corpus.

    python -m experiments.imagined                       three seeds, 2,000 steps, three imagined windows beside each
    python -m experiments.imagined --windows 1 --only AvataRL --seeds 1 --no-tune

On the protocol of DESIGN section 3. Imagined windows cost what windows cost, so equal tokens are not equal work: beside
cross-entropy and AvataRL without them stands cross-entropy with as many windows a step, all of them from the
corpus, and the imagined text without the critic's vote, read as if it were the corpus's. The column of seconds
compares time. Writes results/imagined/: record.json, runs.jsonl, table.md and figure.svg.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cli import parse, run_main
from config import preset, require
from experiments.figures import curves
from experiments.rivals import HALF, METHODS, NO_SCHEDULES, rival
from experiments.study import Entry, StudySettings, conduct, publish, rate, stamp
from experiments.tables import page, verdicts


@dataclass(frozen=True)
class Settings(StudySettings):
    """AvataRL with text of the critic's own."""

    windows: int = 3
    """Imagined windows beside each window of the corpus."""
    judge: Literal["ngram", "mixed", "suffix"] = "mixed"
    """Who judges and writes."""
    only: tuple[str, ...] = ()
    """Only entries whose label holds one of these words, and the baseline."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.windows >= 1, "windows", self.windows, "use 1 or more")


def entries(settings: Settings) -> list[Entry]:
    """Both methods with and without more windows a step."""
    count, recipe = settings.windows, "protocol-imagined"
    ours = {"critic.kind": settings.judge, "method.imagined-windows": count}
    fade = {"method.imagined-windows-schedule": f"0:{count},0.5:{count},1:0"}
    unjudged = {
        **NO_SCHEDULES,
        "method.imagined-judge": "consensus",
        "method.reality-weight": 1.0,
        "method.critic-weight": 0.0,
        "method.epsilon": 1e-3,
    }
    many = (1 + count) * preset(METHODS["cross-entropy"]).train.batch_size
    made = [
        rival("cross-entropy", HALF),
        rival("cross-entropy", {"train.batch-size": many}, f"cross-entropy, {1 + count} times the corpus's tokens"),
        rival("AvataRL", {"critic.kind": settings.judge}, "AvataRL, none imagined"),
        rival("AvataRL", ours, f"AvataRL, {count} imagined", preset=recipe),
        rival("AvataRL", {**ours, **fade}, f"AvataRL, imagined falling from {count} to none", preset=recipe),
        rival("AvataRL", {**ours, **unjudged}, f"cross-entropy on {count} imagined", preset=recipe),
    ]
    return [e for e in made if e.baseline or not settings.only or any(word in e.label for word in settings.only)]


def main(words: Sequence[str]) -> int:
    """Run the study and write its figures; returns the exit code."""
    settings = parse(Settings, words, prog="python -m experiments.imagined", description=__doc__ or "")
    made = stamp("imagined", words)
    rows = conduct(entries(settings), settings, "imagined", [rate(settings)])
    title = f"Imagined windows, {settings.steps:,} steps of 768 tokens of the corpus"
    ours = [row.entry.label for row in rows if row.entry.label.startswith("AvataRL")]
    publish(settings, made, rows, page(title, made, settings, rows, after=verdicts(rows, ours)), curves(rows))
    return 0


if __name__ == "__main__":
    run_main(main)
