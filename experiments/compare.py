"""AvataRL's recipe against what else could be done with the same tokens and critic, each at its best learning rate.

    python -m experiments.compare                         both optimisers, three seeds, 2,000 steps
    python -m experiments.compare --seeds 1 --steps 500 --optimizers muon
    python -m experiments.compare --equal-time            then the slower ones again within the baseline's time

On the protocol of DESIGN section 3: cross-entropy; label smoothing; distillation, which imitates AvataRL's critic and
hears of reality only where nobody proposed gold; the method with its published settings and an n-gram critic;
AvataRL's recipe, the preset protocol-avatarl. Writes results/compare/: record.json, runs.jsonl, table.md and
figure.svg.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cli import parse, run_main
from config import require
from experiments.figures import curves
from experiments.rivals import DISTILLATION, NGRAM, OPTIMIZERS, PUBLISHED, optimizer, rival
from experiments.study import Entry, Row, StudySettings, at_equal_time, conduct, publish, rate, stamp
from experiments.tables import columns, markdown, on_the_clock, page, verdicts


@dataclass(frozen=True)
class Settings(StudySettings):
    """AvataRL and its rivals at equal tokens."""

    optimizers: tuple[str, ...] = OPTIMIZERS
    """Optimisers compared; each is a table of its own."""
    smoothing: tuple[float, ...] = (0.05, 0.1)
    """Label smoothing of cross-entropy: the shares tried, an entry each."""
    equal_time: bool = False
    """Train what is slower than cross-entropy once more, with as many steps as fit into cross-entropy's time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = len(self.optimizers) > 0 and set(self.optimizers) <= set(OPTIMIZERS)
        require(known, "optimizers", self.optimizers, "use muon, adamw or both")


def entries(settings: Settings) -> list[Entry]:
    """Every rival with every optimiser."""
    made: list[Entry] = []
    for name in settings.optimizers:
        own = optimizer(name)
        made.append(rival("cross-entropy", own, group=name))
        for share in settings.smoothing:
            smoothed = {**own, "train.label-smoothing": share}
            made.append(rival("cross-entropy", smoothed, f"label smoothing {share:g}", group=name))
        made.append(rival("AvataRL", {**own, **DISTILLATION}, "distillation from AvataRL's critic", group=name))
        made.append(rival("AvataRL", {**own, **PUBLISHED, **NGRAM}, "published settings, n-gram critic", group=name))
        made.append(rival("AvataRL", own, group=name))
    return made


def equal_time(rows: Sequence[Row], settings: Settings) -> tuple[list[Row], list[str]]:
    """The slower rows again within their baseline's time, and what to say of them."""
    again = replace(settings, tune=False, also=())  # the entries hold all that was chosen
    bases = [row for row in rows if row.entry.baseline]
    shorter = conduct(at_equal_time(rows, settings), again, "compare")
    said = ["# At equal wall time", ""]
    said += ["Slower entries with fewer steps and a schedule of that length, at the rate chosen above.", ""]
    said += markdown([*bases, *shorter], columns(tuned=False)) + on_the_clock(rows)
    return shorter, said


def main(words: Sequence[str]) -> int:
    """Run the study and write its figures; returns the exit code."""
    settings = parse(Settings, words, prog="python -m experiments.compare", description=__doc__ or "")
    made = stamp("compare", words)
    rows = conduct(entries(settings), settings, "compare", [rate(settings)])
    shorter, said = equal_time(rows, settings) if settings.equal_time else ([], [])
    title = f"AvataRL and its rivals, {settings.steps:,} steps of 768 tokens"
    text = page(title, made, settings, rows, after=[*verdicts(rows, ["AvataRL"]), "", *said])
    publish(settings, made, [*rows, *shorter], text, curves(rows))
    return 0


if __name__ == "__main__":
    run_main(main)
