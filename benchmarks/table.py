"""A table of timings: raw numbers as they go to JSON, and what is said of them in Markdown.

Ratios are taken round by round, between timings that were made within moments of each other, and their median
counts: a machine that slows down for a minute slows both sides of a ratio.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from reporting.numbers import compact, fixed, number, percent
from training.plan import human


@dataclass
class Row:
    """One arm: how long its unit of work took in each round, and what it needed."""

    name: str
    baselines: list[str] = field(default_factory=list)
    """Arms of the same table that it is compared with."""
    seconds: list[float] = field(default_factory=list)
    """Of one unit of work, one value a round."""
    first_seconds: float | None = None
    """Of the very first call, compilation included."""
    memory: int | None = None
    """Bytes at the worst moment of a call, beyond what is held between calls; None where nothing tells."""
    held: int | None = None
    """Bytes held between calls: weights, optimiser state, critic (GPU only)."""
    flops: float = 0.0
    """Matrix-product FLOPs of a unit of work; 0: not counted."""
    peak: float = 0.0
    """FLOP/s of a large matrix product in the same precision, measured here."""
    precision: str = ""
    """Type of the matrix products, and torch's float32 precision."""
    failed: str = ""
    """Why there are no timings."""

    @property
    def bytes(self) -> int | None:
        """Peak memory: what is held and what a call adds."""
        return None if self.memory is None else self.memory + (self.held or 0)


@dataclass
class Table:
    """Arms timed together."""

    title: str
    unit: str = ""
    """What `work` counts, such as tokens; empty: no rate is shown."""
    work: float = 0.0
    """Units that one call of an arm does."""
    repeats: int = 1
    """Calls behind one value of `Row.seconds`, which is their mean."""
    reference: str = ""
    """The arm whose speed is 1 in the column of speeds; empty: no such column."""
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """Shapes and settings."""
    notes: list[str] = field(default_factory=list)
    """Sentences under the table."""
    failed: str = ""
    """What went wrong; bench.py then exits with 1."""

    def row(self, name: str) -> Row:
        """The arm of that name."""
        return next(r for r in self.rows if r.name == name)

    def ratios(self, name: str, baseline: str) -> list[float]:
        """Time of arm `name` over that of `baseline`, round by round; empty where one of them failed."""
        return [a / b for a, b in zip(self.row(name).seconds, self.row(baseline).seconds, strict=False)]

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Table":
        """Inverse of dataclasses.asdict."""
        return Table(**values | {"rows": [Row(**r) for r in values["rows"]]})


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, interpolated; NaN for no values."""
    if not values:
        return math.nan, math.nan, math.nan
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def spread(values: Sequence[float], digits: int = 3) -> str:
    """ "12.1 (11.9 to 12.6)": median and quartiles."""
    low, middle, high = (number(v, digits) for v in quartiles(values))
    return f"{middle} ({low} to {high})"


def ratio_text(values: Sequence[float]) -> str:
    """ "1.04 (1.03 to 1.06)": median and quartiles of ratios, two decimals where they are near 1."""
    low, middle, high = (fixed(v, 3 if v < 1.995 else 2) for v in quartiles(values))
    return f"{middle} ({low} to {high})"


def markdown(table: Table) -> str:
    """A title, the arms as a table with the columns that say something, and the notes."""
    lines = [f"### {table.title}", ""]
    if table.rows:
        columns = {name: cells for name, cells in _columns(table).items() if any(cells)}
        lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(cells)} |" for cells in zip(*columns.values(), strict=True)]
        rounds = max(len(r.seconds) for r in table.rows)
        calls = f", each the mean of {table.repeats} calls" if table.repeats > 1 else ""
        lines += ["", f"{rounds} rounds{calls}; medians, quartiles in brackets."]
        if peaks := {r.precision: f"{r.precision} {human(r.peak, 'FLOP/s')}" for r in table.rows if r.peak}:
            lines[-1] += f" Measured peak of matrix products: {'; '.join(peaks.values())}."
    lines += [f"- {note}" for note in table.notes]
    if table.failed:
        lines.append(f"- **failed**: {table.failed}")
    return "\n".join(lines) + "\n"


def _columns(table: Table) -> dict[str, list[str]]:
    """Every column that a table may have, a cell for each arm; empty cells where nothing is known."""
    rows = table.rows
    medians = [quartiles(r.seconds)[1] for r in rows]
    shares = [r.flops / m / r.peak if r.peak and m == m else 0.0 for r, m in zip(rows, medians, strict=True)]
    speed = [""] * len(rows)
    if table.reference:
        speed = [_cell(1 / quartiles(table.ratios(r.name, table.reference))[1]) for r in rows]
    return {
        "arm": [r.name for r in rows],
        "ms": [spread([1e3 * s for s in r.seconds]) if r.seconds else f"failed: {r.failed}" for r in rows],
        f"{table.unit}/s": [compact(table.work / m) if table.unit and m == m else "" for m in medians],
        f"speed, {table.reference} = 1": speed,
        "time ratio": [_ratio_cell(table, r) for r in rows],
        "peak memory, MB": ["" if r.bytes is None else fixed(r.bytes / 1e6, 0 if r.bytes > 1e8 else 1) for r in rows],
        "memory ratio": [_memory_cell(table, r) for r in rows],
        "of the matmul peak": [percent(s) if s else "" for s in shares],
        "products in": [r.precision for r in rows],
    }


def _cell(value: float) -> str:
    return fixed(value, 2) if math.isfinite(value) else ""


def _ratio_cell(table: Table, row: Row) -> str:
    """The ratio to each baseline, with its name where the row has several or the table several baselines."""
    names = {b for r in table.rows for b in r.baselines}
    cells = []
    for baseline in row.baselines:
        if values := table.ratios(row.name, baseline):
            cells.append(ratio_text(values) + (f" of {baseline}" if len(names) > 1 else ""))
    return "; ".join(cells)


def _memory_cell(table: Table, row: Row) -> str:
    """Peak memory over that of the first baseline."""
    if not row.baselines or row.bytes is None:
        return ""
    other = table.row(row.baselines[0]).bytes
    return fixed(row.bytes / other, 2) if other else ""
