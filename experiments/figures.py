"""Figures of the studies as SVG: curves with a band over seeds, one dot for every seed, reliability diagrams."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import NamedTuple

from experiments.study import Row
from experiments.tables import curve, values_of
from reporting.charts import spread as pushed_apart
from reporting.numbers import compact, log_ticks, ticks

COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#b45309", "#0e7490", "#be185d", "#4d7c0f", "#475569", "#000000")
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

    The first fifth of the way decides nothing about the height of the frame.
    """
    lines = [Line(row.outcomes[0].arm.label, finite(curve(row, "tokens"))) for row in rows]
    return chart([line for line in lines if line.points], "tokens trained on")


def finite(points: list[tuple[float, list[float]]]) -> list[tuple[float, list[float]]]:
    """The points whose values are all finite."""
    return [(x, values) for x, values in points if all(map(math.isfinite, values))]


def chart(lines: Sequence[Line], x_title: str, y_title: str = "validation CE, nats", log_x: bool = False) -> str:
    """Lines through the means of their points, with a band from the lowest to the highest seed and dots at the end."""
    if not lines:
        return Plot((0, 1), (0, 1)).wrapped([], x_title, y_title)
    ends = [x for line in lines for x, _ in line.points]
    first, last = (min(ends) if log_x else 0.0), max(ends)
    first, last = (first, last) if last > first else (0.9 * first, 1.1 * last + 1)
    settled = [v for line in lines for x, values in line.points for v in values if log_x or x >= 0.2 * last]
    low, high = min(settled), max(settled)
    pad = 0.05 * (high - low) or 0.05
    room = 30 + LETTER * max(len(said(line)) for line in lines)
    plot = Plot((first, last), (low - pad, high + pad), log_x, margin=room)
    drawn = sorted(enumerate(lines), key=lambda pair: statistics.mean(pair[1].points[-1][1]))
    heights = [plot.y(statistics.mean(line.points[-1][1])) for _, line in drawn]
    body = []
    for (i, line), at in zip(drawn, pushed_apart(heights, 16), strict=True):
        body += one_line(line, plot, COLOURS[i % len(COLOURS)], at)
    return plot.wrapped(body, x_title, y_title)


def said(line: Line) -> str:
    """A line's label and where it ends."""
    return f"{line.label} {statistics.mean(line.points[-1][1]):.3f}"


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
    """Validation CE of every seed as dots, one line per row; a group's baseline is drawn blue."""
    found = [(row, [v for v in values_of(row, "val/ce", at) if math.isfinite(v)]) for row in rows]
    values = [v for _, of_row in found for v in of_row] or [0.0]
    low, high = min(values) - 0.01, max(values) + 0.01
    left = 20 + LETTER * max(len(row.outcomes[0].arm.label) for row in rows)
    plot = Plot((low, high), (0, 1), left=left, width=430)
    height = 60 + 26 * len(rows)
    right = left + plot.width + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right:g} {height}" font-family="sans-serif" '
        f'font-size="13">',
        f'<rect width="{right:g}" height="{height}" fill="white"/>',
    ]
    for i, (row, of_row) in enumerate(found):
        y, colour = 20 + 26 * i, COLOURS[1] if row.entry.baseline else COLOURS[0]
        parts.append(text(10, y + 5, row.outcomes[0].arm.label))
        parts.append(f'<path d="M{left:g} {y}H{left + plot.width:g}" stroke="#ddd"/>')
        parts += [f'<circle cx="{plot.x(v):.1f}" cy="{y}" r="4.5" fill="{colour}" fill-opacity="0.7"/>' for v in of_row]
    parts += [text(plot.x(v), height - 24, f"{v:.4g}", "middle", "#555") for v in ticks(low, high, 5)]
    parts.append(text(left + plot.width / 2, height - 6, "validation CE, nats", "middle", "#555"))
    return "\n".join([*parts, "</svg>"]) + "\n"


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
