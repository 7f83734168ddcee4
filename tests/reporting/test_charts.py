"""reporting/charts.py, numbers.py and metrics.py: curves that keep what matters, axes that read well."""

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reporting.charts import Curve, chart, smooth, spread, thin, x_axes
from reporting.metrics import METRICS, SECTIONS
from reporting.numbers import duration, log_ticks, number, ticks
from reporting.read import Point, Run


def test_documented_keys_are_explained_once() -> None:
    """Catches a metric of DESIGN section 6 without its line, or one that stands in two sections or none."""
    train = (
        "loss reward reward_std p_gold gold_rank gold_kept action_mass action_count overlap entropy "
        "critic_kl grad_norm tokens_per_second utilisation peak_memory_gb"
    )
    design = ["lr", *(f"train/{key}" for key in train.split())]
    design += [f"val/{key}" for key in ("ce", "ppl", "bpb", "accuracy", "ece")]
    charted = [key for keys in SECTIONS.values() for key in keys]
    groups = ("bootstrap/", "health/", "imagination/", "surgery/")  # the experiments' own
    assert sorted(key for key in METRICS if not key.startswith(groups)) == sorted(design)
    assert sorted(METRICS) == sorted(charted)
    assert all(m.explanation.endswith(".") and "\n" not in m.explanation for m in METRICS.values())


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=300), st.integers(4, 60))
@settings(deadline=None, max_examples=50)
def test_thinning_keeps_ends_extremes_and_order(values: list[float], limit: int) -> None:
    """Catches a spike, or the last value, that vanishes from a long curve."""
    points = [Point(i, i, i, v) for i, v in enumerate(values)]
    kept = thin(points, limit)
    assert len(kept) <= max(limit, 2) or len(kept) == len(values)
    assert kept[0] == points[0] and kept[-1] == points[-1]
    assert {min(values), max(values)} <= {p.value for p in kept}
    assert [p.step for p in kept] == sorted({p.step for p in kept})


def test_thinning_keeps_gaps() -> None:
    """Catches a hole that is drawn over because its marker was thinned away."""
    points = [Point(i, i, i, 0.0, gap=i == 501) for i in range(1000)]
    assert sum(p.gap for p in thin(points, 20)) == 1


@given(st.lists(st.floats(0, 300), max_size=8).map(sorted))
@settings(deadline=None, max_examples=50)
def test_ladder_labels_never_overlap(places: list[float]) -> None:
    """Catches labels of near rungs printed over each other, or moved without need."""
    moved = spread(places, 14)
    assert all(b - a >= 14 - 1e-6 for a, b in pairwise(moved))
    if all(b - a >= 14 for a, b in pairwise(places)):
        assert moved == pytest.approx(places)


def test_moving_average_has_no_lag_on_a_line() -> None:
    """Catches an average that trails its curve at the start or in the middle."""
    line = [Point(i, i, i, float(i)) for i in range(600)]
    assert [p.value for p in smooth(line)][:580] == pytest.approx([p.value for p in line][:580])


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
@settings(deadline=None, max_examples=100)
def test_ticks_are_few_and_inside(low: float, span: float, count: int) -> None:
    """Catches axes without labels, with a hundred of them, or with labels outside the frame."""
    found = ticks(low, low + span, count)
    assert 1 <= len(found) <= 2.5 * count + 1
    slack = 1e-6 * (abs(low) + span)
    assert all(low - slack <= t <= low + span + slack for t in found)


@given(st.floats(1e-9, 1e6), st.floats(1.8, 1e9))
@settings(deadline=None, max_examples=100)
def test_log_ticks_are_few_and_inside(low: float, ratio: float) -> None:
    """Catches a logarithmic axis without labels or with too many."""
    found = log_ticks(low, low * ratio)
    assert 1 <= len(found) <= 12
    assert all(low * 0.999 <= t <= low * ratio * 1.001 for t in found)


@given(st.lists(st.floats(-1e99, 1e99), min_size=1, max_size=80), st.sampled_from(sorted([*METRICS, "x/y"])))
@settings(deadline=None, max_examples=100)
def test_any_values_make_a_valid_chart(values: list[float], key: str) -> None:
    """Catches a constant, huge, tiny or negative series that breaks an axis."""
    points = [Point(i, math.nan, i * 1e-9, v, gap=i % 7 == 3) for i, v in enumerate(values)]
    axes = x_axes([Run("a", rows=[{"step": len(values)}])])
    figure = chart(key, [Curve(0, "a", points)], axes, 30)
    svg = re.search(r"<svg.*?</svg>", figure, re.DOTALL)
    assert svg
    for node in ElementTree.fromstring(svg[0]).iter():
        for name in ("d", "x", "y"):
            assert not re.search(r"nan|inf", node.get(name, "")), (name, node.get(name))


def test_numbers_read_well() -> None:
    """Catches digits that mislead: lost precision, 60 seconds in a minute, exponents for plain numbers."""
    shown = [number(v) for v in (0.0, 1.50342, 12345.6, 3e-5, -2.5, 1e9, math.nan)]
    assert shown == ["0", "1.503", "12,346", "3e-5", "-2.5", "1e9", "—"]
    assert [duration(v) for v in (0.25, 59.9, 192, 3600, 86399)] == [
        "0.25 s",
        "59.9 s",
        "3 min 12 s",
        "1 h 00 min",
        "23 h 59 min",
    ]
