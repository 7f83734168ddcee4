"""How the cost grows, drawn: a panel for each axis, both objectives in milliseconds, their ratio at each point."""

import math
from collections.abc import Sequence
from html import escape

from benchmarks.growth import ENTROPY, OURS, PARAMETERS
from benchmarks.table import Table, quartiles
from reporting.numbers import compact, log_ticks, number

COLOURS = {ENTROPY: "#1d4ed8", OURS: "#c2410c"}
WIDTH, HEIGHT = 440, 300  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 56, 24, 58, 44  # margins of a panel


class Scale:
    """A logarithmic axis: values from low to high onto places from start to end."""

    def __init__(self, values: Sequence[float], start: float, end: float, margin: float = 1.0) -> None:
        self.low, self.high = min(values) / margin, max(values) * margin
        if self.low == self.high:
            self.low, self.high = self.low / 2, self.high * 2
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self._start + share * (self._end - self._start)


def axes(tables: Sequence[Table]) -> dict[str, list[Table]]:
    """The points of every axis, in order; those that failed are left out."""
    found: dict[str, list[Table]] = {}
    for table in tables:
        if "axis" in table.facts and all(row.seconds for row in table.rows):
            found.setdefault(table.facts["axis"], []).append(table)
    return found


def figure(tables: Sequence[Table]) -> str:
    """All panels, two in a row, as an SVG."""
    panels = axes(tables)
    rows = max(1, math.ceil(len(panels) / 2))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {rows * HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{2 * WIDTH}" height="{rows * HEIGHT}" fill="white"/>',
    ]
    for i, (axis, points) in enumerate(panels.items()):
        parts.append(f'<g transform="translate({i % 2 * WIDTH} {i // 2 * HEIGHT})">')
        parts += panel(axis, points)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def panel(axis: str, points: Sequence[Table]) -> list[str]:
    """One axis: title, grid, two lines with quartiles as whiskers, ratios above AvataRL's points."""
    values = [t.facts["value"] for t in points]
    times = {name: [[1e3 * q for q in quartiles(t.row(name).seconds)] for t in points] for name in COLOURS}
    x = Scale(values, LEFT + 16, WIDTH - RIGHT - 16)
    y = Scale([t for line in times.values() for point in line for t in point], HEIGHT - BOTTOM, TOP, margin=1.35)
    parts = [f'<text x="{LEFT}" y="20" font-size="14" font-weight="bold">{escape(axis)}</text>']
    parts.append(f'<text x="{LEFT}" y="38" fill="#555" font-size="11">{escape(points[0].facts["of"])}</text>')
    for tick in log_ticks(y.low, y.high):
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end" fill="#555">{number(tick)}</text>')
    for value in values:
        place, label = f'x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 17}"', shown(axis, value)
        parts.append(f'<text {place} text-anchor="middle" fill="#555">{label}</text>')
    for name, line in times.items():
        parts += curve(name, [x(v) for v in values], [[y(t) for t in point] for point in line])
    for table, value, (_, _, high) in zip(points, values, times[OURS], strict=True):
        ratio = quartiles(table.ratios(OURS, ENTROPY))[1]
        parts.append(
            f'<text x="{x(value):.1f}" y="{y(high) - 8:.1f}" text-anchor="middle" font-size="11" '
            f'fill="{COLOURS[OURS]}">×{ratio:.2f}</text>'
        )
    return parts + legend()


def shown(axis: str, value: int) -> str:
    """A value of an axis in words."""
    return compact(value) if axis == PARAMETERS else f"{value:,}"


def curve(name: str, xs: list[float], ys: list[list[float]]) -> list[str]:
    """Medians joined by a line, quartiles as whiskers."""
    colour = COLOURS[name]
    middle = " ".join(f"{x:.1f},{m:.1f}" for x, (_, m, _) in zip(xs, ys, strict=True))
    parts = [f'<polyline points="{middle}" fill="none" stroke="{colour}" stroke-width="2"/>']
    for x, (low, m, high) in zip(xs, ys, strict=True):
        parts.append(f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{colour}"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{m:.1f}" r="3.5" fill="{colour}"/>')
    return parts


def legend() -> list[str]:
    """Names of the two lines and of the axis upwards, in the upper right corner."""
    end = WIDTH - RIGHT
    return [
        f'<text x="{end}" y="20" text-anchor="end"><tspan fill="{COLOURS[ENTROPY]}">● {ENTROPY}</tspan>'
        f'<tspan dx="10" fill="{COLOURS[OURS]}">● {OURS}</tspan><tspan dx="10" fill="#555">ms</tspan></text>'
    ]
