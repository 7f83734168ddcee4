"""AvataRL against cross-entropy at equal model, tokens and batches, each at its own best learning rate.

    python -m experiments.protocol                     both optimisers, three seeds, 2,000 steps
    python -m experiments.protocol --seeds 1 --steps 500

The two arms of experiments/compare.py that matter most. Writes results/protocol/: record.json, runs.jsonl (every
run), table.md and figure.svg.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cli import parse, run_main
from config import require
from experiments.figures import dots
from experiments.rivals import METHODS, OPTIMIZERS, optimizer, rival
from experiments.study import Entry, StudySettings, conduct, publish, rate, stamp
from experiments.tables import page, verdicts


@dataclass(frozen=True)
class Settings(StudySettings):
    """The comparison of DESIGN section 3's protocol."""

    optimizers: tuple[str, ...] = OPTIMIZERS
    """Optimisers compared."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = len(self.optimizers) > 0 and set(self.optimizers) <= set(OPTIMIZERS)
        require(known, "optimizers", self.optimizers, "use muon, adamw or both")


def entries(settings: Settings) -> list[Entry]:
    """Both methods with every optimiser."""
    return [rival(method, optimizer(name), group=name) for name in settings.optimizers for method in METHODS]


def main(words: Sequence[str]) -> int:
    """Run the study and write its figures; returns the exit code."""
    settings = parse(Settings, words, prog="python -m experiments.protocol", description=__doc__ or "")
    made = stamp("protocol", words)
    rows = conduct(entries(settings), settings, "protocol", [rate(settings)])
    title = f"AvataRL against cross-entropy, {settings.steps:,} steps of 768 tokens"
    publish(settings, made, rows, page(title, made, settings, rows, after=verdicts(rows)), dots(rows))
    return 0


if __name__ == "__main__":
    run_main(main)
