"""Interrupted + resumed = uninterrupted, bit for bit, whatever the run keeps besides its weights (DESIGN section 6)."""

import json
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.processes import apart, command, words
from tests.tiny_train import PRESET, before_step, crash, flags, here, lines, same, trained, weights

KINDS: dict[str, dict[str, Any]] = {
    "muon, n-gram critic, schedules": {},
    "adamw, cross-entropy": {"train_objective": "cross-entropy", "optim_name": "adamw"},
    "dropout, student contexts": {"model_dropout": 0.2, "method_context": "student", "model_n_layer": 2},
    "imagined windows, falling": {"method_imagined_windows": 2, "method_imagined_windows_schedule": "0:2,1:0"},
    "past: ema": {"critic_kind": "self", "critic_past": "ema", "critic_ema_decay": 0.5},
    "past: ring": {"critic_kind": "self", "critic_past": "ring", "critic_ring_every": 1, "critic_ring_size": 3},
    "past: twin": {"critic_kind": "self", "critic_past": "twin", "model_dropout": 0.1},
    "group advantage, inner epochs": {
        "method_policy_weighting": "expected",
        "method_advantage": "group",
        "method_inner_epochs": 2,
        "optim_lr": 0.02,
    },
    "accumulation, bpe": {"train_grad_accum": 2, "data_tokenizer": "bpe", "data_bpe_vocab": 270},
}
EVERY_3: dict[str, Any] = {"train_checkpoint_every": 3}


def crashed(name: str, at: int, **settings) -> Path:
    """A run that died before its step `at` (0-based)."""
    with before_step(at, crash):
        assert here(PRESET, *flags(run_name=name, data_corpus="corpus.txt", **settings)).code == 1
    return Path("runs") / name


def resumed(run: Path, *more: str) -> str:
    """Resume to the end; returns what was said on stderr."""
    outcome = here("--resume", str(run), *more)
    assert outcome.code == 0, outcome.err
    return outcome.err


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
def test_resumed_equals_uninterrupted(place, settings):
    """Catches state that is not saved (momentum, EMA, ring, twin), a replayed batch, a generator that went on."""
    whole = trained("whole", **EVERY_3, **settings)
    broken = crashed("broken", 5, **EVERY_3, **settings)
    assert [line["step"] for line in lines(broken) if "train/loss" in line] == [1, 2, 3, 4, 5]
    resumed(broken)
    assert same(weights(whole), weights(broken))
    assert lines(whole) == lines(broken)
    assert (whole / "samples.txt").read_text() == (broken / "samples.txt").read_text()


def test_killed_at_a_random_moment(place):
    """Catches a checkpoint that is visible before it is whole, and state that only a clean exit writes.

    The moment is random: a failure names it. Only timing can make it pass by luck, never fail by chance.
    """
    length: dict[str, Any] = {"train_steps": 300, "eval_every": 100}
    process = apart(command, words("killed", train_checkpoint_every=10, **length))
    run, pause = Path("runs/killed"), 0.3 * random.random()
    try:
        deadline = time.monotonic() + 60
        while not (run / "checkpoints" / "latest").exists():
            assert process.is_alive() and time.monotonic() < deadline, "no checkpoint came"
            time.sleep(0.01)
        time.sleep(pause)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL, "the run was over before it was killed: make it longer"
    resumed(run)
    whole = trained("whole", **length)
    assert same(weights(run, 300), weights(whole, 300)), f"killed {pause} s after the first checkpoint"
    assert lines(run) == lines(whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_names_the_way_on(place, number, code):
    """Catches a lost step, a wrong exit code, and a printed command that does not continue the run."""
    whole = trained("whole")
    with before_step(4, lambda job: signal.raise_signal(number)):
        outcome = here(PRESET, *flags(run_name="stopped", data_corpus="corpus.txt"))
    assert outcome.code == code
    assert (place / "runs/stopped/checkpoints/step-000005/model.safetensors").is_file()
    assert not (place / "runs/stopped/result.json").exists()
    command = re.search(r"python train\.py (--resume \S+)", outcome.err)
    assert command is not None, outcome.err
    assert here(*command[1].split()).code == 0
    assert same(weights(whole), weights(Path("runs/stopped")))
    assert lines(whole) == lines(Path("runs/stopped"))


def test_signal_handlers_are_given_back(place):
    """Catches a program that calls the loop and can't be interrupted afterwards."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trained("run", train_steps=2)
    crashed("crashed", 1, train_steps=2)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_complete_run_is_left_as_it_is(place):
    """Catches a resume of a finished run that trains on, repeats lines, or fails."""
    run = trained("run")
    before, text = weights(run), (run / "metrics.jsonl").read_text()
    outcome = here("--resume", str(run))
    assert outcome.code == 0 and "complete at step 8" in outcome.out
    assert same(before, weights(run)) and (run / "metrics.jsonl").read_text() == text


def test_a_run_can_be_made_longer(place):
    """Catches a new length that is ignored or not recorded, and an evaluation rhythm that can't be changed."""
    run = trained("run")
    resumed(run, "--train.steps", "12", "--eval.every", "2")
    assert [line["step"] for line in lines(run) if "val/ce" in line] == [0, 4, 8, 10, 12]
    recorded = json.loads((run / "config.json").read_text())["config"]
    assert recorded["train"]["steps"] == 12 and recorded["eval"]["every"] == 2
    assert weights(run, 12)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("optim.lr", "0.1"), ("train.batch-size", "8"), ("method.top-k", "3"), ("run.seed", "1"), ("train.steps", "4")],
)
def test_what_would_change_the_run_is_refused(place, flag, value):
    """Catches a resume that quietly goes on as another experiment, or that records what it refused."""
    run = trained("run")
    before = (run / "config.json").read_text(), (run / "metrics.jsonl").read_text()
    outcome = here("--resume", str(run), f"--{flag}", value)
    assert outcome.code == 2 and len(outcome.errors) == 1
    assert flag in outcome.errors[0] and value in outcome.errors[0]
    assert before == ((run / "config.json").read_text(), (run / "metrics.jsonl").read_text())


def test_another_corpus_is_refused(place):
    """Catches a run that continues on a text that was edited meanwhile."""
    run = crashed("run", 5, **EVERY_3)
    (place / "corpus.txt").write_text((place / "corpus.txt").read_text() + "the end")
    outcome = here("--resume", str(run))
    assert outcome.code == 2 and "not the one that run was trained on" in outcome.errors[0]


def test_a_broken_newest_checkpoint_is_skipped(place):
    """Catches a truncated checkpoint that stops the resume, or stays there and passes for the new one."""
    whole = trained("whole", **EVERY_3)
    run = crashed("run", 7, **EVERY_3)
    newest = run / "checkpoints/step-000006/model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    said = resumed(run)
    assert said.count("skipped a broken checkpoint") == 1 and "step-000006" in said
    assert same(weights(whole, 6), weights(run, 6)) and same(weights(whole), weights(run))
    assert lines(whole) == lines(run)


def test_a_broken_final_checkpoint_is_written_again(place):
    """Catches a resume that takes the broken folder for a checkpoint that stands already."""
    run = trained("run", **EVERY_3)
    before = weights(run)
    (run / "checkpoints/step-000008/model.safetensors").write_bytes(b"")
    resumed(run)
    assert same(before, weights(run))


def test_a_new_checkpoint_outlives_a_later_broken_one(place):
    """Catches pruning by name alone: keeping one, it would keep the broken step 6 and delete the whole step 5."""
    run = crashed("run", 7, **EVERY_3)
    (run / "checkpoints/step-000006/meta.json").unlink()
    with before_step(4, lambda job: signal.raise_signal(signal.SIGTERM)):
        assert here("--resume", str(run), "--train.keep", "1").code == 143
    assert (run / "checkpoints/step-000005/meta.json").is_file()
    assert not (run / "checkpoints/step-000006").exists()


def test_when_all_checkpoints_are_broken(place):
    """Catches a traceback, or a silent start from scratch over a run's record."""
    run = crashed("run", 7, **EVERY_3)
    for weight_file in run.glob("checkpoints/*/model.safetensors"):
        weight_file.unlink()
    text = (run / "metrics.jsonl").read_text()
    outcome = here("--resume", str(run))
    assert outcome.code == 1 and len(outcome.errors) == 1
    assert "none of its 2 checkpoints is whole" in outcome.errors[0]
    assert (run / "metrics.jsonl").read_text() == text


def test_before_the_first_checkpoint_there_is_nothing_to_resume(place):
    """Catches a traceback where a run died early."""
    run = crashed("run", 2, **EVERY_3)
    outcome = here("--resume", str(run))
    assert outcome.code == 2 and "no checkpoint there yet" in outcome.errors[0]
