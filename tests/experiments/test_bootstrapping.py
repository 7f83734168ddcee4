"""The bootstrapping study's readings: when a rung is passed, and when the monitor spoke."""

import json
from pathlib import Path
from typing import Any

import pytest

from checks import ConfigError
from experiments.arms import Arm, Outcome
from experiments.bootstrapping import NAMES, Settings, entries, figure, noticed, own_length, passed, rate_of
from experiments.study import Entry, Row

LADDER = [{"context": 1, "ce": 2.5, "accuracy": 0.27}, {"context": 2, "ce": 2.0, "accuracy": 0.38}]


def outcome(folder: Path, curve: list[tuple[float, float]], status: list[int]) -> Outcome:
    """A made-up run: (CE, accuracy) after 10, 20, … seconds, and what the monitor said at steps 1, 2, …"""
    folder.mkdir()
    (folder / "ladder.json").write_text(json.dumps(LADDER))
    points: list[dict[str, Any]] = [
        {"step": i, "tokens": 100 * i, "seconds": 10.0 * i, "val/ce": ce, "val/accuracy": accuracy, "val/ece": 0.1}
        for i, (ce, accuracy) in enumerate(curve, 1)
    ]
    said = [
        {"step": i, "health/status": s, "bootstrap/decisions_per_second": 100.0 * i} for i, s in enumerate(status, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*said, *points]))
    return Outcome(Arm("made up", "bootstrap-best", {"run.seed": 1}), folder, tuple(points))


def test_a_rung_is_passed_by_both_numbers(tmp_path):
    """Catches a student called past a rung by its accuracy alone, as the collapsing one would be."""
    sure = outcome(tmp_path / "a", [(9.0, 0.3), (2.4, 0.26), (2.4, 0.28), (2.2, 0.5)], [0, 1, 2, 2])
    assert passed(sure, 1) == 30.0 and passed(sure, 2) is None and passed(sure, 3) is None
    assert noticed(sure) == 3 and rate_of(sure) == 250.0
    well = outcome(tmp_path / "b", [(1.9, 0.4)], [0, 1])
    assert passed(well, 2) == 10.0 and noticed(well) is None


def test_every_preset_is_an_entry_of_its_own_length():
    """Catches a preset that is left out, or trained for a length that is not its own."""
    found = entries(Settings(contrasts=False))
    assert [e.preset for e in found] == NAMES
    assert all(e.settings["train.steps"] == own_length(e.preset, 10**9)["train.steps"] > 1 for e in found)
    assert {e.settings["train.steps"] for e in entries(Settings(steps=7))} == {7}
    with pytest.raises(ConfigError, match="no entry is called so"):
        entries(Settings(only=("nothing of the kind",)))


def test_the_figure_has_a_line_for_every_rung(tmp_path):
    """Catches a chart without what its curves are to be compared with."""
    row = Row(Entry("ours", "bootstrap-best"), (outcome(tmp_path / "a", [(3.0, 0.2), (2.2, 0.4)], []),))
    drawn = figure([row])
    assert "ours" in drawn and "context of 1" in drawn and "context of 2" in drawn
