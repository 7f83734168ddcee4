"""Figures of the studies as SVG: curves with a band over seeds, dots for every seed, reliability diagrams."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import NamedTuple

from experiments.study import Row
from experiments.tables import curve, values_of
from reporting.charts import spread as pushed_apart
from reporting.numbers import compact, log_ticks, ticks

COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#0e7490", "#be185d", "#65a30d", "#475569", "#ca8a04", "#000000")
LETTER = 7.2
"""Width of an average letter at 13 pixels."""


class Line(NamedTuple):
    """A labelled curve: (x, one value for every seed) from left to right."""

    label: str
    points: list[tuple[float, list[float]]]


@dataclass(frozen=True)
class Plot:
    """The frame of a chart in SVG units, and its ranges."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log_x: bool = False
    left: float = 62
    top: float = 16
    width: float = 470
    height: float = 300
    margin: float = 240
    """Room for labels on the right."""

    def x(self, value: float) -> float:
        low, high, at = (math.log(v) if self.log_x else v for v in (*self.x_range, value))
        return self.left + self.width * (at - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.top + self.height * (high - value) / (high - low)

    def wrapped(self, body: Sequence[str], x_title: str, y_title: str) -> str:
        """The whole SVG around what is drawn inside."""
        right, base = self.left + self.width, self.top + self.height
        size = f"{right + self.margin:g} {base + 46:g}"
        marks = log_ticks(*self.x_range) if self.log_x else ticks(*self.x_range, 5)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" font-size="13">',
            f'<rect width="{right + self.margin:g}" height="{base + 46:g}" fill="white"/>',
            f'<clipPath id="frame"><rect x="{self.left - 6:g}" y="{self.top - 6:g}" width="{self.width + 12:g}" '
            f'height="{self.height + 12:g}"/></clipPath>',
        ]
        for value in ticks(*self.y_range, 6):
            y = self.y(value)
            parts.append(f'<path d="M{self.left:g} {y:.1f}H{right:g}" stroke="#ddd"/>')
            parts.append(text(self.left - 8, y + 4, f"{value:.4g}", "end", "#555"))
        parts += [text(self.x(v), base + 18, compact(v), "middle", "#555") for v in marks]
        parts.append(f'<path d="M{self.left:g} {base:g}H{right:g}" stroke="#555"/>')
        parts.append(text((self.left + right) / 2, base + 38, x_title, "middle", "#555"))
        turn = f'transform="rotate(-90 14 {self.top + self.height / 2:g})"'
        parts.append(text(14, self.top + self.height / 2, y_title, "middle", "#555", turn))
        return "\n".join([*parts, *body, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, anchor: str = "start", fill: str = "#222", more: str = "") -> str:
    """A piece of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" {more}>{escape(words)}</text>'


def curves(rows: Sequence[Row]) -> str:
    """Validation CE of every row by tokens: mean and band over seeds, a dot for the end of every seed.

    Groups stand below each other. The first two fifths of the way decide nothing about the height of a frame.
    """
    groups = dict.fromkeys(row.entry.group for row in rows)
    drawn = {}
    for group in groups:
        lines = [Line(row.entry.label, finite(curve(row, "tokens"))) for row in rows if row.entry.group == group]
        drawn[group] = chart([line for line in lines if line.points], "tokens trained on")
    return stacked(drawn) if len(drawn) > 1 else next(iter(drawn.values()), chart([], "tokens trained on"))


def finite(points: list[tuple[float, list[float]]]) -> list[tuple[float, list[float]]]:
    """The points whose values are all finite."""
    return [(x, values) for x, values in points if all(map(math.isfinite, values))]


def chart(
    lines: Sequence[Line],
    x_title: str,
    y_title: str = "validation CE, nats",
    log_x: bool = False,
    whole: bool = False,
) -> str:
    """Lines through the means of their points, with a band from the lowest to the highest seed and dots at the end.

    The height is for what comes after the first 40 %, as losses fall, or where log_x or `whole` for all of it.
    """
    if not lines:
        return Plot((0, 1), (0, 1)).wrapped([], x_title, y_title)
    ends = [x for line in lines for x, _ in line.points]
    first, last = (min(ends) if log_x else 0.0), max(ends)
    first, last = (first, last) if last > first else (0.9 * first, 1.1 * last + 1)
    settled = [v for line in lines for v in late(line, 0.0 if log_x or whole else 0.4)]
    low, high = min(settled), max(settled)
    pad = 0.05 * (high - low) or 0.05
    room = 30 + LETTER * max(len(said(line)) for line in lines)
    plot = Plot((first, last), (low - pad, high + pad), log_x, margin=room)
    drawn = sorted(enumerate(lines), key=lambda pair: -statistics.mean(pair[1].points[-1][1]))  # from the top down
    heights = pushed_apart([plot.y(statistics.mean(line.points[-1][1])) for _, line in drawn], 16)
    below = max(0.0, heights[-1] - (plot.top + plot.height + 40))  # labels that a crowd pushed out of the picture
    body = []
    for (i, line), at in zip(drawn, [height - below for height in heights], strict=True):
        body += one_line(line, plot, COLOURS[i % len(COLOURS)], at)
    return plot.wrapped(body, x_title, y_title)


def late(line: Line, share: float) -> list[float]:
    """All values of a line from a share of its own length on."""
    return [v for x, values in line.points for v in values if x >= share * line.points[-1][0]]


def said(line: Line) -> str:
    """A line's label and where it ends."""
    return f"{line.label}: {statistics.mean(line.points[-1][1]):.3f}"


def one_line(line: Line, plot: Plot, colour: str, label_at: float) -> list[str]:
    """A line's band, mean, final dots and label."""
    xs = [plot.x(x) for x, _ in line.points]
    means = [plot.y(statistics.mean(values)) for _, values in line.points]
    lows = [plot.y(min(values)) for _, values in line.points]
    highs = [plot.y(max(values)) for _, values in line.points]
    around = [*zip(xs, highs, strict=True), *zip(xs[::-1], lows[::-1], strict=True)]
    outline, middle = (
        " ".join(f"{x:.1f},{y:.1f}" for x, y in points) for points in (around, zip(xs, means, strict=True))
    )
    clip, right = 'clip-path="url(#frame)"', plot.left + plot.width
    parts = [
        f'<polygon points="{outline}" fill="{colour}" fill-opacity="0.15" {clip}/>',
        f'<polyline points="{middle}" fill="none" stroke="{colour}" stroke-width="1.8" {clip}/>',
        f'<path d="M{xs[-1]:.1f} {means[-1]:.1f}L{right + 14:g} {label_at:.1f}" stroke="{colour}" '
        f'stroke-opacity="0.4"/>',
    ]
    for value in line.points[-1][1]:
        parts.append(f'<circle cx="{xs[-1]:.1f}" cy="{plot.y(value):.1f}" r="3.5" fill="{colour}" {clip}/>')
    return [*parts, text(right + 18, label_at + 4, said(line), fill=colour)]


def dots(rows: Sequence[Row], at: str = "final") -> str:
    """Validation CE of every seed as dots, one line per row; a group's baseline is drawn blue, what is far off told."""
    found = [values_of(row, "val/ce", at) for row in rows]
    near = reach([v for values in found for v in values if math.isfinite(v)])
    seen = [[v for v in values if v <= near] for values in found]  # neither what is far off nor what diverged
    plot, height, parts = labelled_rows([row.outcomes[0].arm.label for row in rows], seen, "validation CE, nats", 20)
    for i, (row, values) in enumerate(zip(rows, found, strict=True)):
        colour = COLOURS[1] if row.entry.baseline else COLOURS[0]
        parts += [dot(plot.x(v), row_height(i), colour) for v in seen[i]]
        beyond = [f"{v:.3f}" if math.isfinite(v) else "diverged" for v in values if not v <= near]
        if beyond:
            parts.append(text(plot.left + plot.width, row_height(i) + 5, f"{', '.join(beyond)} →", "end", colour))
    return framed(parts, plot.left + plot.width + 20, height)


def reach(values: Sequence[float]) -> float:
    """The largest of the values that dots are drawn for: a few far ones would crowd all others into a corner."""
    if not values:
        return 0.0
    low, most = min(values), sorted(values)[math.ceil(0.8 * (len(values) - 1))]
    return max(most, min(max(values), low + 2.5 * (most - low)))


def paired(rows: Mapping[str, Sequence[float | None]], names: Sequence[str], title: str) -> str:
    """{label: a value for each of `names`, None for none} as dots, those of one name joined from row to row."""
    found = {
        label: [v if v is not None and math.isfinite(v) else None for v in of_row] for label, of_row in rows.items()
    }
    room = 30 + LETTER * max(map(len, names), default=0)
    there = [[v for v in of_row if v is not None] for of_row in found.values()]
    plot, height, parts = labelled_rows(list(found), there, title, room)
    for i, name in enumerate(names):
        colour = COLOURS[i % len(COLOURS)]
        ends = [(plot.x(v), row_height(j)) for j, row in enumerate(found.values()) if (v := row[i]) is not None]
        joined = " ".join(f"{x:.1f},{y}" for x, y in ends)
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-opacity="0.5"/>')
        parts += [dot(x, y, colour) for x, y in ends]
        parts.append(text(plot.left + plot.width + 16, 14 + 18 * i, name, fill=colour))
    return framed(parts, plot.left + plot.width + room, max(height, 20 + 18 * len(names)))


def labelled_rows(
    labels: Sequence[str], values: Sequence[Sequence[float]], title: str, room: float
) -> tuple[Plot, float, list[str]]:
    """Labels, level lines and the axis below of rows of dots; the plot that places values, and its height."""
    every = [v for of_row in values for v in of_row] or [0.0]
    pad = max(0.05 * (max(every) - min(every)), 0.001)
    low, high = min(every) - pad, max(every) + pad
    plot = Plot((low, high), (0, 1), left=20 + LETTER * max(map(len, labels), default=0), width=430, margin=room)
    height = 60.0 + 26 * len(labels)
    parts = []
    for i, label in enumerate(labels):
        parts.append(text(10, row_height(i) + 5, label))
        parts.append(f'<path d="M{plot.left:g} {row_height(i)}H{plot.left + plot.width:g}" stroke="#ddd"/>')
    parts += [text(plot.x(v), height - 24, f"{v:.5g}", "middle", "#555") for v in ticks(low, high, 7)]
    parts.append(text(plot.left + plot.width / 2, height - 6, title, "middle", "#555"))
    return plot, height, parts


def row_height(index: int) -> int:
    """Where a row of dots stands."""
    return 20 + 26 * index


def dot(x: float, y: float, colour: str) -> str:
    """One value in a row of dots."""
    return f'<circle cx="{x:.1f}" cy="{y:g}" r="4.5" fill="{colour}" fill-opacity="0.7"/>'


def framed(parts: Sequence[str], width: float, height: float) -> str:
    """The whole SVG around what is drawn."""
    opened = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" '
    return (
        "\n".join(
            [
                f'{opened}font-size="13">',
                f'<rect width="{width:g}" height="{height:g}" fill="white"/>',
                *parts,
                "</svg>",
            ]
        )
        + "\n"
    )


def stacked(figures: Mapping[str, str]) -> str:
    """Whole SVGs one below the other, each under its title."""
    parts, top, widest = [], 0.0, 0.0
    for i, (title, figure) in enumerate(figures.items()):
        found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', figure)
        assert found is not None  # everything here draws one
        width, height = map(float, found.groups())
        inner = figure.replace('"frame"', f'"frame{i}"').replace("(#frame)", f"(#frame{i})")  # names are the page's
        placed = f'<svg x="0" y="{top + 28:g}" width="{width:g}" height="{height:g}" viewBox='
        parts += [text(10, top + 18, title, more='font-weight="bold"'), placed + inner.partition("viewBox=")[2]]
        top, widest = top + 28 + height, max(widest, width)
    return framed(parts, widest, top)


def reliability(lines: Sequence[tuple[str, Sequence[tuple[float, float]]]], title: str) -> str:
    """(label, (confidence, share that was right) in rising order) for every model, beside the diagonal."""
    room = 30 + LETTER * max((len(name) for name, _ in lines), default=0)
    plot = Plot((0.0, 1.0), (0.0, 1.0), width=340, height=340, margin=room)
    zero, one = (f"{plot.x(v):.1f} {plot.y(v):.1f}" for v in (0.0, 1.0))
    body = [f'<path d="M{zero}L{one}" stroke="#888" stroke-dasharray="5 4"/>']
    for i, (name, points) in enumerate(lines):
        colour = COLOURS[i % len(COLOURS)]
        for (x1, y1), (x2, y2) in pairwise(points):
            ends = f"M{plot.x(x1):.1f} {plot.y(y1):.1f}L{plot.x(x2):.1f} {plot.y(y2):.1f}"
            body.append(f'<path d="{ends}" stroke="{colour}" stroke-width="1.6"/>')
        body += [f'<circle cx="{plot.x(x):.1f}" cy="{plot.y(y):.1f}" r="3" fill="{colour}"/>' for x, y in points]
        body.append(text(plot.left + plot.width + 16, plot.top + 14 + 18 * i, name, fill=colour))
    return plot.wrapped(body, title, "share that was right")
