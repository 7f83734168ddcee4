"""train.py's command line: what it prints before anything runs, and that every flag reaches the run."""

import json
from pathlib import Path

import pytest
import torch

import forecasting.report
import train
from config import PRESETS, override, preset
from forecasting.speed import Speed
from tests.tiny_train import PRESET, files_below, flags, here, trained

GROUPS = ("run", "data", "model", "critic", "method", "optim", "train", "eval", "log")


def test_help_is_complete_and_readable(place):
    """Catches a group, a preset or the launch lines missing from --help, or a help that does work first."""
    before = files_below(place)
    outcome = here("--help")
    assert outcome.code == 0 and outcome.err == ""
    for group in GROUPS:
        assert f"--{group}." in outcome.out
    for name, (what, _, _) in PRESETS.items():
        assert name in outcome.out and what[:30] in outcome.out
    assert "python train.py --resume runs/NAME" in outcome.out and "train.py cache-critic PRESET" in outcome.out
    assert files_below(place) == before


def test_help_shows_every_knob_with_its_docstring(place):
    """Catches a field without explanation or without its preset's value as default."""
    text = " ".join(here("avatarl-classic", "--help").out.split())
    for group, values in preset("avatarl-classic").to_dict().items():
        for name, value in values.items():
            turned_off = "no-" if value is True else ""
            assert f"--{group}.{turned_off}{name}".replace("_", "-") in text
    assert "Largest global gradient norm; 0: no clipping" in text
    assert "default: 64" in text  # the preset's context, where the dataclass has 1024


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_had(place, monkeypatch, name):
    """Catches a preset that its own checks refuse."""
    monkeypatch.setattr(forecasting.report, "measure", lambda *_: Speed("not at all", 1.0, 1e-3, 1e9))
    outcome = here(name, "--dry-run")
    assert outcome.code == 0 and name in outcome.out and outcome.err == ""


def test_a_cache_is_forecast_by_the_command_that_makes_it(place, monkeypatch):
    """Catches `cache-critic --dry-run` that forecasts another run, or writes the cache."""
    monkeypatch.setattr(forecasting.report, "measure", lambda *_: Speed("not at all", 1.0, 1e-3, 1e9))
    before = files_below(place)
    outcome = here("cache-critic", PRESET, "--dry-run")
    assert outcome.code == 0 and "\ncache " in outcome.out and "MB on disk" in outcome.out
    assert files_below(place) == before


def test_a_wide_word_of_every_kind_reaches_the_config(place):
    """Catches flags that are parsed and dropped: booleans, None, schedules, choices, numbers."""
    name, command = train.read_command(
        [
            "avatarl-classic",
            *("--model.bias", "--data.corpus", "x.txt", "--optim.lr", "3e-3", "--critic.no-leave-one-out"),
            *("--method.critic-weight-schedule", "0:0.8,1:0.1", "--train.objective", "cross-entropy"),
        ]
    )
    c = command.config
    assert name == "avatarl-classic" and not command.dry_run and command.resume is None
    assert c.model.bias is True and c.data.corpus == "x.txt" and c.optim.lr == 3e-3 and c.critic.leave_one_out is False
    assert c.method.knots("critic_weight") == ((0.0, 0.8), (1.0, 0.1)) and c.train.objective == "cross-entropy"
    assert c.model.n_embd == preset("avatarl-classic").model.n_embd


def test_the_default_preset_suits_the_hardware(monkeypatch):
    """Catches a ten-million-parameter default on a laptop, and a toy on a GPU."""
    for gpu, expected in ((False, "avatarl-char"), (True, "avatarl-char-gpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert train.read_command([])[0] == expected
        shorter = override(preset(expected), train={"steps": 500})
        assert train.read_command(["--train.steps", "500"])[1].config == shorter


def test_a_run_is_named_after_its_preset(place):
    """Catches runs that all end up under one name, and a name that --run.name does not change."""
    outcome = here("pretrain-char", *flags(data_corpus="corpus.txt", train_steps=2, eval_ladder=0))
    assert outcome.code == 0 and (place / "runs/pretrain-char/result.json").is_file()
    assert "sample: python sample.py runs/pretrain-char" in outcome.out


def test_what_is_derived_is_said_first(place):
    """Catches a start that leaves the user guessing: text, vocabulary, parameters, steps, epochs, hardware."""
    outcome = here(PRESET, *flags(data_corpus="corpus.txt", train_steps=2, run_name="run"))
    head = outcome.out[: outcome.out.index("step      0")]
    for what in ("2,908 training, 324 validation tokens", "vocabulary 23", "parameters", "2 steps x 64 tokens",
                 "epochs", "1 CPU thread", "critic: ngram", f"preset {PRESET}"):  # fmt: skip
        assert what in head
    assert outcome.err == ""  # nothing there that a script would take for trouble


def test_resume_takes_its_settings_from_the_run(place):
    """Catches a resume whose defaults are the default preset's, and a record that forgets the preset."""
    run = trained("run", "pretrain-char", train_steps=2, model_n_embd=24, eval_ladder=0)
    name, command = train.read_command(["--resume", str(run), "--train.steps", "3"])
    assert name == "pretrain-char" and command.resume == run
    assert command.config.model.n_embd == 24 and command.config.train.steps == 3
    assert train.read_command([f"--resume={run}"])[1].config.train.steps == 2


def test_result_json_sums_the_run_up(place):
    """Catches totals that disagree with the last line of the record."""
    run = trained("run")
    result = json.loads((run / "result.json").read_text())
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert (result["steps"], result["tokens"], result["skipped_steps"]) == (8, 8 * 64, 0)
    assert result["val_ce"] == last["val/ce"] and result["best_val_ce"] <= result["val_ce"]
    assert result["seconds"] > 0 and 0.05 < result["peak_memory_gb"] < 100
    assert [r["context"] for r in json.loads(Path(run / "ladder.json").read_text())] == [1, 2]
