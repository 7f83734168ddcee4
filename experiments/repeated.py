"""Little text read many times: the best loss along the run, and what becomes of it at the end.

    python -m experiments.repeated                       the first tenth of the training text, 2,000 steps
    python -m experiments.repeated --size 10m --also run.device=cuda train.batch-size=32

Cross-entropy against AvataRL's recipe, which takes its critic from the same share of the text; with the protocol's
model also with windows that this critic writes, --windows beside each of the corpus's. All are tuned by the best
validation loss along the run, one thing after the other: learning rate, dropout, weight decay. Validation is the whole
held-out split. Writes results/repeated/: record.json, runs.jsonl, table.md and figure.svg.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cli import parse, run_main
from config import require
from experiments.figures import curves
from experiments.rivals import ends, falling, regularizers, tuning
from experiments.study import Entry, Row, StudySettings, conduct, publish, stamp
from experiments.tables import CHOICE, LABEL, SECONDS, TRIED, Column, difference, gap_text, gaps, metric, page

SIZES = {
    "protocol": {
        "cross-entropy": "protocol-pretrain",
        "AvataRL": "protocol-avatarl",
        "AvataRL, imagined": "protocol-imagined",
    },
    "10m": {"cross-entropy": "pretrain-char-gpu", "AvataRL": "avatarl-char-gpu"},
}
PRECISION = {"protocol": {"run.dtype": "float32"}, "10m": {}}


@dataclass(frozen=True)
class Settings(StudySettings):
    """A share of the text, read again and again."""

    share: float = 0.1
    """Train on this share of the training split, from its start on."""
    size: Literal["protocol", "10m"] = "protocol"
    """protocol: the protocol's 0.8 M model; 10m: the 10.65 M model with context 256."""
    only: tuple[str, ...] = ()
    """Only those of AvataRL's recipes with these names, and cross-entropy. Unset: all."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Optimiser of all."""
    pace: float = 1.0
    """AvataRL's learning rates as a multiple of cross-entropy's, before anything is tuned."""
    fall: str = ""
    """AvataRL's hand-over, as `experiments.words --falls` writes it. Unset: the presets'."""
    windows: int = 3
    """Windows that the critic writes beside each of the corpus's, where a recipe has any."""
    every: int = 100
    """Steps between evaluations."""
    dropouts: tuple[float, ...] = (0.0, 0.2, 0.4)
    """Dropout probabilities tried."""
    decays: tuple[float, ...] = (1.0, 10.0)
    """Weight decays tried, as multiples of the presets' (both optimisers' are scaled)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.share <= 1, "share", self.share, "use a share above 0, up to 1")
        unknown = set(self.only) - set(SIZES[self.size])
        require(not unknown, "only", self.only, f"use some of {', '.join(SIZES[self.size])}")
        positive = 0 < self.pace < math.inf
        require(positive, "pace", self.pace, "use a factor above 0, such as 0.5")
        if self.fall:
            ends(self.fall, "fall")
        require(self.windows >= 1, "windows", self.windows, "use a positive number, such as 3")
        require(self.every >= 1, "every", self.every, "use a positive number of steps")
        require(len(self.dropouts) > 0, "dropouts", self.dropouts, "name at least one, such as 0")
        require(len(self.decays) > 0, "decays", self.decays, "name at least one, such as 1")
        regularizers(self.dropouts, self.decays)


def entries(settings: Settings) -> list[Entry]:
    """All rivals on the share of the text, without dropout, from the rates that they are told."""
    own: dict[str, Any] = {
        **PRECISION[settings.size],
        "data.train-stop": settings.share,
        "model.dropout": 0.0,
        "optim.name": settings.optimizer,
        "optim.lr": 3e-3,
        "optim.muon-lr": 0.02,
        "eval.every": settings.every,
        "train.checkpoint-every": settings.every,  # so that the best evaluation has its checkpoint
    }
    ours = own | {name: settings.pace * own[name] for name in ("optim.lr", "optim.muon-lr")}
    if settings.fall:
        ours |= falling(*ends(settings.fall, "fall"))
    of_entry = {"cross-entropy": own, "AvataRL": ours}
    imagined = ours | {"method.imagined-windows": settings.windows}
    made = [
        Entry(method, name, of_entry.get(method, imagined), baseline=method == "cross-entropy")
        for method, name in SIZES[settings.size].items()
    ]
    return [entry for entry in made if entry.baseline or not settings.only or entry.label in settings.only]


def at_step(row: Row, base: Row | None) -> str:
    """Where the best evaluations were."""
    return ", ".join(f"{o.best['step']:,}" for o in row.outcomes)


def shown(tuned: bool) -> list[Column]:
    """The columns: the best along the run first, then the end."""
    best = [metric("best CE, nats", "val/ce", "best"), difference("best", "best − baseline's, by seed")]
    there: list[Column] = [("at step, by seed", at_step), metric("ECE there", "val/ece", "best")]
    numbers = [*best, *there, metric("CE at the end", "val/ce"), metric("ECE at the end", "val/ece"), SECONDS]
    return [LABEL, CHOICE, *numbers, TRIED] if tuned else [LABEL, *numbers]


def verdict(rows: Sequence[Row]) -> list[str]:
    """The rivals' best and last losses in sentences."""
    base, *others = rows
    rise = {
        row.entry.label: statistics.mean(o.final["val/ce"] - o.best["val/ce"] for o in row.outcomes) for row in rows
    }
    risen = ", ".join(f"{name} {change:+.4f}" for name, change in rise.items())
    said = []
    for ours in others:
        pair = f"{ours.entry.label} − cross-entropy, nats"
        said.append(f"- Best along the run, {pair}: {gap_text(gaps(ours, base, at='best'))}.")
        said.append(f"- At the end, {pair}: {gap_text(gaps(ours, base))}.")
    return [
        *said,
        f"- From the best to the end the loss changes by (nats, mean over seeds): {risen}.",
    ]


def main(words: Sequence[str]) -> int:
    """Run the study and write its figures; returns the exit code."""
    settings = parse(Settings, words, prog="python -m experiments.repeated", description=__doc__ or "")
    made = stamp("repeated", words)
    knobs = tuning(settings, settings.dropouts, settings.decays)
    rows = conduct(entries(settings), settings, "repeated", knobs, by="best")
    title = f"The first {settings.share:.0%} of the training text, {settings.steps:,} steps, {settings.size} model"
    note = "Choices go by the best validation CE along the run of seed 1, rate first, then dropout, then decay."
    tuned = any(row.choice for row in rows)
    text = page(title, made, settings, rows, shown=shown(tuned), note=note, after=verdict(rows))
    publish(settings, made, rows, text, curves(rows))
    return 0


if __name__ == "__main__":
    run_main(main)
