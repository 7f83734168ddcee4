"""Critics that a run trains for itself, and the corpus that is always there."""

import json
import signal
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests

from config import PRESETS
from data import corpora
from files import held
from tests.tiny_train import (
    PRESET,
    Outcome,
    before_step,
    crash,
    files_below,
    flags,
    here,
    lines,
    same,
    weights,
    write_corpus,
)

CRITIC: dict[str, Any] = {
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "bias": False},
    "train": {"objective": "cross-entropy", "steps": 6, "batch_size": 4, "checkpoint_every": 2},
    "optim": {"warmup_steps": 2},
    "eval": {"every": 0, "ladder": 0, "sample_tokens": 5},
    "log": {"every": 1},
}
JUDGED = {"critic_kind": "model", "critic_preset": "pretrain-tiny", "eval_ladder": 0}


@pytest.fixture(autouse=True)
def tiny_critic(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pretraining preset that is over in a moment."""
    monkeypatch.setitem(PRESETS, "pretrain-tiny", ("a tiny critic", None, CRITIC))


def judged(name: str, **settings: Any) -> Outcome:
    """A run with a model critic."""
    return here(PRESET, *flags(**({"run_name": name, "data_corpus": "corpus.txt"} | JUDGED | settings)))


def critics() -> list[str]:
    """Names of the critics' folders."""
    return sorted(p.name for p in Path("runs/critics").iterdir())


def test_a_critic_trained_on_all_of_the_text_is_another(place):
    """Catches a run whose critic was trained, for a run that validates elsewhere, on this one's validation text."""
    write_corpus(place / "other.txt")
    assert judged("a", data_val_corpus="other.txt").code == 0
    assert judged("b").code == 0
    assert len(critics()) == 2
    named = [json.loads((place / "runs" / name / "config.json").read_text())["critics"] for name in ("a", "b")]
    assert named[0] != named[1]


def test_a_critic_that_another_process_trains_is_waited_for(place):
    """Catches two runs that write the same critic's checkpoints, and one that then trains it again."""
    assert judged("a").code == 0
    (name,) = critics()
    result = place / "runs" / "critics" / name / "result.json"
    done = result.read_text()
    result.unlink()  # as if it were still being trained, by whoever holds the folder

    def completed() -> None:
        result.write_text(done)
        at_work.close()

    with ExitStack() as at_work:
        assert at_work.enter_context(held(result.parent))
        threading.Timer(1.0, completed).start()
        outcome = judged("b")
    assert outcome.code == 0 and critics() == [name]
    assert outcome.err.startswith("waiting for another process, which is at this critic: ")
    assert "the critic is trained first" not in outcome.out


def test_a_run_that_is_at_work_is_not_resumed(place):
    """Catches two processes that train one run, of which each undoes the other's checkpoints."""
    assert judged("a").code == 0
    before = files_below(place)
    with held(Path("runs/a")):
        outcome = here("--resume", "runs/a", "--train.steps", "9")
    assert outcome.code == 2 and "runs/a: another process is training this run" in outcome.errors[0]
    assert files_below(place) == before
    assert here("--resume", "runs/a", "--train.steps", "9").code == 0


def test_a_missing_critic_is_trained_and_then_found_again(place):
    """Catches a critic that is trained for every run, or that a run does not name."""
    first = judged("a")
    assert first.code == 0 and "the critic is trained first, once: pretrain-tiny" in first.out
    (name,) = critics()
    assert json.loads((place / "runs/critics" / name / "result.json").read_text())["steps"] == 6
    before = {p: p.read_bytes() for p in Path("runs/critics").rglob("*") if p.is_file()}
    # Another run, of another length and seed of its settings, that the critic does not depend on.
    second = judged("b", train_steps=5, method_top_k=3, eval_every=2)
    assert second.code == 0 and "trained first" not in second.out
    assert before == {p: p.read_bytes() for p in Path("runs/critics").rglob("*") if p.is_file()}
    for run in ("a", "b"):
        assert json.loads((place / "runs" / run / "config.json").read_text())["critics"] == [name]
    assert "train/reward" in lines(Path("runs/a"))[-2]


@pytest.mark.parametrize(
    "change",
    [
        {"data_corpus": "other.txt"},
        {"data_tokenizer": "bpe", "data_bpe_vocab": 260},
        {"run_seed": 7},
        {"data_val_fraction": 0.2},
        {"model_block_size": 20},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_a_critic_depends_on_makes_another(place, change):
    """Catches a critic of another text, alphabet, split, context or seed that passes for this run's."""
    write_corpus(place / "other.txt", seed=1)
    assert judged("a", train_steps=2).code == 0
    assert judged("b", train_steps=2, **change).code == 0
    assert len(critics()) == 2


def test_one_text_under_two_names_has_one_critic(place):
    """Catches a hash of the path where the content counts."""
    write_corpus(place / "copy.txt")
    assert judged("a", train_steps=2).code == judged("b", train_steps=2, data_corpus="copy.txt").code == 0
    assert len(critics()) == 1


def test_a_critic_of_ones_own(place):
    """Catches critic.run that is ignored in favour of a critic trained anew."""
    assert here("pretrain-char", *flags(run_name="mine", data_corpus="corpus.txt")).code == 0
    assert judged("a", critic_run="runs/mine").code == 0
    assert not Path("runs/critics").exists()
    assert json.loads((place / "runs/a/config.json").read_text())["critics"] == ["mine"]


def test_cross_fitting_trains_two(place):
    """Catches two critics of one half, of overlapping halves, or of the validation text."""
    assert judged("a", critic_cross_fit=True, data_train_start=0.2, train_steps=2).code == 0
    parts = []
    for name in critics():
        record = json.loads((place / "runs/critics" / name / "config.json").read_text())
        parts.append((record["config"]["data"]["train_start"], record["config"]["data"]["train_stop"]))
    assert [round(x, 9) for part in sorted(parts) for x in part] == [0.2, 0.6, 0.6, 1.0]
    assert judged("b", critic_cross_fit=True, data_train_start=0.2, train_steps=2).code == 0
    assert len(critics()) == 2


@pytest.mark.parametrize("at", [1, 4], ids=["before its first checkpoint", "after it"])
def test_an_interrupted_critic_is_continued(place, at):
    """Catches a half-trained critic that judges, one that can never be completed, and lines that stand twice."""
    assert judged("whole", run_out_dir="elsewhere").code == 0
    with before_step(at, crash):
        assert judged("a").code == 1
    assert not Path("runs/a").exists()
    again = judged("a")
    assert again.code == 0 and ("resuming" in again.out) is (at == 4)
    (name,) = critics()
    mine, whole = Path("runs/critics") / name, Path("elsewhere/critics") / name
    assert same(weights(mine, 6), weights(whole, 6)) and lines(mine) == lines(whole)
    assert (mine / "samples.txt").read_text() == (whole / "samples.txt").read_text()
    assert same(weights(Path("runs/a")), weights(Path("elsewhere/whole")))


def test_ctrl_c_while_the_critic_trains(place):
    """Catches a run that starts with whatever the critic was at that moment, or ends as if all were well."""
    with before_step(2, lambda job: signal.raise_signal(signal.SIGINT)):
        stopped = judged("a")
    assert stopped.code == 130 and not Path("runs/a").exists()
    assert "give the same command again" in stopped.err
    assert judged("a").code == 0


def test_a_run_with_a_model_critic_resumes_exactly(place):
    """Catches a critic that changes with the student, or another one after the resume."""
    assert judged("whole", train_checkpoint_every=3).code == 0
    (name,) = critics()
    frozen = weights(Path("runs/critics") / name, 6)
    with before_step(5, crash):
        assert judged("broken", train_checkpoint_every=3).code == 1
    assert here("--resume", "runs/broken").code == 0
    assert same(weights(Path("runs/whole")), weights(Path("runs/broken")))
    assert lines(Path("runs/whole")) == lines(Path("runs/broken"))
    assert same(frozen, weights(Path("runs/critics") / name, 6))


@pytest.fixture
def nothing_to_be_had(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network, and no corpus of this checkout."""

    def unreachable(*rest: Any, **options: Any) -> None:
        raise requests.ConnectionError("no network in tests")

    monkeypatch.setattr(requests, "get", unreachable)
    monkeypatch.setattr(corpora, "DATA_FOLDER", place / "data")
    return place


def test_without_network_and_corpus_the_embedded_one_is_used(nothing_to_be_had):
    """Catches a newcomer's first command that fails, a fall-back that nobody sees, and a record that hides it."""
    outcome = here(PRESET, *flags(run_name="run", eval_every=0, train_steps=2, eval_ladder=0))
    assert outcome.code == 0
    assert outcome.err.count("warning:") == 1 and "using the embedded corpus pydoc" in outcome.err
    corpus = json.loads(Path("runs/run/config.json").read_text())["corpus"]
    assert (corpus["name"], corpus["fallback"], corpus["source"]) == ("pydoc", True, "embedded")
    # It continues on the text that it began with.
    assert here("--resume", "runs/run", "--train.steps", "3").code == 0


def test_a_named_corpus_has_no_stand_in(nothing_to_be_had):
    """Catches a run of tinyshakespeare that trained on something else."""
    before = files_below(nothing_to_be_had)
    outcome = here(PRESET, *flags(data_corpus="tinyshakespeare"))
    assert outcome.code == 2 and len(outcome.errors) == 1
    assert files_below(nothing_to_be_had) == before
