"""Operating between two steps: what was tried is what is kept, and what is told of it is measured where it says."""

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from surgery.commits import HeldOut
from surgery.companion import LOG, Surgeries, read_trials
from surgery.operation import Operator
from surgery.settings import AcceptConfig
from surgery.surgeon import RandomSurgeon
from tests.surgery.patients import BLOCK, bits, unchanged
from tests.surgery.tasks import TEXT, task
from tests.surgery.test_commits import CPU

ALWAYS = -1e9  # standard errors that any edit exceeds


def job_of(one: Any, folder: Any, step: int) -> tuple[Any, list[dict[str, Any]]]:
    """As much of a job as a companion looks at, and the lines that it writes."""
    lines: list[dict[str, Any]] = []
    recorder = SimpleNamespace(write=lines.append, say=lambda text: None)
    state = SimpleNamespace(step=step, seconds=1.0)
    objective = SimpleNamespace(student=one.model)
    return SimpleNamespace(state=state, objective=objective, folder=folder, recorder=recorder, tokens_per_step=8), lines


def surgeries(one: Any, z: float) -> Surgeries:
    """Chance on a patient; held-out and unseen windows are two halves of a text."""
    settings = AcceptConfig(every=5, windows=8)
    object.__setattr__(settings, "z", z)  # below what the settings allow, so that every edit is kept
    held_out, unseen = (HeldOut(half, BLOCK, windows=8, seed=1) for half in (TEXT[:300], TEXT[300:]))
    return Surgeries(RandomSurgeon(one, candidates=4, seed=1), held_out, unseen, settings, CPU)


def test_a_kept_edit_is_the_one_that_was_tried(tmp_path):
    """Catches a commit of another candidate than the best, gains measured after the commit, and unseen = held-out."""
    one = task()
    before = copy.deepcopy(one.model)
    companion, (job, lines) = surgeries(one, ALWAYS), job_of(one, tmp_path, 5)
    companion.after_step(job)
    (told,) = read_trials(tmp_path)
    found = RandomSurgeon(task(), candidates=4, seed=1).round()
    (action,) = one.surgeries(found.actions[found.best : found.best + 1])
    assert torch.equal(torch.tensor(told["action"]), action.cpu())
    operator = Operator(before, one.layers, one.settings.rank)
    for windows, gain, noise in (
        (companion.held_out, "gain", "noise"),
        (companion.unseen, "unseen_gain", "unseen_noise"),
    ):
        trial = windows.trial(before, operator, action, 5, CPU)
        assert (told[gain], told[noise]) == pytest.approx((trial.gain, trial.noise), abs=1e-7)
    assert told["gain"] != told["unseen_gain"] and told["accepted"]
    operator.apply(action)
    assert unchanged(one.model, bits(before))
    assert lines[0]["surgery/accepted"] == 1 and lines[0]["surgery/gain"] == told["gain"]


def test_a_refused_edit_leaves_the_student_and_is_told(tmp_path):
    """Catches edits that are made anyway, refused ones that nobody counts, and operations when none is due."""
    one = task()
    before = bits(one.model)
    companion = surgeries(one, 1e9)
    for step in (4, 5, 10, 11):
        companion.after_step(job_of(one, tmp_path, step)[0])
    told = read_trials(tmp_path)
    assert [t["step"] for t in told] == [5, 10] and not any(t["accepted"] or "unseen_gain" in t for t in told)
    assert unchanged(one.model, before) and not (tmp_path / "surgeries").exists()
    again = surgeries(one, 1e9)
    again.count(tmp_path)
    assert (again.trials, again.commits) == (2, 0)
    (tmp_path / LOG).write_text(json.dumps(told[0] | {"accepted": True}) + "\n")
    again.count(tmp_path)
    assert (again.trials, again.commits) == (1, 1)
