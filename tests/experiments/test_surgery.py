"""The study of surgery: its figure shows the arms of phase 3, seed by seed."""

import json
from pathlib import Path
from typing import Any

from experiments.surgery import curve, figure
from reporting.surgery import ARMS


def seed(folder: Path, number: int, arms: dict[str, list[float]], since: int = 20) -> dict[str, Any]:
    """A finished hybrid run: phase 1 of `since` steps at 3 nats, then every ten steps an evaluation of each arm."""
    for arm, phase_3 in arms.items():
        (folder / arm).mkdir(parents=True)
        told = [*((step, 3.0) for step in range(0, since, 10)), *((since + 10 * i, v) for i, v in enumerate(phase_3))]
        lines = [json.dumps({"step": step, "val/ce": ce}) for step, ce in told]
        (folder / arm / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 99, "train/loss": 1.0}', ""]))
    ends = {arm: {"val_ce": phase_3[-1]} for arm, phase_3 in arms.items()}
    return {"seed": number, "phase_1": {"steps": since}, "arms": ends}


def test_a_curve_begins_with_phase_3(tmp_path):
    """Catches a way that starts with phase 1, seeds compared at other steps, and an arm that one seed lacks."""
    one = seed(tmp_path / "1", 1, {"surgeon": [2.0, 1.9, 1.8], "none": [2.0, 1.95, 1.9]})
    other = seed(tmp_path / "2", 2, {"surgeon": [2.2, 2.1], "none": [2.2, 2.1, 2.0]}, since=50)
    folders = [tmp_path / "1", tmp_path / "2"]
    assert curve("surgeon", [one, other], folders).points == [(0.0, [2.0, 2.2]), (10.0, [1.9, 2.1])]
    assert curve("none", [one, other], folders).points[-1] == (20.0, [1.9, 2.0])
    assert curve("random", [one, other], folders).points == []
    del other["arms"]["none"]
    assert curve("none", [one, other], folders).points[0] == (0.0, [2.0])


def test_the_figure_has_every_arm_and_seed(tmp_path):
    """Catches an arm or a seed that is left out, and curves that hide the ends."""
    arms = {"surgeon": [2.0, 1.9], "none": [2.0, 1.8], "random": [2.0, 1.7]}
    results = [seed(tmp_path / str(i), i, arms) for i in (1, 2)]
    svg = figure(results, [tmp_path / "1", tmp_path / "2"])
    for arm in ARMS:
        assert (svg.count(f">{ARMS[arm]}<") == 1) is (arm in arms)  # where it ended; its curve's label has a number
        assert (f">{ARMS[arm]}: " in svg) is (arm in arms)
    assert svg.count("<circle") == 2 * 3 + 2 * 3 and ">seed 2<" in svg
    assert "At the end of phase 3" in svg
