"""evaluate.py: the run's own numbers again, and others on other texts."""

import json
import os
from pathlib import Path

import pytest

import evaluate
from tests.tiny_train import PRESET, files_below, flags, here, trained, write_corpus


def measured(run: Path, *words: str) -> dict:
    """The numbers as a file."""
    outcome = here(str(run), "--json", "numbers.json", *words, main=evaluate.main)
    assert outcome.code == 0, outcome.err
    return json.loads(Path("numbers.json").read_text())


def last_evaluation(run: Path, step: int = 8) -> dict:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (line,) = [n for n in found if n["step"] == step and "val/ce" in n]
    return {key: value for key, value in line.items() if key.startswith("val/")}


@pytest.mark.parametrize("settings", [{}, {"data_tokenizer": "bpe", "data_bpe_vocab": 270}, {"data_val_fraction": 0.3}])
def test_the_numbers_of_the_run_again(place, settings):
    """Catches another split, another tokenizer, another precision, or a best that is not the last."""
    run = trained("run", **settings)
    numbers = measured(run, "--batch-size", "3")
    assert {k: v for k, v in numbers.items() if k.startswith("val/")} == pytest.approx(last_evaluation(run), rel=1e-5)
    assert numbers["checkpoint"] == "step-000008"
    assert sum(row["tokens"] for row in numbers["reliability"]) == numbers["tokens"]
    gap = sum(abs(r["confidence"] - r["accuracy"]) * r["tokens"] for r in numbers["reliability"]) / numbers["tokens"]
    assert gap == pytest.approx(numbers["val/ece"])
    net = sum((r["confidence"] - r["accuracy"]) * r["tokens"] for r in numbers["reliability"]) / numbers["tokens"]
    assert net == pytest.approx(numbers["overconfidence"]) and abs(net) <= gap + 1e-9
    assert numbers["calibration"]["top"] == 5 and 0 <= numbers["calibration"]["ece"] <= 1


def test_calibration_is_of_this_text(place):
    """Catches a top-k error that is not the usual one for k = 1, and a temperature judged on what it was fit on."""
    numbers = measured(trained("run"), "--top", "1")
    of_top = numbers["calibration"]
    assert of_top["ece"] == pytest.approx(numbers["val/ece"], abs=1e-6)
    assert 0.25 <= of_top["temperature"] <= 4
    # The second half's own cross-entropy, before: near the whole text's, and not the same.
    assert of_top["ce_before"] == pytest.approx(numbers["val/ce"], rel=0.1) and of_top["ce_before"] != numbers["val/ce"]
    (place / "short.txt").write_text("the king")
    short = measured(Path("runs/run"), "--corpus", "short.txt", "--ladder", "0")
    assert "temperature" not in short["calibration"] and short["tokens"] == 7


def test_chance_is_of_a_text_that_is_long_enough(place):
    """Catches an error without its chance, or a chance that is made up for a text of a few windows."""
    run = trained("run")
    (place / "long.txt").write_text("the king and the queen " * 1000)
    outcome = here(str(run), "--corpus", "long.txt", "--ladder", "0", "--json", "long.json", main=evaluate.main)
    found = json.loads(Path("long.json").read_text())
    assert found["chance"]["stretches"] == 12 and found["chance"]["alone"] < found["val/ece"]
    assert "    by chance " in outcome.out and "12 stretches" in outcome.out
    (place / "short.txt").write_text("the king")
    outcome = here(str(run), "--corpus", "short.txt", "--ladder", "0", main=evaluate.main)
    assert outcome.code == 0 and "by chance" not in outcome.out


def test_an_earlier_checkpoint(place):
    """Catches a --checkpoint that is ignored."""
    run = trained("run", train_checkpoint_every=4)
    numbers = measured(run, "--checkpoint", "step-000004")
    assert numbers["val/ce"] == pytest.approx(last_evaluation(run, 4)["val/ce"], rel=1e-5)
    assert numbers["val/ce"] != last_evaluation(run)["val/ce"]


def test_the_ladder_is_the_runs_own(place):
    """Catches a ladder that is counted on the text it is measured on."""
    run = trained("run")
    rungs = measured(run, "--ladder", "2")["ladder"]
    assert rungs == json.loads((run / "ladder.json").read_text())
    assert "ladder" not in measured(run, "--ladder", "0")


def test_another_text(place):
    """Catches --corpus that measures on a tenth of it, or on the run's text."""
    run = trained("run")
    text = write_corpus(place / "other.txt", words=150, seed=9).read_text()
    numbers = measured(run, "--corpus", "other.txt")
    assert numbers["tokens"] == len(text) - 1 and numbers["text"] == "other.txt"
    own = measured(run, "--corpus", "corpus.txt")
    assert own["tokens"] == len((place / "corpus.txt").read_text()) - 1


def test_the_page_says_it_all(place):
    """Catches numbers that are only in the file."""
    run = trained("run")
    outcome = here(str(run), main=evaluate.main)
    for what in (
        "cross-entropy",
        "perplexity",
        "bits per byte",
        "accuracy",
        "calibration error",
        "the likeliest token is too ",
        "of the top 5",
        "best temperature",
        "n-gram ladder",
    ):
        assert what in outcome.out
    assert f"{last_evaluation(run)['val/ce']:.4f} nats" in outcome.out


def test_the_text_must_be_the_runs(place):
    """Catches numbers on an edited text that are taken for the run's."""
    run = trained("run")
    (place / "corpus.txt").write_text((place / "corpus.txt").read_text() + "the end")
    before = files_below(place)
    outcome = here(str(run), "--json", "numbers.json", main=evaluate.main)
    assert outcome.code == 2 and len(outcome.errors) == 1
    assert "is not the text this run was trained on" in outcome.errors[0]
    assert files_below(place) == before


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (["--corpus", "greek.txt"], "character 'Ω' at position 0"),
        (["--corpus", "nope"], "corpus 'nope' was not found"),
        (["--checkpoint", "step-9"], "there are step-000002"),
        (["--bins", "0"], "bins = 0"),
        (["--top", "0"], "top = 0"),
        (["--json", "absent/numbers.json"], "absent"),
    ],
)
def test_bad_input(place, words, phrase):
    """Catches a traceback, or a measurement whose result cannot be written."""
    run = trained("run", train_steps=2)
    (place / "greek.txt").write_text("Ω" * 50)
    before = files_below(place)
    outcome = here(str(run), *words, main=evaluate.main)
    assert outcome.code in (1, 2) and phrase in outcome.err and "Traceback" not in outcome.err
    assert outcome.err.startswith("error: ") or words[0] in ("--bins", "--top"), outcome.err
    assert files_below(place) == before


def test_it_reads_a_run_from_anywhere(place, monkeypatch):
    """Catches a corpus path that is looked for beside the present folder instead of where the run found it."""
    run = here(PRESET, *flags(run_name="run", data_corpus=str(place / "corpus.txt")))
    assert run.code == 0
    os.mkdir("inside")
    monkeypatch.chdir("inside")
    assert here("../runs/run", main=evaluate.main).code == 0
