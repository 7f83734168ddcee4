"""Runs from a cached critic: made once, found again, mended, resumed exactly, with no critic in memory."""

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

import one_run
from config import PRESETS
from tests.processes import on
from tests.test_launch import CRITIC, JUDGED
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


@pytest.fixture(autouse=True)
def tiny_critic(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pretraining preset that is over in a moment."""
    monkeypatch.setitem(PRESETS, "pretrain-tiny", ("a tiny critic", None, CRITIC))


def cached(name: str, *first: str, **settings: Any) -> Outcome:
    """A run that trains from a cache."""
    run: dict[str, Any] = {"run_name": name, "data_corpus": "corpus.txt", "critic_cache": True, "eval_ladder": 0}
    return here(*first, PRESET, *flags(**(run | settings)))


def caches() -> list[Path]:
    """The caches below runs/, oldest first."""
    return sorted(Path("runs/critics").glob("cache-*"), key=lambda p: p.stat().st_mtime_ns)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_cache_critic_makes_the_cache_and_nothing_else(place):
    """Catches a pass that also trains, one that a run makes again, and a printed command that needs another."""
    outcome = here("cache-critic", PRESET, *flags(data_corpus="corpus.txt", run_name="a b"))
    assert outcome.code == 0 and outcome.err == ""
    (folder,) = caches()
    assert files_below(place / "runs") == {"critics", *(f"critics/{folder.name}{n}" for n in ("", *parts_of(folder)))}
    # 180 windows of 16 tokens, 8 of 23 kept in 1 + 2 bytes each.
    assert f"{folder}: 69.1 kB, the 8 likeliest of 23 tokens at 180 x 16 positions" in outcome.out
    said = outcome.out.splitlines()[-1].removeprefix("train from it: python train.py ")
    assert "--run.name 'a b'" in said and said.endswith(" --critic.cache")
    before, stamp = contents(folder), (folder / "meta.json").stat().st_mtime_ns
    assert cached("a").code == 0
    assert caches() == [folder] and contents(folder) == before
    assert (folder / "meta.json").stat().st_mtime_ns == stamp
    assert json.loads(Path("runs/a/config.json").read_text())["critic_cache"] == folder.name


def parts_of(folder: Path) -> list[str]:
    return [f"/{path.name}" for path in folder.iterdir()]


def test_a_cached_model_is_not_loaded(place, monkeypatch):
    """Catches a critic in memory that nobody asks; before its first training it has to be there."""
    assert cached("a", **JUDGED).code == 0
    before = lines(Path("runs/a"))
    monkeypatch.setattr(one_run, "load_critic", lambda *_: pytest.fail("the critic was loaded"))
    outcome = cached("b", **JUDGED)
    assert outcome.code == 0 and "trained first" not in outcome.out
    assert lines(Path("runs/b")) == before
    assert len(caches()) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"data_corpus": "other.txt"},
        {"data_tokenizer": "bpe", "data_bpe_vocab": 260},
        {"data_train_start": 0.1},
        {"data_val_fraction": 0.2},
        {"model_block_size": 12},
        {"critic_cache_top": 5},
        {"critic_ngram_context": 1},
        {"critic_ngram_discount": 0.5},
        {"critic_no-leave-one-out": True},
        {"critic_kind": "model", "critic_preset": "pretrain-tiny"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_a_cache_depends_on_makes_another(place, change):
    """Catches the words of one critic, or about one text, that pass for another's."""
    write_corpus(place / "other.txt", seed=1)
    assert cached("a", train_steps=2).code == 0
    assert cached("b", train_steps=2, **change).code == 0
    assert len(caches()) == 2


def test_what_a_cache_does_not_depend_on_shares_it(place):
    """Catches a pass for every seed, student or length of training."""
    shutil.copy(place / "corpus.txt", place / "copy.txt")
    assert cached("a", train_steps=2).code == 0
    change = {"data_corpus": "copy.txt", "run_seed": 3, "model_n_embd": 24, "method_entropy_coef": 0.1}
    assert cached("b", train_steps=3, **change).code == 0
    assert len(caches()) == 1


def test_another_critics_weights_make_another_cache(place):
    """Catches a critic that was trained on meanwhile and is taken for the one that filled the cache."""
    judged = {"critic_kind": "model", "critic_run": "runs/mine"}
    critic = flags(run_name="mine", data_corpus="corpus.txt", eval_ladder=0)
    assert here("pretrain-char", *critic).code == 0
    assert cached("a", train_checkpoint_every=3, **judged).code == 0
    assert here("--resume", "runs/mine", "--train.steps", "9").code == 0
    outcome = here("--resume", "runs/a")
    assert outcome.code == 2 and "the critic's weights have changed since" in outcome.errors[0]
    assert cached("b", **judged).code == 0
    assert len(caches()) == 2


def test_another_critics_weights_are_refused_on_resume_without_a_cache_too(place):
    """Catches a resumed run that is judged, from some step on, by a critic that was trained on meanwhile."""
    critic = flags(run_name="mine", data_corpus="corpus.txt", eval_ladder=0)
    assert here("pretrain-char", *critic).code == 0
    judged: dict[str, Any] = {"critic_kind": "model", "critic_run": "runs/mine", "train_steps": 4}
    assert here(PRESET, *flags(run_name="a", data_corpus="corpus.txt", eval_ladder=0, **judged)).code == 0
    assert here("--resume", "runs/a", "--train.steps", "6").code == 0
    assert here("--resume", "runs/mine", "--train.steps", "9").code == 0
    outcome = here("--resume", "runs/a", "--train.steps", "8")
    assert outcome.code == 2 and "its weights are no longer those" in outcome.errors[0]


@pytest.mark.parametrize("settings", [{}, JUDGED | {"critic_cross_fit": True}], ids=["ngram", "two models"])
def test_a_cached_run_resumes_exactly(place, settings):
    """Catches windows cut elsewhere after a resume, and a resume that cannot do without a cache that was deleted."""
    assert cached("whole", train_checkpoint_every=3, **settings).code == 0
    with before_step(5, crash):
        assert cached("broken", train_checkpoint_every=3, **settings).code == 1
    (folder,) = caches()
    before = contents(folder)
    shutil.rmtree(folder)
    assert here("--resume", "runs/broken").code == 0
    assert contents(folder) == before
    assert same(weights(Path("runs/whole")), weights(Path("runs/broken")))
    assert lines(Path("runs/whole")) == lines(Path("runs/broken"))


def test_a_broken_byte_is_mended(place):
    """Catches a run on bits that fell over, and one that cannot go on for them."""
    assert cached("a").code == 0
    (folder,) = caches()
    before = contents(folder)
    data = bytearray(before["log_probs.bin"])
    data[1000] ^= 1
    (folder / "log_probs.bin").write_bytes(data)
    outcome = cached("b")
    assert outcome.code == 0 and "part 1 of 1 does not match its checksum; it is made again" in outcome.err
    assert contents(folder) == before and lines(Path("runs/a")) == lines(Path("runs/b"))


def test_a_cache_under_anothers_name_is_refused(place):
    """Catches a folder that was copied over another: the run would learn from what was said of another text."""
    write_corpus(place / "other.txt", seed=1)
    assert cached("a", train_steps=2).code == cached("b", train_steps=2, data_corpus="other.txt").code == 0
    mine, other = caches()
    shutil.rmtree(mine)
    other.rename(mine)
    outcome = cached("c", train_steps=2)
    assert outcome.code == 2 and f"{mine}: made for corpus = " in outcome.errors[0]
    assert not Path("runs/c").exists()


def test_no_room_is_said_before_anything_is_made(place, monkeypatch):
    """Catches a disk that fills up after hours; the size stands there before the refusal."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 69_119, 69_119))
    before = files_below(place)
    outcome = cached("a")
    assert outcome.code == 2 and "69.1 kB" in outcome.out and len(outcome.errors) == 1
    assert "critic.cache = True" in outcome.errors[0] and "make room" in outcome.errors[0]
    assert files_below(place) == before


def test_two_processes_write_one_cache(place):
    """Catches two writers of one file, and processes that train on different rows of it."""
    assert cached("alone", train_steps=4).code == 0
    before = contents(caches()[0])
    shutil.rmtree("runs/critics")
    on(2, "two", critic_cache=True, eval_ladder=0, train_steps=4)
    assert contents(caches()[0]) == before
    alone, two = (json.loads((Path("runs") / name / "result.json").read_text()) for name in ("alone", "two"))
    assert abs(alone["val_ce"] - two["val_ce"]) < 1e-4


@pytest.mark.parametrize(
    ("words", "phrases"),
    [
        (["cache-critic", "--resume", "runs/a"], ("runs/a",)),
        (["cache-critic", "nope"], ("unknown preset 'nope'",)),
        (["cache-critic", "pretrain-char", *flags(data_corpus="corpus.txt")], ("cross-entropy", "preset of AvataRL")),
        (["cache-critic", PRESET, *flags(data_corpus="corpus.txt", critic_kind="self")], ("critic.cache", "past")),
        ([PRESET, *flags(data_corpus="corpus.txt", critic_cache_top=24)], ("critic.cache-top = 24", "23 tokens")),
    ],
    ids=lambda words: " ".join(words)[:30],
)
def test_what_cannot_be_cached_is_refused(place, words, phrases):
    """Catches a traceback, a cache of nothing, and a resume that only caches."""
    before = files_below(place)
    outcome = here(*words)
    assert outcome.code == 2 and len(outcome.errors) == 1
    assert all(phrase in outcome.errors[0] for phrase in phrases)
    assert files_below(place) == before


def test_a_resume_cannot_be_cached_alone(place):
    """Catches cache-critic that trains, where it was given a run."""
    assert cached("a", train_steps=2).code == 0
    outcome = here("cache-critic", "--resume", "runs/a")
    assert outcome.code == 2 and "cache-critic --resume" in outcome.errors[0]
