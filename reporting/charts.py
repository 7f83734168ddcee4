"""Line charts as inline SVG: everything is drawn here, page.js only reads values under the pointer.

Each curve is drawn once per x-axis (step, tokens, seconds); page.css shows the axis that is chosen.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from bootstrap.thresholds import SIGNS
from reporting.metrics import AXES, Metric, describe, explained
from reporting.numbers import UNITS_OF_TIME, compact, log_ticks, number, ticks, with_unit
from reporting.read import Point, Run, Rung, is_number

COLOURS = 8
"""How many run colours page.css has; run number 9 takes the first again, dashed."""
POINTS_PER_PAGE = 18_000
"""Budget of points for all curves of a page, which keeps a page below 2 MB."""


@dataclass(frozen=True)
class XAxis:
    """One of the horizontal axes; all charts of a page share its range, 0 to `high`."""

    key: str
    title: str
    high: float
    unit: float = 1.0
    """Tick labels are values divided by this (seconds shown as minutes)."""


@dataclass(frozen=True)
class Curve:
    """The points of one run in one chart."""

    run: int
    name: str
    points: list[Point]
    lost: int = 0


@dataclass(frozen=True)
class Frame:
    """Sizes of a chart in SVG units, and the range of its y-axis."""

    width: float
    height: float
    right: float
    low: float
    high: float
    log: bool
    left: float = 50
    top: float = 10
    bottom: float = 40

    def x(self, value: float, axis: XAxis) -> float:
        return self.left + (self.width - self.left - self.right) * value / axis.high

    def y(self, value: float) -> float:
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.top + (self.height - self.top - self.bottom) * (high - at) / (high - low)


def x_axes(runs: Sequence[Run]) -> list[XAxis]:
    """ "step", and the other axes that some line of some run has a positive value for."""
    found = []
    for key in AXES:
        values = [v for run in runs for row in run.rows if is_number(v := row.get(key))]
        high = max((float(v) for v in values if math.isfinite(v)), default=0.0)
        if high < 1e-6 and key != "step":
            continue
        high = max(high, 1.0) if key == "step" else high
        unit, name = 1.0, ""
        if key == "seconds":
            unit, name = [u for u in UNITS_OF_TIME if high >= 2 * u[0] or u[0] == 1][-1]
        title = {"step": "optimiser step", "tokens": "tokens trained on", "seconds": f"training time, {name}"}
        found.append(XAxis(key, title[key], high, unit))
    return found


def thin(points: list[Point], limit: int) -> list[Point]:
    """At most about `limit` points: first, last, and the extremes of equal stretches in between."""
    if len(points) <= limit:
        return points
    stretches = max(1, (limit - 2) // 2)
    keep = {0, len(points) - 1}
    for i in range(stretches):
        stretch = range(i * len(points) // stretches, (i + 1) * len(points) // stretches)
        keep.add(min(stretch, key=lambda j: points[j].value))
        keep.add(max(stretch, key=lambda j: points[j].value))
    kept, before = [], -1
    for j in sorted(keep):
        kept.append(points[j]._replace(gap=any(p.gap for p in points[before + 1 : j + 1])))
        before = j
    return kept


def is_averaged(metric: Metric, curve: Curve) -> bool:
    """Whether a moving average is drawn over the curve."""
    return metric.noisy and len(curve.points) > 60


def smooth(points: list[Point]) -> list[Point]:
    """A moving average over a thirtieth of the curve: centred, narrower at the start, trailing at the end."""
    half = max(2, len(points) // 60)
    sums = [0.0]
    for p in points:
        sums.append(sums[-1] + p.value)
    averaged = []
    for i, p in enumerate(points):
        before = min(half, i)
        after = min(before, len(points) - 1 - i)
        mean = (sums[i + after + 1] - sums[i - before]) / (before + after + 1)
        averaged.append(p._replace(value=mean, gap=False))
    return averaged


def chart(key: str, curves: list[Curve], axes: list[XAxis], limit: int, rungs: Sequence[Rung] = ()) -> str:
    """One metric as a <figure>: title, explanation, SVG, and the values that the tooltip shows.

    `limit` is the number of points a curve may have; `rungs` are drawn as labelled horizontal lines (large
    charts: val/ce and val/accuracy). The curves must have at least one point each.
    """
    metric = describe(key)
    levels = [(r.context, r.accuracy if metric.unit == "%" else r.ce) for r in rungs]
    large = key in ("val/ce", "val/accuracy")
    frame = _frame(metric, curves, [level for _, level in levels], large)
    ident = "".join(c if c.isalnum() else "-" for c in key)
    thinned = [Curve(c.run, c.name, thin(c.points, limit), c.lost) for c in curves]
    body = [
        _bands(frame, key),
        _y_axis(frame, metric),
        *(_x_axis(frame, axis) for axis in axes),
        _ladder(frame, levels, metric),
    ]
    for full, curve in zip(curves, thinned, strict=True):
        body += _curve(curve, full, frame, axes, metric, limit)
    svg = (
        f'<svg viewBox="0 0 {frame.width:g} {frame.height:g}" role="img" tabindex="0" '
        f'aria-labelledby="{ident}-t {ident}-d"><title id="{ident}-t">{escape(metric.label)}</title>'
        f'<desc id="{ident}-d">{escape(_spoken(curves, metric))}</desc>'
        f'<clipPath id="{ident}-c"><rect x="{frame.left - 4:g}" y="{frame.top - 4:g}" '
        f'width="{frame.width - frame.left - frame.right + 8:g}" '
        f'height="{frame.height - frame.top - frame.bottom + 8:g}"/></clipPath>'
        f"{''.join(body).replace('CLIP', f'{ident}-c')}</svg>"
    )
    told = " ".join([explained(key), *["Logarithmic axis."] * frame.log])
    if key != metric.label:
        told = f"<p>{escape(told)} <code>{escape(key)}</code></p>"
    hint = {"lower": "↓ lower is better", "higher": "↑ higher is better", "": ""}[metric.better]
    return (
        f'<figure class="chart{" large" if large else ""}"><figcaption><h3>{escape(metric.label)}'
        f"{f' <small>{hint}</small>' if hint else ''}</h3>"
        f"{told}</figcaption>{svg}"
        f"{_footnote(curves, frame)}"
        f'<script type="application/json">{_data(thinned, frame, axes, metric)}</script></figure>'
    )


def _frame(metric: Metric, curves: list[Curve], levels: list[float], large: bool) -> Frame:
    """The y-range: all values, but for metrics that settle only those after a twentieth of the curve."""
    values = [p.value for c in curves for p in c.points]
    low, high = min(values + levels), max(values + levels)
    log = metric.log and low > 0 and high > 1.5 * low
    if metric.settles:
        late = [p.value for c in curves for p in c.points if p.step >= 0.05 * c.points[-1].step]
        high = max(late + levels) if len(late) >= 3 else high
    if log:
        low, high = low / 1.1, high * 1.1
    else:
        flat = high - low <= max(1e-12 * abs(high), 1e-100)
        pad = 0.05 * (high - low) if not flat else 0.05 * abs(high) if abs(high) > 1e-90 else 1.0
        low, high = max(low - pad, 0.0) if low >= 0 else low - pad, high + pad
        if metric.unit == "%" and max(values) <= 1:
            high = min(high, 1.0)
    width, height = (480, 310) if large else (370, 220)
    return Frame(width, height, 84 if levels else 14, low, high, log)


def _bands(frame: Frame, key: str) -> str:
    """Where a sign of health warns and where it is bad: shaded bands, each with its word."""
    if key not in SIGNS:
        return ""
    sign, edge = SIGNS[key], math.inf if SIGNS[key].worse == "above" else -math.inf
    drawn, right = "", frame.width - frame.right
    for word, start, end in (("warn", sign.warn, sign.bad), ("bad", sign.bad, edge)):
        low, high = sorted(min(max(value, frame.low), frame.high) for value in (start, end))
        if low >= high:
            continue
        top, bottom = frame.y(high), frame.y(low)
        drawn += f'<rect class="band {word}" x="{frame.left:g}" y="{top:.1f}" width="{right - frame.left:g}" '
        drawn += f'height="{bottom - top:.1f}"/>'
        if bottom - top >= 14:
            drawn += f'<text class="band" x="{right - 5:g}" y="{top + 12:.1f}" text-anchor="end">{word}</text>'
    return drawn


def _y_axis(frame: Frame, metric: Metric) -> str:
    marks = log_ticks(frame.low, frame.high) if frame.log else ticks(frame.low, frame.high, 5)
    step = marks[1] - marks[0] if len(marks) > 1 else 1.0
    if metric.unit == "%":
        labels = [f"{100 * m:.{max(0, -math.floor(math.log10(100 * step) + 1e-9))}f} %" for m in marks]
    elif frame.log or abs(marks[-1]) >= 1e4 or abs(step) < 1e-3:
        labels = [compact(m) for m in marks]
    else:
        labels = [f"{m:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}" for m in marks]
    return "".join(
        f'<path class="grid" d="M{frame.left:g} {frame.y(m):.1f}H{frame.width - frame.right:g}"/>'
        f'<text class="tick" x="{frame.left - 7:g}" y="{frame.y(m) + 4:.1f}" text-anchor="end">{label}</text>'
        for m, label in zip(marks, labels, strict=True)
    )


def _x_axis(frame: Frame, axis: XAxis) -> str:
    base, edge = frame.height - frame.bottom, frame.width - frame.right
    marks = [m * axis.unit for m in ticks(0, axis.high / axis.unit, 5)]
    labels = "".join(
        f'<text class="tick" x="{frame.x(m, axis):.1f}" y="{base + 16:g}" text-anchor="middle">'
        f"{compact(m / axis.unit)}</text>"
        for m in marks
    )
    middle = (frame.left + edge) / 2
    return (
        f'<g class="x-{axis.key}"><path class="base" d="M{frame.left:g} {base:g}H{edge:g}"/>{labels}'
        f'<text x="{middle:g}" y="{base + 33:g}" text-anchor="middle">{axis.title}</text></g>'
    )


def _ladder(frame: Frame, levels: list[tuple[int, float]], metric: Metric) -> str:
    """Dashed lines with labels in the right margin, pushed apart where they would overlap."""
    lines = sorted((frame.y(level), context, level) for context, level in levels)
    drawn, edge = [], frame.width - frame.right
    for (y, context, level), at in zip(lines, spread([y for y, _, _ in lines], 14), strict=True):
        text = f"{context}: {100 * level:.1f} %" if metric.unit == "%" else f"{context}: {level:.3f}"
        drawn.append(
            f'<path class="rung" d="M{frame.left:g} {y:.1f}H{edge:g}"/>'
            f'<path class="leader" d="M{edge:g} {y:.1f}L{edge + 12:g} {at:.1f}"/>'
            f'<text class="rung" x="{edge + 15:g}" y="{at + 4:.1f}">{text}</text>'
        )
    return "".join(drawn)


def spread(places: list[float], distance: float) -> list[float]:
    """Ascending places moved to be at least `distance` apart: crowds open up around their middle."""
    crowds: list[list[float]] = []

    def start(crowd: list[float]) -> float:
        return sum(crowd) / len(crowd) - distance * (len(crowd) - 1) / 2

    for place in places:
        crowds.append([place])
        while len(crowds) > 1 and start(crowds[-1]) < start(crowds[-2]) + distance * len(crowds[-2]):
            crowds[-2:] = [crowds[-2] + crowds[-1]]
    return [start(crowd) + distance * i for crowd in crowds for i in range(len(crowd))]


def _curve(curve: Curve, full: Curve, frame: Frame, axes: list[XAxis], metric: Metric, limit: int) -> list[str]:
    """The paths of one run: the values, and where they are noisy a moving average over them."""
    style = f"run-{curve.run} c{curve.run % COLOURS}" + (" dashed" if curve.run >= COLOURS else "")
    average = smooth(full.points) if is_averaged(metric, full) else []
    drawn = []
    for axis in axes:
        lines = [f'<path class="{"raw" if average else "line"}" d="{_path(curve.points, frame, axis)}"/>']
        if average:
            lines.append(f'<path class="line" d="{_path(thin(average, limit // 2), frame, axis)}"/>')
        elif len(curve.points) <= 30:
            dots = "".join(_path([p], frame, axis) for p in curve.points)
            lines.append(f'<path class="dots" d="{dots}"/>')
        drawn.append(f'<g class="x-{axis.key} {style}" clip-path="url(#CLIP)">{"".join(lines)}</g>')
    return drawn


def _path(points: list[Point], frame: Frame, axis: XAxis) -> str:
    """SVG path data; a point with no neighbour becomes a line of no length, which round caps make a dot."""
    pieces: list[list[str]] = []
    for p in points:
        at = getattr(p, axis.key)
        if math.isfinite(at) and (not frame.log or p.value > 0):
            if p.gap or not pieces:
                pieces.append([])
            y = min(frame.y(p.value), 10 * frame.height)
            pieces[-1].append(f"{frame.x(at, axis):.1f} {max(y, -9 * frame.height):.1f}")
    return "".join("M" + " ".join(piece) + ("h0" if len(piece) == 1 else "") for piece in pieces)


def _footnote(curves: list[Curve], frame: Frame) -> str:
    notes = []
    if lost := sum(c.lost for c in curves):
        notes.append(f"{lost} value{'s' if lost > 1 else ''} not finite, left out.")
    if any(p.value > frame.high for c in curves for p in c.points):
        highest = max(p.value for c in curves for p in c.points)
        notes.append(f"The first values lie above the frame (up to {number(highest)}).")
    return f'<p class="footnote">{" ".join(notes)}</p>' if notes else ""


def _spoken(curves: list[Curve], metric: Metric) -> str:
    """The chart in words, for whoever cannot see it."""
    said = []
    for c in curves:
        first, last = c.points[0], c.points[-1]
        said.append(
            f"{c.name}: from {with_unit(first.value, metric.unit)} at step {first.step:g} "
            f"to {with_unit(last.value, metric.unit)} at step {last.step:g}"
        )
    return "; ".join(said) + "."


def _data(curves: list[Curve], frame: Frame, axes: list[XAxis], metric: Metric) -> str:
    """What page.js needs to find the values under the pointer, as JSON that cannot close its <script>."""

    def short(value: float, digits: int = 6) -> float | int | None:
        if not math.isfinite(value):
            return None
        rounded = float(f"{value:.{digits}g}")
        return int(rounded) if rounded.is_integer() else rounded

    data = {
        "unit": metric.unit,
        "y": [frame.low, frame.high, int(frame.log)],
        "box": [frame.left, frame.top, frame.width - frame.right, frame.height - frame.bottom],
        "x": {axis.key: [axis.high, axis.unit] for axis in axes},
        "runs": [
            {
                "run": c.run,
                "name": c.name,
                "value": [short(p.value) for p in c.points],
                **{axis.key: [short(getattr(p, axis.key), 9) for p in c.points] for axis in axes},
            }
            for c in curves
        ],
    }
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
