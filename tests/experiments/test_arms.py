"""Runs of a study: what makes two of them the same, finding them again, failing, diverging."""

import json
import math
import re
import subprocess
from pathlib import Path

import pytest

import train
from checks import ConfigError
from experiments import arms
from experiments.arms import Arm, Outcome, built, flags, run_all, run_arm
from tests.experiments.builders import PRESET, evaluation

SETTINGS = {"run.seed": 3, "optim.lr": 0.006, "critic.leave-one-out": False, "method.critic-weight-schedule": ""}


class FakeTraining:
    """subprocess.run in its place: leaves what a run leaves, counts, and ends as told."""

    def __init__(self, code: int = 0, stderr: str = "", finished: bool = True) -> None:
        self.code, self.stderr, self.finished = code, stderr, finished
        self.commands: list[list[str]] = []

    def __call__(self, words, **_):
        self.commands.append(words)
        place = Path(words[words.index("--run.out-dir") + 1]) / words[words.index("--run.name") + 1]
        place.mkdir(parents=True)
        (place / "metrics.jsonl").write_text(json.dumps(evaluation(9, 1.5)) + "\n")
        if self.finished:
            (place / "result.json").write_text("{}")
        return subprocess.CompletedProcess(words, self.code, "", self.stderr)


def arm(**settings) -> Arm:
    spelt = {name.replace("_", ".", 1).replace("_", "-"): value for name, value in settings.items()}
    return Arm("an arm", PRESET, {"run.seed": 1, **spelt})


def test_settings_and_their_flags_are_one():
    """Catches a run that trains something else than the config that it is named and checked by."""
    _, command = train.read_command([PRESET, *flags(SETTINGS)])
    assert command.config == built(PRESET, SETTINGS)
    assert command.config.optim.lr == 0.006 and command.config.critic.leave_one_out is False


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"nonsense.field": 3}, "nonsense.field = 3: there is no such setting"),
        ({"optim.rate": 3}, "optim.rate = 3"),
        ({"train.steps": "many"}, "wrong type"),
        ({"train.steps": 0}, "train.steps = 0"),
    ],
)
def test_a_setting_that_cannot_be(settings, phrase):
    """Catches a typing error in --also that shows as a traceback, or only when the first run starts."""
    with pytest.raises(ConfigError, match=re.escape(phrase)):
        built(PRESET, settings)


def test_a_name_says_what_is_computed():
    """Catches a run that is found again after its settings changed, and one that is lost with its label or folder."""
    same = [Arm("other words", PRESET, {"run.seed": 1}), arm(run_threads=2), arm(log_every=5), arm(run_out_dir="x")]
    assert {a.name for a in same} == {arm().name}
    others = [arm(optim_lr=0.1), arm(train_steps=700), arm(method_top_k=4), Arm("an arm", PRESET, {"run.seed": 2})]
    assert len({a.name for a in [arm(), *others]}) == 5


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    """Catches a resumed study that starts from nothing, and equal arms that are trained twice."""
    training = FakeTraining()
    monkeypatch.setattr(arms.subprocess, "run", training)
    wanted = [arm(), arm(optim_lr=0.1), arm(run_threads=2)]
    first = run_all(wanted, tmp_path, 2, 1)
    assert len(training.commands) == 2 and first[0].final == first[2].final
    again = run_all(wanted, tmp_path, 2, 1)
    assert len(training.commands) == 2
    assert [o.evaluations for o in again] == [o.evaluations for o in first]


def test_an_arm_that_was_cut_off_starts_again_under_its_own_name(tmp_path, monkeypatch):
    """Catches a study that reads the step-0 loss of a run that was killed before its first checkpoint."""
    place = tmp_path / arm().name
    place.mkdir()
    (place / "metrics.jsonl").write_text(json.dumps(evaluation(0, 4.2)) + "\n")
    monkeypatch.setattr(arms.subprocess, "run", FakeTraining())
    assert run_arm(arm(), tmp_path, 1).final["val/ce"] == 1.5


def test_an_interrupted_run_is_resumed(tmp_path, monkeypatch):
    """Catches a run with a checkpoint that is thrown away."""
    place = tmp_path / arm().name
    (place / "checkpoints").mkdir(parents=True)
    (place / "checkpoints" / "latest").write_text("step-000005\n")
    (place / "metrics.jsonl").write_text(json.dumps(evaluation(5, 2.0)) + "\n")
    asked = []

    def resume(words, **_):
        asked.append(words)
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(arms.subprocess, "run", resume)
    assert run_arm(arm(), tmp_path, 1).final["step"] == 5
    assert asked[0][2:] == ["--resume", str(place)]


def test_a_run_that_diverged_is_an_outcome_and_any_other_failure_is_an_error(tmp_path, monkeypatch):
    """Catches a study that dies of one rate too high, and one that takes a full disk for a bad rate."""
    said = "error: step 30: loss or gradient not finite for 20 steps in a row; there is no checkpoint yet."
    monkeypatch.setattr(arms.subprocess, "run", FakeTraining(1, said, finished=False))
    lost = run_arm(arm(), tmp_path, 1)
    assert lost.diverged and lost.loss("best") == lost.loss("final") == math.inf
    monkeypatch.setattr(arms.subprocess, "run", FakeTraining(1, "error: no space left on device", finished=False))
    with pytest.raises(RuntimeError, match=r"an arm.*no space left"):
        run_arm(arm(train_steps=900), tmp_path, 1)


def test_a_failure_stops_the_runs_that_wait(tmp_path, monkeypatch):
    """Catches a study that reports its first failure after training everything else for hours."""
    training = FakeTraining(1, "error: out of memory", finished=False)
    monkeypatch.setattr(arms.subprocess, "run", training)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_all([arm(train_steps=100 + i) for i in range(20)], tmp_path, 1, 1)
    assert len(training.commands) < 20


def test_what_a_run_reached_is_read_back(tmp_path):
    """Catches a table made from the first evaluation instead of the last, and text in place of NaN."""
    lines = ['{"step": 0, "val/ce": 4.2}', '{"step": 5, "val/ce": "nan"}', '{"step": 6, "train/loss": 1.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = arms.last_evaluation(tmp_path)
    assert found["step"] == 5 and math.isnan(found["val/ce"])
    run = Outcome(arm(), tmp_path, tuple(arms.lines(tmp_path, "val/ce")))
    assert run.best["step"] == 0 and run.loss("final") == math.inf
