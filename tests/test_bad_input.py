"""Bad input: one clear line, the right exit code, and nothing left behind (issue 2's list and its neighbours)."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

import evaluate
import export
import sample
from data import corpora
from tests.tiny_train import (
    PRESET,
    ROOT,
    Outcome,
    elsewhere,
    environment,
    files_below,
    flags,
    here,
    trained,
    write_corpus,
)


@pytest.fixture(autouse=True)
def alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and no corpus of this checkout."""

    def unreachable(*rest: Any, **options: Any) -> None:
        raise requests.ConnectionError("no network in tests")

    monkeypatch.setattr(requests, "get", unreachable)
    monkeypatch.setattr(corpora, "DATA_FOLDER", place / "data")


def assert_refused(outcome: Outcome, code: int, *phrases: str) -> None:
    """One `error:` line on stderr that holds the phrases, nothing on stdout, the exit code, no traceback."""
    assert outcome.code == code, outcome.err
    assert outcome.err.count("\n") == 1 and outcome.err.startswith("error: "), outcome.err
    assert "Traceback" not in outcome.err
    for phrase in phrases:
        assert phrase in outcome.err


SETTINGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "k > V": ({"method_top_k": 99}, ("method.top-k = 99", "the vocabulary has only 23 tokens")),
    "width and heads": ({"model_n_embd": 17}, ("model.n-embd = 17", "divisible by model.n-head = 2", "try 16")),
    "warm-up too long": ({"optim_warmup_steps": 9}, ("optim.warmup-steps = 9", "train.steps = 8")),
    "no steps": ({"train_steps": 0}, ("train.steps = 0",)),
    "odd accumulation": ({"train_grad_accum": 3}, ("train.grad-accum = 3", "must divide train.batch-size = 4")),
    "rate nan": ({"optim_lr": "nan"}, ("optim.lr = nan",)),
    "broken schedule": ({"method_critic_weight_schedule": "0:1;1:0"}, ("method.critic-weight-schedule", "no knot")),
    "k schedule above k": ({"method_top_k_schedule": "0:9"}, ("method.top-k-schedule",)),
    "group without expected": ({"method_advantage": "group"}, ("method.policy-weighting expected",)),
    "run name with a slash": ({"run_name": "a/b"}, ("run.name = 'a/b'", "plain folder name")),
    "no such device": ({"run_device": "gpu"}, ("run.device = 'gpu'", "use auto, cpu, cuda or cuda:N")),
    "a device that nobody tried": ({"run_device": "mps"}, ("run.device = 'mps'", "use auto, cpu, cuda or cuda:N")),
    "a device without a number": ({"run_device": "cuda:x"}, ("run.device = 'cuda:x'",)),
    "seed below 0": ({"run_seed": -1}, ("run.seed = -1",)),
    "seed of 33 bits": ({"run_seed": 2**32}, ("run.seed = 4294967296",)),
    "ε that float32 takes for 1": ({"method_epsilon": 0.99999999}, ("method.epsilon = 0.99999999", "float32")),
    "ε that float32 takes for 0": ({"method_epsilon": 1e-60}, ("method.epsilon = 1e-60", "float32")),
    "two dropout masks in one ratio": (
        {"method_policy_weighting": "expected", "method_advantage": "group", "method_inner_epochs": 2}
        | {"model_dropout": 0.1},
        ("model.dropout = 0.1", "method.inner-epochs"),
    ),
    "a critic of one's own, cross-fitted": (
        {"critic_kind": "model", "critic_run": "nowhere", "critic_cross_fit": True},
        ("critic.cross-fit = True", "leave critic.run out"),
    ),
    "a critic that needs a critic": (
        {"critic_kind": "model", "critic_preset": "avatarl-classic"},
        ("critic.preset = 'avatarl-classic'", "use a pretrain-… preset"),
    ),
    "a corpus with a name too long": ({"data_corpus": "long" * 75}, ("data.corpus = 'longlong", "File name too long")),
    "block larger than the text": ({"model_block_size": 4000}, ("model.block-size = 4000", "2908 tokens")),
    "block larger than validation": ({"model_block_size": 400}, ("model.block-size = 400", "validation")),
    "named corpus, no network": (
        {"data_corpus": "tinyshakespeare"},
        ("corpus 'tinyshakespeare' was not found", "can't be reached", "--data.corpus pydoc"),
    ),
    "unknown corpus": ({"data_corpus": "nope"}, ("corpus 'nope' was not found", "nope is not there")),
    "empty corpus": ({"data_corpus": "empty.txt"}, ("empty.txt is empty",)),
    "corpus not UTF-8": ({"data_corpus": "latin.txt"}, ("latin.txt", "UTF-8", "iconv")),
    "corpus too short": ({"data_corpus": "short.txt"}, ("model.block-size = 16", "'short.txt' has 9 tokens")),
    "validation text with other characters": (
        {"data_val_corpus": "greek.txt"},
        ("validation text of 'greek.txt'", "character 'Ω' at position 0"),
    ),
    "prompt with other characters": ({"eval_prompt": "Ω?"}, ("eval.prompt = 'Ω?'", "character 'Ω' at position 0")),
    "prompt is the default's, text has one line": (
        {"data_corpus": "line.txt"},
        ("eval.prompt = '\\n'", "character '\\n' at position 0"),
    ),
    "bpe vocabulary too small": ({"data_tokenizer": "bpe", "data_bpe_vocab": 100}, ("data.bpe-vocab = 100",)),
    "output below a file": ({"run_out_dir": "corpus.txt/runs"}, ("run.out-dir = 'corpus.txt/runs'", "Not a directory")),
    "output is a file": ({"run_out_dir": "corpus.txt"}, ("run.out-dir = 'corpus.txt'", "a file is in the way")),
    "output cannot be written": ({"run_out_dir": "/proc/runs"}, ("run.out-dir = '/proc/runs'", "use another folder")),
    "output for a critic cannot be written": (
        {"run_out_dir": "/proc/runs", "critic_kind": "model"},
        ("run.out-dir = '/proc/runs'", "cannot create"),
    ),
    "unknown critic preset": ({"critic_kind": "model", "critic_preset": "nope"}, ("unknown preset 'nope'",)),
    "critic that is no run": ({"critic_kind": "model", "critic_run": "nowhere"}, ("nowhere: no such run folder",)),
    "critic too large for the text": (
        {"critic_kind": "model", "critic_preset": "pretrain-char-gpu", "data_corpus": "brief.txt"},
        ("critic.preset = 'pretrain-char-gpu'", "too few for its context of 256"),
    ),
}


@pytest.mark.parametrize(("settings", "phrases"), SETTINGS.values(), ids=SETTINGS.keys())
def test_settings_that_cannot_work(place, settings, phrases):
    """Catches a traceback, a page of boxes, a run folder of a run that never was, and silence about the way out."""
    (place / "empty.txt").write_text("")
    (place / "latin.txt").write_bytes("für ".encode("latin-1") * 200)
    (place / "short.txt").write_text("ten chars\n")
    (place / "greek.txt").write_text("Ω" * 100)
    (place / "line.txt").write_text("one line of text " * 60)
    (place / "brief.txt").write_text((place / "corpus.txt").read_text()[:250])
    before = files_below(place)
    outcome = here(PRESET, *flags(**({"data_corpus": "corpus.txt"} | settings)))
    assert_refused(outcome, 2, *phrases)
    assert files_below(place) == before


def test_unknown_preset(place):
    """Catches a name that is taken for a flag, and a list in which nobody finds the one that was meant."""
    assert_refused(here("avatarl-chat"), 2, "unknown preset 'avatarl-chat'", "did you mean avatarl-char?")


@pytest.mark.parametrize(
    ("words", "unknown"),
    [(["--train.stepz", "5"], "--train.stepz"), (["avatarl-char", "pretrain-char"], "pretrain-char")],
)
def test_unknown_flag(place, words, unknown):
    """Catches a flag that is ignored; tyro draws its own box here."""
    before = files_below(place)
    outcome = here(*words)
    assert outcome.code == 2 and outcome.out == ""
    assert "nrecognized" in outcome.err and unknown in outcome.err
    assert files_below(place) == before


@pytest.mark.parametrize(("flag", "value"), [("train.steps", "many"), ("optim.name", "sgd")])
def test_value_of_another_type(place, flag, value):
    """Catches a value that is read as something else; tyro draws its own box here."""
    outcome = here(f"--{flag}", value)
    assert outcome.code == 2 and f"--{flag}" in outcome.err and value in outcome.err


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (["--resume"], "name a run folder"),
        (["--resume", "nowhere"], "nowhere: no such run folder"),
        (["--resume=."], "it has no config.json"),
        (["avatarl-char", "--resume", "x"], "leave the preset out"),
    ],
)
def test_resume_of_what_is_no_run(place, words, phrase):
    """Catches a new run that starts where an old one was to be continued."""
    before = files_below(place)
    assert_refused(here(*words), 2, phrase)
    assert files_below(place) == before


def broken(what: str) -> Callable[[Path], None]:
    """How a finished run is damaged."""

    def damage(run: Path) -> None:
        weights = run / "checkpoints/step-000008/model.safetensors"
        if what == "weights":
            weights.write_bytes(weights.read_bytes()[:-9])
        elif what == "tokenizer":
            state = json.loads((run / "tokenizer.json").read_text())
            state["characters"] = "~" + state["characters"][1:]
            (run / "tokenizer.json").write_text(json.dumps(state) + "\n")
        elif what == "config":
            (run / "config.json").write_text('{"config": ')

    return damage


@pytest.mark.parametrize("script", ["sample", "evaluate", "export", "resume"])
@pytest.mark.parametrize(
    ("what", "code", "phrase"),
    [
        ("weights", 1, "model.safetensors has"),
        ("tokenizer", 2, "tokenizer.json = "),
        ("config", 2, "config.json: not readable"),
    ],
)
def test_a_damaged_run(place, script, what, code, phrase):
    """Catches nonsense that is printed from half a checkpoint, or decoded by another run's alphabet."""
    run = trained("run", eval_ladder=0)
    broken(what)(run)
    before = files_below(place)
    mains = {"sample": sample.main, "evaluate": evaluate.main, "export": export.main}
    words = {"export": [str(run), "out"], "resume": ["--resume", str(run)]}.get(script, [str(run)])
    outcome = here(*words, **({"main": mains[script]} if script in mains else {}))
    if script == "resume" and what == "weights":  # its only checkpoint: the warning names it, the error the folder
        assert outcome.code == 1 and len(outcome.errors) == 1 and phrase in outcome.err
        assert "none of its 1 checkpoints is whole" in outcome.errors[0]
    else:
        assert_refused(outcome, code, phrase)
    assert files_below(place) == before


def test_a_prompt_that_the_vocabulary_lacks(place):
    """Catches unknown characters that are dropped, or a KeyError."""
    run = trained("run", eval_ladder=0)
    outcome = here(str(run), "--prompt", "the Ωmega", main=sample.main)
    assert_refused(outcome, 2, "character 'Ω' at position 4", "not among the 23 characters")


@pytest.mark.parametrize(
    ("trained_with", "phrase"),
    [
        ({"data_corpus": "other.txt"}, "(char, 24 tokens) is not this run's (char, 23 tokens)"),
        ({"model_block_size": 8}, "the critic's model.block-size = 8"),
        ({"data_corpus": "shifted.txt"}, "(char, 23 tokens) is not this run's (char, 23 tokens)"),
    ],
    ids=["another vocabulary", "a shorter context", "as many tokens, but others"],
)
def test_a_critic_that_does_not_fit(place, trained_with, phrase):
    """Catches a critic whose token 5 is another character, an index error, and a folder made before the check."""
    write_corpus(place / "other.txt")
    (place / "other.txt").write_text((place / "other.txt").read_text() + "~\n")
    (place / "shifted.txt").write_text((place / "corpus.txt").read_text().replace("k", "~"))
    settings = {"data_corpus": "corpus.txt", "eval_ladder": 0} | trained_with
    assert here("pretrain-char", *flags(run_name="critic", **settings)).code == 0
    before = files_below(place)
    outcome = here(PRESET, *flags(data_corpus="corpus.txt", critic_kind="model", critic_run="runs/critic"))
    assert_refused(outcome, 2, phrase)
    assert files_below(place) == before


def test_a_critic_that_has_read_the_validation_text(place):
    """Catches a judge whose opinion of the validation text is memory, and a low loss that is a leak."""
    write_corpus(place / "other.txt")
    settings = {"data_corpus": "corpus.txt", "data_val_corpus": "other.txt", "eval_ladder": 0}
    assert here("pretrain-char", *flags(run_name="critic", **settings)).code == 0
    before = files_below(place)
    outcome = here(PRESET, *flags(data_corpus="corpus.txt", critic_kind="model", critic_run="runs/critic"))
    assert_refused(outcome, 2, "critic.run = 'runs/critic'", "trained on validation text", "and that is 0.9 on")
    assert files_below(place) == before


def test_a_critic_with_a_broken_checkpoint(place):
    """Catches a run folder that is made before the critic was found to be unusable."""
    broken("weights")(trained("critic", "pretrain-char", eval_ladder=0))
    before = files_below(place)
    settings = flags(data_corpus="corpus.txt", critic_kind="model", critic_run="runs/critic")
    outcome = here(PRESET, *settings)
    assert outcome.code == 1 and len(outcome.errors) == 1 and "step-000008" in outcome.err
    assert files_below(place) == before


def test_in_a_process_of_its_own(place):
    """Catches what only a real process shows: the exit status, and what libraries print at their end."""
    outcome = elsewhere(PRESET, *flags(data_corpus="corpus.txt", method_top_k=99), cwd=place)
    assert_refused(outcome, 2, "method.top-k = 99")
    assert outcome.out == ""


def test_a_reader_that_has_gone_stops_no_training(place):
    """Catches `train.py | head`, which would end a run before its first checkpoint, and with exit code 0."""
    settings = flags(run_name="run", data_corpus="corpus.txt", eval_ladder=0)
    command = [sys.executable, str(ROOT / "train.py"), PRESET, *settings]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=place, env=environment(), **pipes) as process:
        assert process.stdout is not None and process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 0
    assert (place / "runs/run/result.json").is_file() and (place / "runs/run/checkpoints/latest").is_file()
