"""Numbers always reach metrics.jsonl; Weights & Biases only when asked, and never at the run's cost."""

import importlib.util
import json
import math
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from config import Config, ConfigError, override
from tests.processes import command, together
from tests.tiny_train import PRESET, elsewhere, flags, here, lines, trained
from training.record import Recorder, require_wandb, start_wandb


def recorder(folder: Path, **options: Any) -> Recorder:
    return Recorder(folder, **({"first": True, "steps": 3, "start": 0} | options))


def test_every_line_is_json(tmp_path):
    """Catches NaN and Infinity, which are no JSON, and lines that are lost when the process dies."""
    with recorder(tmp_path) as record:
        record.write({"step": 1, "train/loss": math.nan, "val/ce": math.inf, "lr": 0.5})
        text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads(text, parse_constant=refuse)
    assert line == {"step": 1, "train/loss": "nan", "val/ce": "inf", "lr": 0.5}


def test_a_record_is_continued(tmp_path):
    """Catches a resume that empties the file."""
    for step in (1, 2):
        with recorder(tmp_path) as record:
            record.write({"step": step})
    assert [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_other_processes_are_silent(tmp_path, capsys):
    """Catches every line eight times on eight processes."""
    with recorder(tmp_path, first=False) as record:
        record.write({"step": 1})
        record.say("hello")
        record.warn("oh")
        record.advance(loss="1")
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


def test_warnings_go_to_stderr(tmp_path, capsys):
    """Catches warnings among the output that a pipe reads."""
    with recorder(tmp_path) as record:
        record.say("hello")
        record.warn("oh")
    out, err = capsys.readouterr()
    assert out == "hello\n" and err == "warning: oh\n"


class FakeWandb(types.ModuleType):
    """Notes what it is told; with `failure`, nothing works."""

    def __init__(self, failure: Exception | None = None) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
        self.failure = failure
        self.options: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.codes: list[int] = []

    def init(self, **options: Any) -> "FakeWandb":
        if self.failure:
            raise self.failure
        self.options = options
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.codes.append(exit_code)


def asked(mode: str) -> Config:
    return override(Config(), log={"wandb": mode})


def test_disabled_imports_nothing(tmp_path, monkeypatch):
    """Catches a default that needs the library."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    require_wandb(Config())
    assert start_wandb(Config(), tmp_path, {"id": "x"}, resume=False) is None


def test_missing_is_one_line(place, monkeypatch):
    """Catches a run that dies of a missing option only after its folder was made."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        require_wandb(asked("offline"))
    outcome = here(PRESET, *flags(data_corpus="corpus.txt", log_wandb="online"))
    assert outcome.code == 2 and len(outcome.errors) == 1 and "pip install wandb" in outcome.errors[0]
    assert not (place / "runs").exists()


def test_what_wandb_is_told(place, monkeypatch):
    """Catches keys that differ from metrics.jsonl, a run that a resume can't find again, an end that is not told."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = trained("run", log_wandb="offline", log_wandb_project="mine")
    record = json.loads((run / "config.json").read_text())
    assert fake.options["mode"] == "offline" and fake.options["project"] == "mine"
    assert fake.options["id"] == record["id"] and fake.options["name"] == "run"
    assert fake.options["config"]["config"]["train"]["steps"] == 8
    logged = [(step, set(values)) for step, values in fake.logged]
    assert logged == [(n["step"], set(n)) for n in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]
    assert fake.codes == [0]
    assert here("--resume", str(run), "--train.steps", "9").code == 0
    assert fake.options["resume"] == "allow" and fake.options["id"] == record["id"]


def test_wandb_out_of_reach_costs_nothing(place, monkeypatch):
    """Catches a dead network that stops a run, or one that nobody hears of."""
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(failure=OSError("no route to host")))
    outcome = here(PRESET, *flags(run_name="run", data_corpus="corpus.txt", log_wandb="online"))
    assert outcome.code == 0 and "warning: wandb is out of reach (no route to host)" in outcome.err
    assert lines(Path("runs/run"))[-1]["step"] == 8


@pytest.mark.parametrize("failing", ["log", "finish"])
def test_wandb_that_fails_later_costs_nothing_either(place, monkeypatch, failing):
    """Catches a library that raises in the middle of a run, or at its end, before result.json is written."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(FakeWandb, failing, mock.Mock(side_effect=OSError("no space left")))
    outcome = here(PRESET, *flags(run_name="run", data_corpus="corpus.txt", log_wandb="offline"))
    assert outcome.code == 0
    assert outcome.err.count("warning: wandb failed (no space left)") == 1
    assert lines(Path("runs/run"))[-1]["step"] == 8 and Path("runs/run/result.json").is_file()


def told(line: list[str]) -> tuple[int, int]:
    """A run in this process of several: its exit code, and how many lines a fake wandb heard from it."""
    fake = FakeWandb()
    with mock.patch.dict(sys.modules, {"wandb": fake}):
        return command(line).code, len(fake.logged) + len(fake.codes) + len(fake.options)


def test_of_two_processes_the_first_alone_tells_wandb(place):
    """Catches a run that torchrun starts and that stands in wandb once for every process."""
    settings = flags(run_name="run", data_corpus="corpus.txt", log_wandb="offline", train_steps=2, eval_ladder=0)
    (first, heard), (second, other) = together(2, told, [PRESET, *settings])
    assert (first, second) == (0, 0) and heard > 4 and other == 0


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_offline_needs_no_account(place, monkeypatch):
    """Catches a login that is asked for, or files outside the run's folder."""
    for name in ("WANDB_API_KEY", "WANDB_DIR", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(place / "home"))
    settings = flags(run_name="run", data_corpus="corpus.txt", log_wandb="offline", train_steps=2)
    outcome = elsewhere(PRESET, *settings, cwd=place, timeout=120)
    assert outcome.code == 0 and "out of reach" not in outcome.err, outcome.err
    assert list((place / "runs/run/wandb").glob("offline-run-*/*.wandb"))
    assert not (place / "wandb").exists()
