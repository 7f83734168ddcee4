"""Whether the gap to cross-entropy lasts as the model grows: a ladder of sizes at equal steps and batches.

    python -m experiments.sizes                          2x64, 4x128, 6x192 and 6x384, both methods, tuned
    python -m experiments.sizes --sizes 2x64 4x128 --seeds 1 --steps 500

A size is layers x width; heads are 32 wide. Writes results/sizes/: record.json, runs.jsonl, table.md and figure.svg.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cli import parse, run_main
from config import ConfigError, require
from experiments.figures import Line, chart, finite
from experiments.rivals import METHODS, optimizer, rival
from experiments.study import Entry, Row, StudySettings, conduct, publish, rate, stamp
from experiments.tables import page, values_of, verdicts

HEAD_WIDTH = 32


@dataclass(frozen=True)
class Settings(StudySettings):
    """Both methods from small to large."""

    sizes: tuple[str, ...] = ("2x64", "4x128", "6x192", "6x384")
    """Models, as layers x width."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Optimiser of both."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.sizes) > 0, "sizes", self.sizes, "name at least one, such as 4x128")
        for size in self.sizes:
            layers_and_width(size)


def layers_and_width(size: str) -> tuple[int, int]:
    """ "4x128" → (4, 128). Raises ConfigError for anything else, or a width that 32 does not divide."""
    layers, _, width = size.partition("x")
    if not (layers.isdigit() and width.isdigit()):
        raise ConfigError(f"sizes = {size!r}: write layers x width, such as 4x128")
    require(int(layers) > 0, "sizes", size, "use at least one layer")
    divides = int(width) > 0 and int(width) % HEAD_WIDTH == 0
    require(divides, "sizes", size, f"heads are {HEAD_WIDTH} wide; use a multiple of that")
    return int(layers), int(width)


def entries(settings: Settings) -> list[Entry]:
    """Both methods at every size; a size is a group."""
    made = []
    for size in settings.sizes:
        layers, width = layers_and_width(size)
        shape = {"model.n-layer": layers, "model.n-embd": width, "model.n-head": width // HEAD_WIDTH}
        made += [rival(m, {**optimizer(settings.optimizer), **shape}, group=size) for m in METHODS]
    return made


def parameters(row: Row) -> int:
    """The model's parameters, as its run recorded them."""
    return int(json.loads((row.outcomes[0].folder / "config.json").read_text())["parameters"])


def figure(rows: Sequence[Row]) -> str:
    """Final losses by parameters."""
    lines = []
    for method in METHODS:
        ours = sorted((parameters(r), values_of(r, "val/ce")) for r in rows if r.entry.label == method)
        lines.append(Line(method, finite([(float(count), found) for count, found in ours])))
    return chart([line for line in lines if line.points], "parameters", log_x=True)


def main(words: Sequence[str]) -> int:
    """Run the study and write its figures; returns the exit code."""
    settings = parse(Settings, words, prog="python -m experiments.sizes", description=__doc__ or "")
    made = stamp("sizes", words)
    rows = conduct(entries(settings), settings, "sizes", [rate(settings)])
    title = f"The gap by size of the model, {settings.steps:,} steps of 768 tokens, {settings.optimizer}"
    counts = {row.entry.group: parameters(row) for row in rows}
    note = "Parameters: " + ", ".join(f"{size} {count:,}" for size, count in counts.items()) + "."
    text = page(title, made, settings, rows, note=note, after=verdicts(rows))
    publish(settings, made, rows, text, figure(rows))
    return 0


if __name__ == "__main__":
    run_main(main)
