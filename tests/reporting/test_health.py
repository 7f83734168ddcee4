"""Health on the page: marks that need no colour, bands at the thresholds, and runs that nobody watched."""

import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import report
from bootstrap.thresholds import SIGNS, STATES, STATUS
from reporting.charts import Curve, XAxis, chart
from reporting.health import SHAPES, mark, state_of
from reporting.metrics import METRICS, as_markdown
from reporting.read import Point

AXIS = XAxis("step", "optimiser step", 10.0)
ILL = [0.05, 0.05, 0.3, 0.6, 0.5]


def make_run(folder: Path, **series: list[float]) -> Path:
    """A run with a line every 10 steps: ece=[…] is health/ece."""
    folder.mkdir(parents=True)
    rows = zip(*series.values(), strict=True) if series else [()] * 3
    lines: list[dict[str, Any]] = [
        {"step": 10 * i, "train/loss": 1.0} | {f"health/{k}": v for k, v in zip(series, row, strict=True)}
        for i, row in enumerate(rows, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def page_of(*folders: Path) -> str:
    return report.write_report(folders, folders[0].parent / "page.html").read_text(encoding="utf-8")


def drawn(key: str, values: list[float]) -> str:
    """The SVG of a chart of `key`."""
    points = [Point(i, i, i, v) for i, v in enumerate(values)]
    return re.findall(r"<svg.*?</svg>", chart(key, [Curve(0, "run", points)], [AXIS], 100), re.DOTALL)[0]


def bands(svg: str) -> dict[str, tuple[float, float]]:
    """Top and bottom of each band, by its word."""
    found = re.findall(r'<rect class="band (\w+)".*? y="([\d.]+)".*? height="([\d.]+)"', svg)
    return {word: (float(y), float(y) + float(height)) for word, y, height in found}


def places(svg: str) -> list[float]:
    """The heights at which the curve was drawn."""
    path = re.findall(r'class="(?:line|dots)" d="([^"]*)"', svg)[0]
    return [float(y) for y in re.findall(r"[\d.]+ ([\d.]+)", path)]


def test_a_state_is_shape_word_and_colour() -> None:
    """Catches a mark that says nothing to whoever doesn't see red and green, or hears the page."""
    assert set(SHAPES) == set(STATES) and len(set(SHAPES.values())) == len(STATES)
    for state in STATES:
        assert f'class="state {state}"' in mark(state)
        assert f'<span aria-hidden="true">{SHAPES[state]}</span> {state}<' in mark(state)
    assert state_of(2.0) == mark("bad") and state_of(math.nan) == state_of(7.0) == "—"


def test_bands_lie_at_the_thresholds() -> None:
    """Catches a band on the wrong side or at the wrong height, and a word that is not beside it."""
    svg = drawn("health/ece", ILL)
    ElementTree.fromstring(svg)
    found, at = bands(svg), places(svg)
    assert found["bad"][1] == pytest.approx(found["warn"][0], abs=0.2)
    for value, y in zip(ILL, at, strict=True):
        inside = [word for word, (top, bottom) in found.items() if top - 0.2 <= y <= bottom + 0.2]
        state = SIGNS["health/ece"].state(value)
        assert inside == ([] if state == "ok" else [state])
    assert svg.count('<text class="band"') == 2 and ">bad</text>" in svg and ">warn</text>" in svg


def test_low_entropy_has_its_bands_below() -> None:
    """Catches bands that are drawn upwards where less is worse, on either axis."""
    svg = drawn("health/entropy", [2.0, 1.0, 0.2, 0.05])
    found, at = bands(svg), places(svg)
    assert found["warn"][1] == pytest.approx(found["bad"][0], abs=0.2)
    assert found["warn"][0] - 0.2 <= at[2] <= found["warn"][1] and at[3] >= found["bad"][0]
    spikes = bands(drawn("health/grad_spike", [0.5, 1.0, 3.0, 50.0]))
    assert 0 < spikes["bad"][0] < spikes["bad"][1] and spikes["warn"][0] == pytest.approx(spikes["bad"][1], abs=0.2)


def test_a_well_run_has_no_bands() -> None:
    """Catches bands that squeeze the curve, or that are drawn outside the frame."""
    assert bands(drawn("health/ece", [0.05, 0.04, 0.06])) == {}
    assert bands(drawn("train/loss", [2.0, 1.0])) == {}


def test_the_page_says_how_a_run_is(tmp_path: Path) -> None:
    """Catches an illness that the summary hides because it is over, and a table without its signs."""
    folder = make_run(tmp_path / "ill", status=[0, 1, 2, 2, 1], ece=ILL, entropy=[2.0, 1.9, 1.8, 1.7, 1.6])
    page = page_of(folder)
    summary = page[page.index("<dt>Health</dt>") :]
    assert summary.index('class="state warn"') < summary.index("bad first at step 30") < 300
    rows = page[page.index('aria-label="Signs of health"') :].split("</table>")[0]
    assert re.search(r"Calibration error</th><td>≥ 0.2</td><td>≥ 0.35</td><td>0.5 .*?■</span> bad", rows)
    assert re.search(r"Entropy</th><td>≤ 0.3</td><td>≤ 0.1</td><td>1.6 .*?●</span> ok", rows)
    assert "Gradient norm" not in rows


def test_runs_that_nobody_watched(tmp_path: Path) -> None:
    """Catches an empty column, or a crash, beside runs without a monitor."""
    plain = make_run(tmp_path / "plain")
    assert "Health" not in page_of(plain) and "Signs of health" not in page_of(plain)
    ill = make_run(tmp_path / "ill", status=[0, 2, 2], ece=[0.05, 0.5, 0.6])
    page = page_of(ill, plain)
    assert re.search(r"bad</span><small>bad first at step 20</small></td></tr>.*?plain.*?<td>—</td></tr>", page)


def test_thresholds_are_explained() -> None:
    """Catches thresholds on the page, or in docs/metrics.md, that are not those of the monitor."""
    assert [key for key in METRICS if key.startswith("health/")] == [STATUS, *SIGNS]
    assert "Warning at 0.3 or less, bad at 0.1 or less. |" in as_markdown()
    assert "Warning at 0.2 or more, bad at 0.35 or more." in page_text("health/ece")


def page_text(key: str) -> str:
    return chart(key, [Curve(0, "run", [Point(0, 0, 0, 0.1)])], [AXIS], 100)
