"""How many tokens AvataRL needs to reach the loss that cross-entropy ends at.

    python -m experiments.tokens                         three seeds, 2,000 steps, fractions 0.4 to 1 of them
    python -m experiments.tokens --optimizer adamw --fractions 0.3 0.5 0.7 1
    python -m experiments.tokens --recipe protocol-imagined-long --steps 8000 --fractions 0.5 1

Every fraction is a run of its own with a whole schedule: a curve cut short at a high rate says little about where a
shorter run ends. Between the two fractions where AvataRL's final loss crosses cross-entropy's, tokens are
interpolated on a logarithmic scale, seed by seed. All entries are tuned alike. Writes results/tokens/: record.json,
runs.jsonl, table.md and figure.svg.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from cli import parse, run_main
from config import require
from experiments.figures import Line, chart
from experiments.rivals import HALF, optimizer, rival
from experiments.study import Entry, Row, StudySettings, conduct, of_length, publish, rate, stamp
from experiments.tables import page, spread, values_of


@dataclass(frozen=True)
class Settings(StudySettings):
    """Tokens to reach cross-entropy's final loss."""

    fractions: tuple[float, ...] = (0.4, 0.5, 0.6, 0.75, 1.0)
    """Lengths of AvataRL's runs, as shares of the steps."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Optimiser of both."""
    recipe: Literal["protocol-avatarl", "protocol-imagined", "protocol-imagined-long"] = "protocol-avatarl"
    """AvataRL's preset; an imagined window counts as work, not as tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = len(self.fractions) > 0 and all(0 < f < math.inf for f in self.fractions)
        require(positive, "fractions", self.fractions, "use shares above 0, such as 0.5 0.75 1")


class Crossing(NamedTuple):
    """Where a falling loss meets a target: at `tokens`, before the first point, not at all; or there is no target."""

    tokens: float
    kind: Literal["crossed", "at most", "never", "diverged"]


def crossing(points: Sequence[tuple[float, float]], target: float) -> Crossing:
    """Where (tokens, loss) first comes down to `target`, interpolated in log tokens.

    "at most": the shortest run is there already, `tokens` are its own. "never": `tokens` are the longest run's.
    """
    points = sorted(points)
    if points[0][1] <= target:
        return Crossing(points[0][0], "at most")
    for (before, high), (after, low) in pairwise(points):
        if low <= target < high:
            share = (high - target) / (high - low)
            return Crossing(math.exp(math.log(before) + share * (math.log(after) - math.log(before))), "crossed")
    return Crossing(points[-1][0], "never")


def entries(settings: Settings) -> list[Entry]:
    """Cross-entropy at full length, AvataRL at every fraction of it."""
    own = optimizer(settings.optimizer)
    made = [rival("cross-entropy", {**own, **(HALF if settings.optimizer == "muon" else {})})]
    for fraction in sorted(set(settings.fractions)):
        label = "AvataRL, all the steps" if fraction == 1 else f"AvataRL, {fraction:g} of the steps"
        steps = max(1, round(fraction * settings.steps))
        shorter = of_length(settings.recipe, steps, settings.evaluations)
        made.append(rival("AvataRL", {**own, **shorter}, label, preset=settings.recipe))
    return made


def crossings(base: Row, ours: Sequence[Row]) -> list[Crossing]:
    """For every seed, where AvataRL's final loss meets cross-entropy's of that seed, as shares of its tokens."""
    found = []
    for i, target in enumerate(values_of(base, "val/ce")):
        whole = base.outcomes[i].final["tokens"]
        if not math.isfinite(target):
            found.append(Crossing(math.nan, "diverged"))
            continue
        points = [(row.outcomes[i].final["tokens"] / whole, values_of(row, "val/ce")[i]) for row in ours]
        found.append(crossing([p for p in points if math.isfinite(p[1])] or [(1.0, math.inf)], target))
    return found


def verdict(found: Sequence[Crossing]) -> list[str]:
    """Seed by seed and over all of them, in words."""
    diverged = sum(c.kind == "diverged" for c in found)
    found = [c for c in found if c.kind != "diverged"]
    lost = [f"Cross-entropy diverged in {diverged} seeds, which are left out."] if diverged else []
    if not found:
        return lost
    signs = {"crossed": "", "at most": "≤ ", "never": "> "}
    each = ", ".join(f"{signs[c.kind]}{c.tokens:.3f}" for c in found)
    where = "Share of cross-entropy's tokens at which AvataRL ends at cross-entropy's final loss, by seed"
    said = [*lost, f"{where}: {each}."]
    if all(c.kind == "crossed" for c in found):
        said.append(f"Mean ± standard deviation: {spread([c.tokens for c in found], 3)}.")
    elif all(c.kind != "never" for c in found):
        said.append(f"At most {statistics.mean(c.tokens for c in found):.3f} on average: try smaller fractions.")
    else:
        missed = sum(c.kind == "never" for c in found)
        said.append(f"Not reached within the longest run in {missed} of {len(found)} seeds.")
    return said


def figure(base: Row, ours: Sequence[Row]) -> str:
    """Final losses by tokens trained on: AvataRL's runs, and cross-entropy's end as a level."""
    ends = [(row.outcomes[0].final["tokens"], values_of(row, "val/ce")) for row in ours]
    ends = [(tokens, found) for tokens, found in ends if all(map(math.isfinite, found))]
    level, whole = values_of(base, "val/ce"), base.outcomes[0].final["tokens"]
    left = min([whole, *(tokens for tokens, _ in ends)])
    level_line = Line("cross-entropy's end", [(left, level), (whole, level)] if left < whole else [(whole, level)])
    return chart([Line("AvataRL", ends), level_line][not ends :], "tokens of the run", log_x=True)


def main(words: Sequence[str]) -> int:
    """Run the study and write its figures; returns the exit code."""
    settings = parse(Settings, words, prog="python -m experiments.tokens", description=__doc__ or "")
    made = stamp("tokens", words)
    base, *ours = rows = conduct(entries(settings), settings, "tokens", [rate(settings)])
    title = f"Tokens to reach cross-entropy's final loss, {settings.steps:,} steps of 768 tokens, {settings.optimizer}"
    said = verdict(crossings(base, ours))
    publish(settings, made, rows, page(title, made, settings, rows, after=said), figure(base, ours))
    return 0


if __name__ == "__main__":
    run_main(main)
