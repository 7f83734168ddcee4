"""The study of one process against two: its table, and its clock, on runs of a moment."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from config import ConfigError
from experiments import scaling
from experiments.arms import last_line
from experiments.scaling import Settings, restart_seconds, speed, table
from tests.tiny_train import TINY, here

SPEED = "train/tokens_per_second"
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
    speeds: list[float] = []

    def launched(words: Any, processes: int) -> subprocess.Popen[bytes]:
        """The run itself, but in this process: it is over when its process begins."""
        seen.append((words[words.index("--train.batch-size") + 1], processes))
        outcome = here("avatarl-char", *words)
        assert outcome.code == 0, outcome.err
        run = Path(words[words.index("--run.out-dir") + 1], words[words.index("--run.name") + 1])
        speeds.append(last_line(run, SPEED)[SPEED])
        return subprocess.Popen([sys.executable, "-c", ""], stderr=subprocess.PIPE)

    monkeypatch.setattr(scaling, "launched", launched)
    assert speed({"train.batch-size": 4}, QUICK, 2, alone=True) == pytest.approx(sum(speeds))
    assert seen == [("2", 1), ("2", 1)]


# In the place of torchrun: a worker that logs a step every 20 ms. Once it is killed there is nothing for 0.4 s, then
# for 0.4 s the record up to the checkpoint, written anew, then steps again.
ELASTIC = r"""
import os, sys, time
from pathlib import Path

run, step = Path(sys.argv[1]), '{"train/loss": 1}\n'
(run / "checkpoints").mkdir(parents=True)
if (worker := os.fork()) == 0:
    for count in range(1, 1000):
        (run / "metrics.jsonl").open("a").write(step)
        if count == 5:
            (run / "checkpoints" / "latest").touch()
        time.sleep(0.02)
os.waitpid(worker, 0)
time.sleep(0.4)
(run / "new").write_text(5 * step)
(run / "new").rename(run / "metrics.jsonl")
time.sleep(0.4)
(run / "metrics.jsonl").open("a").write(step)
time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds torchrun's workers in /proc, as Linux has it")
def test_a_restart_is_timed(monkeypatch):
    """Catches a clock that stops at a step of the dead worker or before the run goes on, and a run without restarts."""
    begun = subprocess.Popen

    def elastic(line: list[str], **options: Any) -> subprocess.Popen[bytes]:
        assert line[1:4] == ["-m", "torch.distributed.run", "--nproc_per_node=2"] and "--max-restarts=1" in line
        run = Path(line[line.index("--run.out-dir") + 1], line[line.index("--run.name") + 1])
        return begun([sys.executable, "-IS", "-c", ELASTIC, str(run)], **options)

    monkeypatch.setattr(subprocess, "Popen", elastic)
    assert 0.8 <= restart_seconds(QUICK) < 30
