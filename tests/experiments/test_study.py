"""Tuning, seeds, equal time, and what a study writes."""

import dataclasses
import json
import math

import pytest

from checks import ConfigError
from experiments import study
from experiments.study import (
    Entry,
    Knob,
    StudySettings,
    at_equal_time,
    common,
    conduct,
    publish,
    rate,
    stamp,
    steps_for_equal_time,
)
from experiments.tables import heading
from tests.experiments.builders import PRESET, Trainer, row

PEAK = 3e-3  # of the protocol's AdamW
DROPOUT = Knob("dropout", ("model.dropout",), (0.0, 0.2, 0.4), relative=False, stride=0.2, low=0.0, high=0.8)


def bowl(best: float):
    """Losses that are lowest where the rate is `best` times the protocol's."""
    return lambda settings: [2.0, 1.0 + abs(math.log(settings["optim.lr"] / PEAK / best))]


@pytest.fixture
def trainer(monkeypatch):
    """A study that trains nothing: `trainer(losses)` takes the place of `run_all`."""

    def replace(losses) -> Trainer:
        made = Trainer(losses)
        monkeypatch.setattr(study, "run_all", made)
        return made

    return replace


@pytest.mark.parametrize(
    ("losses", "further"),
    [
        ({0.5: 1.60, 1.0: 1.61, 2.0: 1.65}, 0.25),
        ({0.5: 1.76, 1.0: 1.70, 2.0: 1.69}, 4.0),
        ({0.5: 1.58, 1.0: 1.57, 2.0: 1.59}, None),
        ({8.0: 1.3, 16.0: 1.2}, None),
        ({1 / 16: 1.2, 1 / 8: 1.3}, None),
        ({1.0: 1.5}, 2.0),
        ({1.0: 1.5, 2.0: 1.6}, 0.5),
        ({1.0: math.inf, 2.0: math.inf}, 0.5),
    ],
)
def test_no_arm_is_left_at_the_end_of_its_grid(losses, further):
    """Catches a rival whose best rate was never tried: beating it would show only that."""
    assert rate(StudySettings()).beyond(losses) == further


def test_grids_that_add_end_where_they_must():
    """Catches a negative dropout, one that grows past its limit, and binary fractions that are tried twice."""
    assert DROPOUT.beyond({0.0: 1.0, 0.2: 1.1, 0.4: 1.2}) is None
    assert DROPOUT.beyond({0.2: 1.2, 0.4: 1.1}) == 0.6
    assert DROPOUT.beyond({0.6: 1.2, 0.8: 1.1}) is None


@pytest.mark.parametrize("best", [0.125, 1.0, 8.0])
def test_tuning_goes_on_until_the_best_is_enclosed(trainer, tmp_path, best):
    """Catches a choice at the edge of the grid, seeds at another rate than the chosen, more runs than needed."""
    runs = trainer(bowl(best))
    how = StudySettings(seeds=3, runs=tmp_path)
    (found,) = conduct([Entry("ours", PRESET)], how, "s", [rate(how)])
    assert found.choice == {"rate": best}
    scales = sorted(found.tried["rate"])
    assert scales[0] < best < scales[-1] and len(scales) <= 6
    assert [o.arm.seed for o in found.outcomes] == [1, 2, 3]
    assert all(o.arm.settings["optim.lr"] == pytest.approx(PEAK * best) for o in found.outcomes)
    assert all(o.arm.settings["optim.muon-lr"] == pytest.approx(0.02 * best) for o in found.outcomes)
    assert len({a.name for a in runs.asked}) == len(scales) + 2
    assert len(found.losers) == len(scales) - 1


def test_one_thing_is_tuned_after_the_other(trainer, tmp_path):
    """Catches a second knob that forgets what the first one chose, or that is chosen by another loss than was said."""

    def losses(settings):
        off = abs(math.log(settings["optim.lr"] / PEAK / 2)) + abs(settings["model.dropout"] - 0.2)
        return [1.0 + off, 3.0 - off]  # the best along the run wants one thing, the end the opposite

    runs = trainer(losses)
    how = StudySettings(seeds=1, runs=tmp_path)
    entry = Entry("ours", PRESET, {"model.dropout": 0.0})
    (found,) = conduct([entry], how, "s", [rate(how), DROPOUT], by="best")
    assert found.choice == {"rate": 2.0, "dropout": 0.2}
    second = [a for a in runs.asked if "dropout" in a.label]
    assert second and all(a.settings["optim.lr"] == pytest.approx(2 * PEAK) for a in second)
    assert {a.seed for a in runs.asked} == {1}


def test_the_baseline_alone_can_be_tuned(trainer, tmp_path):
    """Catches a rival that is tuned where only its baseline should be, and a page that says they were tuned alike."""
    trainer(lambda settings: [1.0 + abs(settings.get("optim.lr", PEAK) - PEAK / 2)])
    how = StudySettings(seeds=1, tune_only_baselines=True, runs=tmp_path)
    entries = [Entry("theirs", PRESET, baseline=True), Entry("ours", PRESET, {"model.bias": True})]
    rows = conduct(entries, how, "s", [rate(how)])
    assert [found.choice for found in rows] == [{"rate": 0.5}, {}]
    assert "optim.lr" not in rows[1].outcomes[0].arm.settings
    said = [dataclasses.replace(row("theirs", [[1.0]], baseline=True), choice={"rate": 0.5})]
    text = "\n".join(heading("T", stamp("s", []), how, said))
    assert "The baseline alone is tuned, by seed 1" in text and "alike" not in text


def test_untuned_entries_keep_their_rates(trainer, tmp_path):
    """Catches --no-tune that tunes."""
    runs = trainer(bowl(1.0))
    how = StudySettings(seeds=2, tune=False, runs=tmp_path, also=("optim.lr=0.005", "model.bias=true", "run.name=x"))
    (found,) = conduct([Entry("ours", PRESET)], how, "s", [rate(how)])
    assert found.choice == {} and len(runs.asked) == 2
    assert runs.asked[0].config.optim.lr == 0.005 and runs.asked[0].config.model.bias is True


def test_all_entries_see_the_same_tokens(trainer, tmp_path):
    """Catches rivals with other lengths, seeds or batches: the gap would not be the method's."""
    trainer(lambda settings: [1.0])
    how = StudySettings(seeds=2, steps=300, tune=False, runs=tmp_path)
    entries = [Entry("ours", PRESET), Entry("theirs", "protocol-pretrain", baseline=True)]
    configs = [[o.arm.config for o in r.outcomes] for r in conduct(entries, how, "s")]
    for ours, theirs in zip(*configs, strict=True):
        assert (ours.train.steps, ours.train.batch_size) == (theirs.train.steps, theirs.train.batch_size) == (300, 12)
        assert ours.run.seed == theirs.run.seed and ours.optim == theirs.optim and ours.model == theirs.model


@pytest.mark.parametrize(("steps", "warmup"), [(6, 1), (400, 40), (1000, 100), (5000, 100)])
def test_the_warm_up_fits_the_run(steps, warmup):
    """Catches a warm-up that outlasts a short run, or takes most of it."""
    assert common(PRESET, steps, 8)["optim.warmup-steps"] == warmup


def test_equal_time_means_fewer_steps_of_the_slower():
    """Catches time compared by cutting a curve short, the faster one slowed down, and a rate that is not the chosen."""
    assert steps_for_equal_time(0.5, 100.0) == 200 and steps_for_equal_time(9.0, 1.0) == 1
    base, slow = row("theirs", [[2.0, 1.0]], baseline=True), row("ours", [[2.0, 1.0]], settings={"optim.lr": 0.1})
    slow.outcomes[0].final["seconds"] = 4.0  # twice the baseline's
    (entry,) = at_equal_time([base, slow], StudySettings())
    assert entry.settings["train.steps"] == 10 and entry.settings["optim.lr"] == 0.1
    assert entry.settings["optim.warmup-steps"] == 1 and "run.seed" not in entry.settings
    assert at_equal_time([base, row("ours", [[2.0, 1.0]])], StudySettings()) == []


def test_a_study_writes_every_run_and_where_it_comes_from(trainer, tmp_path):
    """Catches runs that lost the tuning and vanish, and figures without command, commit or seeds."""
    trainer(bowl(1.0))
    how = StudySettings(seeds=2, runs=tmp_path / "runs", out=tmp_path / "out")
    made = stamp("s", ["--seeds", "2"])
    rows = conduct([Entry("ours", PRESET)], how, "s", [rate(how)])
    out = publish(how, made, rows, "a table\n", "<svg/>")
    assert {p.name for p in out.iterdir()} == {"record.json", "runs.jsonl", "table.md", "figure.svg"}
    lines = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    assert sorted((line["role"], line["seed"]) for line in lines) == [
        ("row", 1), ("row", 2), ("tuning", 1), ("tuning", 1),
    ]  # fmt: skip
    assert all(len(line["evaluations"]) == 2 and line["settings"]["run.seed"] == line["seed"] for line in lines)
    record = json.loads((out / "record.json").read_text())
    assert record["command"] == "python -m experiments.s --seeds 2" and record["commits"] == ["0123456789ab"]
    assert record["versions"]["torch"] and str(tmp_path) not in json.dumps(record)


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"seeds": 0}, "seeds = 0"),
        ({"steps": 0}, "steps = 0"),
        ({"scales": (1.0, 0.0)}, "scales"),
        ({"scales": ()}, "scales"),
        ({"also": ("lr=3",)}, "group.field=value"),
        ({"also": ("--optim.lr",)}, "group.field=value"),
    ],
)
def test_bad_input(settings, phrase):
    """Catches a study that fails after an hour for what could be seen at once."""
    with pytest.raises(ConfigError, match=phrase):
        StudySettings(**settings)
