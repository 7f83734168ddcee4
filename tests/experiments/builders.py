"""Made-up runs of studies: their evaluations are given, nothing is trained."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.arms import Arm, Outcome
from experiments.study import Entry, Row

PRESET = "protocol-avatarl"


def evaluation(step: int, ce: float, seconds: float = 1.0, ece: float = 0.02) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    numbers = {"val/ce": ce, "val/ece": ece, "val/accuracy": 0.5}
    return {"step": step, "tokens": 768 * step, "seconds": seconds, **numbers}


def outcome(arm: Arm, losses: Sequence[float], folder: Path = Path("nowhere"), **more: Any) -> Outcome:
    """A run whose loss was each of `losses` after 10, 20, … steps, a second each."""
    points = tuple(evaluation(10 * i, ce, float(i)) for i, ce in enumerate(losses, 1))
    return Outcome(arm, folder / arm.name, points, **more)


def row(
    label: str,
    curves: Sequence[Sequence[float]],
    group: str = "",
    baseline: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Row:
    """A row with one made-up curve for every seed; its runs have these settings besides."""
    entry = Entry(label, PRESET, group=group, baseline=baseline)
    arms = [Arm(label, PRESET, {"run.seed": seed, **(settings or {})}) for seed in range(1, len(curves) + 1)]
    return Row(entry, tuple(outcome(arm, curve) for arm, curve in zip(arms, curves, strict=True)))


class Trainer:
    """Takes the place of `run_all`: a run's losses are a function of its settings; every call is kept."""

    def __init__(self, losses: Callable[[Mapping[str, Any]], Sequence[float]]) -> None:
        self.losses = losses
        self.asked: list[Arm] = []

    def __call__(self, arms: Sequence[Arm], folder: Path, jobs: int, threads: int) -> list[Outcome]:
        self.asked += arms
        made = [outcome(arm, self.losses(arm.settings), folder) for arm in arms]
        for one in made:
            one.folder.mkdir(parents=True, exist_ok=True)
            record = {"git": {"commit": "0123456789abcdef", "dirty": False}, "parameters": 1000}
            (one.folder / "config.json").write_text(json.dumps(record))
        return made
