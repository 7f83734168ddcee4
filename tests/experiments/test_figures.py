"""Figures say what they draw: labels stand beside their lines, seeds stay joined, parts keep their own frames."""

import math
import re
from xml.etree import ElementTree

import pytest

from experiments.figures import Line, chart, curves, dots, paired, reach, stacked
from tests.experiments.builders import row

SVG = "{http://www.w3.org/2000/svg}"


def drawn(svg: str, tag: str) -> list[ElementTree.Element]:
    """The elements of a kind."""
    return list(ElementTree.fromstring(svg).iter(SVG + tag))


def heights(svg: str) -> dict[str, float]:
    """{text: its y}."""
    return {"".join(t.itertext()): float(t.get("y", "nan")) for t in drawn(svg, "text")}


def test_labels_stand_in_the_order_of_their_lines():
    """Catches labels crowded into one place with the best at the top and its line at the bottom."""
    ends = {"worst": 3.0, "middle": 2.0, "best": 1.0}
    at = heights(chart([Line(name, [(1, [4.0]), (2, [end])]) for name, end in ends.items()], "tokens"))
    assert at["worst: 3.000"] < at["middle: 2.000"] < at["best: 1.000"]
    close = heights(chart([Line(n, [(1, [1.0]), (2, [1 + i / 1e4])]) for i, n in enumerate("abc")], "tokens"))
    labels = [y for name, y in close.items() if name[0] in "abc"]
    assert min(abs(a - b) for a in labels for b in labels if a != b) >= 15


def test_many_labels_stay_inside():
    """Catches labels that a crowd at the bottom pushes out of the picture."""
    svg = chart([Line(f"{i}", [(1, [9.0]), (2, [1 + i / 1e4])]) for i in range(12)], "tokens")
    height = float(ElementTree.fromstring(svg).get("viewBox", "").split()[3])
    assert all(0 < y < height for y in heights(svg).values()) and sum(": 1.00" in name for name in heights(svg)) == 12


def test_a_short_run_stays_inside():
    """Catches a range of values taken from the end of the longest run, with shorter ones below the picture."""
    svg = chart([Line("long", [(0, [3.0]), (10, [2.0])]), Line("short", [(0, [3.0]), (2, [0.5])])], "tokens")
    height = float(ElementTree.fromstring(svg).get("viewBox", "").split()[3])
    assert all(0 < y < height - 40 for name, y in heights(svg).items() if name.startswith("short"))


def test_groups_have_charts_of_their_own():
    """Catches twelve curves in one frame, and one colour for two of them."""
    made = [row(name, [[3.0, 2.0]], group) for group in ("muon", "adamw") for name in ("theirs", "ours")]
    assert {"muon", "adamw", "ours: 2.000"} <= set(heights(curves(made))) and len(drawn(curves(made), "svg")) == 3
    assert len(drawn(curves(made[:2]), "svg")) == 1


def test_what_is_far_off_is_told():
    """Catches one collapsed variant that squeezes all others into a corner, and one that vanishes."""
    rows = [row(f"{i}", [[1.5 + i / 100]]) for i in range(8)]
    svg = dots([*rows, row("far", [[3.25]]), row("lost", [[math.nan]])])
    across = [float(d.get("cx", "nan")) for d in drawn(svg, "circle")]
    assert len(across) == 8 and max(across) - min(across) > 300
    assert {"3.250 →", "diverged →"} <= set(heights(svg))
    assert reach([]) == 0 and reach([2.0]) == 2.0 and reach([1.0, 1.1, 1.2]) == 1.2


def test_a_seed_joins_its_own_dots():
    """Catches dots of one seed joined to another's, and a hole drawn as a value."""
    svg = paired({"one": [1.0, 2.0], "two": [1.5, None], "three": [3.0, math.inf]}, ["seed 1", "seed 2"], "CE")
    lines = [line.get("points", "").split() for line in drawn(svg, "polyline")]
    assert [len(points) for points in lines] == [3, 1] and len(drawn(svg, "circle")) == 4
    across = [float(point.partition(",")[0]) for point in lines[0]]
    assert across == sorted(across) and across[1] - across[0] == pytest.approx((across[2] - across[0]) / 4, abs=0.2)
    assert "nan" not in svg and "inf" not in svg
    assert {"one", "two", "three", "seed 1", "seed 2"} <= set(heights(svg))


@pytest.mark.parametrize("rows", [{}, {"one": []}, {"one": [2.0]}, {"one": [2.0, 2.0]}, {"one": [None]}])
def test_little_to_draw_is_drawn(rows):
    """Catches a figure that breaks on one arm, equal ends or none."""
    names = [f"seed {i}" for i in range(len(next(iter(rows.values()), [])))]
    svg = paired(rows, names, "CE")
    assert drawn(svg, "svg") and len(drawn(svg, "circle")) == len([v for v in next(iter(rows.values()), []) if v])


def test_parts_of_a_stack_keep_their_frames():
    """Catches a chart clipped by the frame of the one above it, and parts that lie over each other."""
    one, other = (chart([Line("line", [(1, [2.0]), (2, [1.0])])], "x", log_x=log) for log in (False, True))
    svg = stacked({"first": one, "second": other})
    frames = [clip.get("id") for clip in drawn(svg, "clipPath")]
    assert len(frames) == len(set(frames)) == 2
    assert set(re.findall(r"url\(#(\w+)\)", svg)) == set(frames)
    inner = [part for part in drawn(svg, "svg") if part.get("y")]
    tops = [float(part.get("y", "nan")) for part in inner]
    assert tops[1] > tops[0] + float(inner[0].get("height", "nan"))
    height = float(ElementTree.fromstring(svg).get("viewBox", "").split()[3])
    assert height == pytest.approx(tops[1] + float(inner[1].get("height", "nan")))
    assert {"first", "second"} <= set(heights(svg))


def test_the_height_fits_what_is_to_be_seen():
    """Catches a frame that cuts the beginning of a line that is wanted whole, and first steps that flatten a loss."""
    line = Line("falling", [(0.1, [9.0]), (0.5, [2.0]), (1.0, [1.0])])

    def first_height(whole: bool) -> float:
        (path,) = drawn(chart([line], "x", whole=whole), "polyline")
        return float(path.get("points", "").split()[0].split(",")[1])

    assert first_height(whole=False) < 0 < first_height(whole=True)
