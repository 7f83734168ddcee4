"""Bootstrapping runs from the command line: every preset end to end, exact resume, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from config import PRESETS, ConfigError, override, preset
from config_bootstrap import BootstrapConfig
from tests.processes import trained_together
from tests.tiny_train import Outcome, before_step, crash, files_below, flags, here, lines, same, trained, weights

NAMES = [name for name in PRESETS if name.startswith("bootstrap-")]
EVERY_3: dict[str, Any] = {"train_checkpoint_every": 3}
# What a tiny run needs for its parts to matter within its 8 steps.
QUICK: dict[str, dict[str, Any]] = {
    "bootstrap-curriculum": {
        "bootstrap_stage_window": 1,
        "bootstrap_stage_min_steps": 2,
        "bootstrap_stage_max_steps": 2,
    },
    "bootstrap-selfplay": {"critic_ring_every": 2},
    "bootstrap-best": {"bootstrap_soft_context": 2},
}
RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, QUICK.get(name, {})) for name in NAMES},
    "twin": ("bootstrap-selfplay", {"bootstrap_opponent": "twin", "model_dropout": 0.1}),
    "ema": ("bootstrap-selfplay", {"bootstrap_opponent": "ema", "critic_ema_decay": 0.5}),
    "horizon, inner epochs": ("bootstrap-sampled", {"bootstrap_horizon": 3, "bootstrap_inner_epochs": 2}),
    "windows, accumulation": (
        "bootstrap-sampled",
        {"bootstrap_contexts": "windows", "bootstrap_row": 24, "model_dropout": 0.1, "train_grad_accum": 2},
    ),
    "suffix array": ("bootstrap-best", {"bootstrap_soft": "suffix", "bootstrap_soft_context": 3}),
}


def test_the_presets_are_there():
    """Catches a preset that was renamed, and one that no longer trains by this objective."""
    wanted = ("sampled", "exhaustive", "confidence", "curriculum", "selfplay", "best")
    assert [f"bootstrap-{name}" for name in wanted] == NAMES
    assert {preset(name).train.objective for name in NAMES} == {"bootstrap"}
    assert all(preset(name).model.block_size == 8 for name in NAMES[:-1])


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_runs(place, name):
    """Catches a preset that fails, learns nothing measurable, or logs no reward, speed and health."""
    run = trained("run", preset=name, train_steps=6, **QUICK.get(name, {}))
    found = lines(run)
    last = [line for line in found if "train/loss" in line][-1]
    assert last["step"] == 6
    keys = {"train/reward", "train/reward_std", "bootstrap/accuracy", "bootstrap/reward_mean", "health/ece"}
    assert keys <= set(last)
    assert "bootstrap/decisions_per_second" in (run / "metrics.jsonl").read_text()
    assert (run / "report.html").is_file() and (run / "ladder.json").is_file()
    assert (run / "samples.txt").read_text().count("=== step") == sum("val/ce" in line for line in found)


@pytest.mark.parametrize(("name", "settings"), RESUMED.values(), ids=RESUMED.keys())
def test_resumed_equals_uninterrupted(place, name, settings):
    """Catches what is not saved: a stage, a ring, a twin, the health monitor's memory, a draw that is not keyed."""
    whole = trained("whole", preset=name, **EVERY_3, **settings)
    with before_step(5, crash):
        outcome = here(name, *flags(run_name="broken", data_corpus="corpus.txt", **EVERY_3, **settings))
    assert outcome.code == 1
    outcome = here("--resume", "runs/broken")
    assert outcome.code == 0, outcome.err
    broken = Path("runs/broken")
    assert same(weights(whole), weights(broken))
    assert timeless(whole) == timeless(broken)


def timeless(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock decides."""
    return [{k: v for k, v in line.items() if not k.endswith("_per_second")} for line in lines(run)]


SHARED = {
    "curriculum": ("bootstrap-curriculum", {**QUICK["bootstrap-curriculum"], "log_every": 2}),
    "sampled": ("bootstrap-sampled", {"log_every": 2}),
}


@pytest.mark.parametrize(("name", "settings"), SHARED.values(), ids=SHARED.keys())
def test_two_processes_are_one(place, name, settings):
    """Catches draws, means or a curriculum's progress that depend on how many share the batch.

    A calibration error is no mean over decisions: that of a batch is the mean of its processes' own.
    """
    one = trained("one", preset=name, **settings)
    trained_together(2, [name, *flags(run_name="two", data_corpus="corpus.txt", **settings)])
    for line, other in zip(timeless(one), timeless(Path("runs/two")), strict=True):
        shared = [k for k in line if k not in ("health/ece", "health/status")]
        assert {k: line[k] for k in shared} == pytest.approx({k: other[k] for k in shared}, rel=1e-3, abs=1e-4)
    for name, weight in weights(one).items():
        torch.testing.assert_close(weight, weights(Path("runs/two"))[name], rtol=1e-3, atol=1e-4)


def test_windows_and_sequences_are_the_same_run(place):
    """Catches forms of context that differ where their contexts are the same: rows of one window."""
    runs = [
        trained(form, preset="bootstrap-sampled", bootstrap_contexts=form, train_steps=4)
        for form in ("sequence", "windows")
    ]
    assert timeless(runs[0]) == timeless(runs[1]) and same(*(weights(run, 4) for run in runs))


def test_longer_rows_count_as_tokens(place):
    """Catches tokens counted by the model's context where windows slide over longer rows."""
    settings: dict[str, Any] = {"bootstrap_contexts": "windows", "bootstrap_row": 40, "train_steps": 2}
    run = trained("run", preset="bootstrap-exhaustive", **settings)
    assert lines(run)[-1]["tokens"] == 2 * 4 * 40


def test_evaluations_at_chosen_steps(place):
    """Catches a close look at the start that is not taken, or that replaces the rhythm."""
    run = trained("run", preset="bootstrap-exhaustive", eval_also_at="1,3,99")
    assert [line["step"] for line in lines(run) if "val/ce" in line] == [0, 1, 3, 4, 8]


def test_the_collapse_is_seen_within_200_steps(place):
    """Catches a monitor that sleeps through what it is for: the exact policy gradient with gold alone as reward.

    On a text of 23 characters it takes some tens of steps; the preset's own run is a study (experiments/).
    """
    settings: dict[str, Any] = {"train_steps": 60, "eval_every": 0, "optim_lr": 0.03, "eval_sample_tokens": 0}
    run = trained("run", preset="bootstrap-exhaustive", eval_ladder=0, **settings)
    status = [(line["step"], line["health/status"]) for line in lines(run) if "health/status" in line]
    assert status[0][1] == 0 and max(s for _, s in status) == 2
    healthy = trained(
        "healthy", preset="bootstrap-exhaustive", eval_ladder=0, bootstrap_policy_weighting="reinforce", **settings
    )
    assert max(line.get("health/confidence_gap", 0.0) for line in lines(healthy)) < 0.3


def refused(outcome: Outcome, *phrases: str) -> None:
    """One line that says what and why, exit code 2."""
    assert outcome.code == 2, outcome.err
    assert outcome.err.count("\n") == 1 and outcome.err.startswith("error: ")
    for phrase in phrases:
        assert phrase in outcome.err


BAD: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "one character": ("exhaustive", {"data_corpus": "same.txt"}, ("every token is the same",)),
    "vocabulary above the table limit": (
        "sampled",
        {"data_tokenizer": "bpe", "data_bpe_vocab": 1024},
        ("the limit is", "suffix array"),
    ),
    "a group of one": ("sampled", {"bootstrap_samples": 1}, ("bootstrap.samples = 1", "at least 2")),
    "unknown stage": (
        "curriculum",
        {"bootstrap_stages": "frequencies,bigram"},
        ("bootstrap.stages = 'bigram'", "did you mean bigrams?"),
    ),
    "stages of tokens": (
        "curriculum",
        {"data_tokenizer": "bpe", "data_bpe_vocab": 270},
        ("bootstrap.stages", "--data.tokenizer char"),
    ),
    "horizon, exhaustive": ("exhaustive", {"bootstrap_horizon": 2}, ("bootstrap.horizon = 2", "V^H")),
    "horizon beyond the row": ("sampled", {"bootstrap_horizon": 17}, ("bootstrap.horizon = 17", "16 tokens")),
    "horizon with dropout": ("sampled", {"bootstrap_horizon": 2, "model_dropout": 0.1}, ("model.dropout = 0.1",)),
    "epochs without a ratio": ("best", {"bootstrap_inner_epochs": 2}, ("bootstrap.inner-epochs = 2", "ratio")),
    "centred log π": ("best", {"bootstrap_advantage": "group"}, ("bootstrap.advantage", "no minimum")),
    "row without windows": ("best", {"bootstrap_row": 24}, ("bootstrap.row = 24", "--bootstrap.contexts windows")),
    "row shorter than a window": (
        "best",
        {"bootstrap_row": 4, "bootstrap_contexts": "windows"},
        ("bootstrap.row = 4", "16 tokens"),
    ),
    "empty band": (
        "sampled",
        {"bootstrap_entropy_low": 2, "bootstrap_entropy_high": 1},
        ("bootstrap.entropy-low = 2.0", "band is empty"),
    ),
    "evaluations at words": ("best", {"eval_also_at": "10,soon"}, ("eval.also-at = '10,soon'",)),
}


@pytest.mark.parametrize(("name", "settings", "phrases"), BAD.values(), ids=BAD.keys())
def test_settings_that_cannot_work(place, name, settings, phrases):
    """Catches a traceback, or a run folder of a run that never was."""
    (place / "same.txt").write_text("a" * 3000)
    extra = {"eval_prompt": "a"} if "data_corpus" in settings else {}
    before = files_below(place)
    refused(here(f"bootstrap-{name}", *flags(**({"data_corpus": "corpus.txt"} | settings | extra))), *phrases)
    assert files_below(place) == before


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"samples": 0}, "bootstrap.samples = 0"),
        ({"guidance": 1.5}, "share from 0 to 1"),
        ({"guidance_schedule": "0:0.5,1:2"}, "bootstrap.guidance-schedule = 2.0"),
        ({"soft_weight_schedule": "0:-1"}, "0 or more"),
        ({"ngram_orders": "0.1,0.2,0.3,0.4,0.5"}, "up to 4 shares"),
        ({"ngram_orders": "a,b"}, "bootstrap.ngram-orders"),
        ({"ngram_orders": "0,0"}, "bootstrap.ngram-orders"),
        ({"exact_weight": 0.0}, "nothing is rewarded"),
        ({"temperature_low": 0.0}, "bootstrap.temperature-low = 0.0"),
        ({"discount": 1.1}, "bootstrap.discount = 1.1"),
        ({"stage_min_steps": 500}, "bootstrap.stage-min-steps = 500"),
        ({"soft": "model"}, "bootstrap.soft = 'model'"),
        ({"mask_entropy": -1.0}, "bootstrap.mask-entropy"),
        ({"kl_coef": float("nan")}, "bootstrap.kl-coef"),
    ],
)
def test_fields_are_checked(settings, phrase):
    """Catches a value that would train something else than it says."""
    with pytest.raises(ConfigError) as error:
        BootstrapConfig(**settings)
    assert phrase in str(error.value)


def test_no_sharding():
    """Catches an objective that reads weights which are not there."""
    with pytest.raises(ConfigError, match=r"run.parallel = 'fsdp'"):
        override(preset("bootstrap-best"), run={"parallel": "fsdp"})


def test_settings_survive_the_record(place):
    """Catches a field that config.json changes, so that a resumed run counts as another."""
    run = trained("run", preset="bootstrap-curriculum", train_steps=2)
    stored = json.loads((run / "config.json").read_text())["config"]["bootstrap"]
    assert BootstrapConfig(**stored) == override(preset("bootstrap-curriculum")).bootstrap
