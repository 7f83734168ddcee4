"""explore.py: a page about a run's text, with its critic or without, and errors in one line."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import explore
from config import PRESETS
from tests.test_launch import CRITIC, JUDGED
from tests.tiny_train import PRESET, here, trained

SOFT = {"method_sparsify": "none", "method_normalize": "sum"}


def looked(run: Path, *words: str) -> tuple[dict[str, Any], str]:
    """What the page's script reads, and what the command printed."""
    outcome = here(str(run), *words, main=explore.main)
    assert outcome.code == 0, outcome.err
    document = (run / "explore.html").read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', document, re.S)
    return json.loads(data), outcome.out


def text_of(data: dict[str, Any]) -> str:
    """The text on the page."""
    return "".join(data["texts"][str(token)] for token in (data["first"], *(m[0] for m in data["moves"])))


def refused(*words: str) -> str:
    """The one line with which a command ends that cannot be done."""
    outcome = here(*words, main=explore.main)
    assert outcome.code == 2 and len(outcome.errors) == 1, outcome
    return outcome.errors[0]


def test_a_stretch_of_the_validation_text(place):
    """Catches the training text, a stretch from elsewhere, and a critic that is not asked."""
    run = trained("run")
    whole = (place / "corpus.txt").read_text()
    held_out = whole[int(0.9 * len(whole)) :]
    data, said = looked(run, "--tokens", "60")
    assert text_of(data) == held_out[:60]
    assert all(row[2] is not None and row[5] is not None for move in data["moves"] for row in move[4])
    assert "critic: ngram" in said and f"page: {run / 'explore.html'}" in said
    later, _ = looked(run, "--tokens", "20", "--at", "0.5")
    assert text_of(later) == held_out[len(held_out) // 2 :][:20]


def test_a_text_of_ones_own(place):
    """Catches a text that is not the one that was given, and one of another vocabulary that is let through."""
    run, text = trained("run"), "the queen of the sea\n"
    data, _ = looked(run, "--text", text)
    assert text_of(data) == text
    (place / "own.txt").write_text(text)
    assert looked(run, "--text-file", "own.txt")[0] == data
    assert "'ß'" in refused(str(run), "--text", "ß and ß")
    assert "has fewer than two tokens" in refused(str(run), "--text", "t")
    assert "can't be read" in refused(str(run), "--text-file", "nowhere.txt")
    assert "not both" in refused(str(run), "--text", "a", "--text-file", "own.txt")


def test_the_rules_are_those_of_a_step(place):
    """Catches weights that stand still: early in its schedules the critic alone pays, late reality has a vote."""
    run = trained("run", **SOFT)
    early, said = looked(run, "--step", "0", "--tokens", "40")
    assert "w_r 0, w_c 1," in said
    assert "w_r 0, w_c 1," in looked(run, "--step", "3", "--tokens", "40")[1]  # of 8: still the first half
    late, said = looked(run, "--tokens", "40")
    assert "w_r 0.7, w_c 0.4," in said

    def gold(data: dict[str, Any]) -> float:
        """How much gold earns on the whole."""
        return sum(row[5] for move in data["moves"] for row in move[4] if row[0] == move[0])

    assert gold(late) > gold(early)


def test_a_model_judges_again_or_is_missed(place, monkeypatch):
    """Catches another model than the run's critic, and one that is silently trained anew where it is gone."""
    monkeypatch.setitem(PRESETS, "pretrain-tiny", ("a tiny critic", None, CRITIC))
    run = trained("run", PRESET, **JUDGED)
    data, _ = looked(run, "--tokens", "30")
    assert all(row[2] is not None for move in data["moves"] for row in move[4])
    shutil.rmtree("runs/critics")
    assert "is not there any more" in refused(str(run)) and "--alone" in refused(str(run))
    data, said = looked(run, "--tokens", "30", "--alone")
    assert "critic: not asked" in said and all(row[2] is None for move in data["moves"] for row in move[4])


@pytest.mark.parametrize("settings", [{"train_objective": "cross-entropy"}, {"critic_kind": "mixed", **SOFT}])
def test_other_runs(settings, place):
    """Catches a run without a critic that is refused, and a critic of contexts that the page forgets to build."""
    data, said = looked(trained("run", **settings), "--tokens", "30")
    alone = "critic: not asked" in said
    assert alone == ("train_objective" in settings)
    assert all((row[2] is None) == alone for move in data["moves"] for row in move[4])


def test_trust_is_part_of_the_rules(place):
    """Catches rewards of a run that trusts its critic by position, shown as if it trusted everywhere alike."""
    run = trained("run", method_critic_trust="known", method_reality_weight=0.3, method_critic_weight=0.7, **SOFT)
    known, _ = looked(run, "--tokens", "60", "--step", "0")
    config = json.loads((run / "config.json").read_text())
    config["config"]["method"]["critic_trust"] = "constant"
    (run / "config.json").write_text(json.dumps(config))
    constant, _ = looked(run, "--tokens", "60", "--step", "0")
    assert known["moves"] != constant["moves"]


def test_what_cannot_be_shown_is_said(place, monkeypatch):
    """Catches a traceback for a critic that followed the student, for a wrong number, and without gradio."""
    run = str(trained("run", critic_kind="self"))
    assert "use --alone" in refused(run)
    assert "use a share" in refused(run, "--at", "1")
    assert "use 2 or more" in refused(run, "--tokens", "1")
    assert "is a folder" in refused(run, "--alone", "--out", "runs")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install gradio" in refused(run, "--alone", "--serve")
