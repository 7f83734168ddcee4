"""The study of one process against two: its table, and its clock, on runs of a moment."""

from pathlib import Path
from typing import Any

import pytest

from config import ConfigError
from experiments import scaling
from experiments.scaling import Settings, restart_seconds, speed, table
from tests.tiny_train import TINY

QUICK = Settings(
    steps=6,
    also=tuple(f"{k}={v}" for k, v in TINY.items() if not k.startswith(("train.", "eval.", "log.", "optim."))),
)


def record(**changed: Any) -> dict[str, Any]:
    rates = {"1": [100.0, 200.0, 400.0], "2": [180.0, 360.0, 600.0], "2 apart": [190.0, 400.0, 800.0]}
    machine = {"processor": "P", "cores": 2, "torch": "2.13", "commit": "abc", "date": "2026-01-01"}
    settings = {"machine": machine, "rounds": 3, "steps": 6, "restart_seconds": [7.25, 8.0]}
    return settings | {"tokens_per_second": {"tiny": rates}} | changed


def test_ratios_are_taken_round_by_round():
    """Catches a ratio of medians, which a machine that changes its speed between rounds makes meaningless."""
    text = table(record())
    assert "| tiny | 200 | 360 | **1.80** (1.65 to 1.80) | 2.00 | 90% |" in text
    assert "7.2, 8.0 s" in text and "`python -m experiments.scaling --rounds 3 --steps 6 --kills 2`" in text
    assert "SIGKILL" not in table(record(restart_seconds=[]))


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"steps": 3}, {"kills": -1}, {"also": ("steps",)}])
def test_what_cannot_be_measured_is_refused(wrong):
    """Catches a study that fails after an hour."""
    with pytest.raises(ConfigError):
        Settings(**wrong)


@pytest.fixture
def corpus(shakespeare: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tinyshakespeare where processes of their own find it."""
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text(shakespeare, encoding="utf-8")
    monkeypatch.setenv("AVATARL_DATA", str(tmp_path))


def test_one_run_and_two_that_share_its_batch(corpus, monkeypatch):
    """Catches a limit that is measured with another batch, and the speed of one run where two were timed."""
    seen: list[tuple[str, int]] = []
    launched = scaling.launched

    def watched(words: Any, processes: int, restarts: int = 0) -> Any:
        seen.append((words[words.index("--train.batch-size") + 1], processes))
        return launched(words, processes, restarts)

    monkeypatch.setattr(scaling, "launched", watched)
    assert speed({"train.batch-size": 4}, QUICK, 2, alone=True) > 0
    assert seen == [("2", 1), ("2", 1)]


def test_a_restart_is_timed(corpus):
    """Catches a clock that stops at a step of the dead worker, or before the run goes on."""
    assert 1 < restart_seconds(QUICK) < 100
