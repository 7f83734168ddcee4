"""The bootstrapping study: its entries and figures, when a rung is passed, and what it makes of finished runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from checks import ConfigError
from experiments.arms import Arm, Outcome
from experiments.bootstrap_facts import FACTS, IN_TIME, noticed, passed, quarters, told
from experiments.bootstrapping import CONTRASTS, NAMES, Settings, entries, facts_figures, figure, own_length, rate_of
from experiments.study import Entry, Row

LADDER = [{"context": 1, "ce": 2.5, "accuracy": 0.27}, {"context": 2, "ce": 2.0, "accuracy": 0.38}]
LADDER += [{"context": 3, "ce": 1.8, "accuracy": 0.47}]


def outcome(
    folder: Path, curve: list[tuple[float, float]], status: list[int], ece: float = 0.1, **logged: list[float]
) -> Outcome:
    """A made-up run: (CE, accuracy) after 10, 20, … seconds, and what the monitor said at steps 1, 2, …

    `logged` are further numbers of those steps, reward_mean standing for bootstrap/reward_mean.
    """
    folder.mkdir(parents=True)
    (folder / "ladder.json").write_text(json.dumps(LADDER))
    points: list[dict[str, Any]] = [
        {"step": i, "tokens": 100 * i, "seconds": 10.0 * i, "val/ce": ce, "val/accuracy": accuracy, "val/ece": ece}
        for i, (ce, accuracy) in enumerate(curve, 1)
    ]
    said = [
        {"step": i, "tokens": 100 * i, "health/status": s, "bootstrap/decisions_per_second": 100.0 * i}
        for i, s in enumerate(status, 1)
    ]
    for name, values in logged.items():
        key = "train/reward" if name == "reward" else f"bootstrap/{name}"
        said += [{"step": i, "tokens": 100 * i, key: value} for i, value in enumerate(values, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*said, *points]))
    return Outcome(Arm("made up", "bootstrap-best", {"run.seed": 1}), folder, tuple(points))


def test_a_rung_is_passed_by_both_numbers(tmp_path):
    """Catches a student called past a rung by its accuracy alone, as the collapsing one would be."""
    sure = outcome(tmp_path / "a", [(9.0, 0.3), (2.4, 0.26), (2.4, 0.28), (2.2, 0.5)], [0, 1, 2, 2])
    assert passed(sure, 1) == 30.0 and passed(sure, 2) is None and passed(sure, 6) is None
    assert noticed(sure) == 3 and rate_of(sure) == 250.0
    well = outcome(tmp_path / "b", [(1.9, 0.4)], [0, 1])
    assert passed(well, 2) == 10.0 and noticed(well) is None


def test_every_preset_is_an_entry_of_its_own_length():
    """Catches a preset that is left out, or trained for a length that is not its own."""
    found = entries(Settings(contrasts=False))
    assert [e.preset for e in found] == NAMES
    assert all(e.settings["train.steps"] == own_length(e.preset, {}, 10**9)["train.steps"] > 1 for e in found)
    assert {e.settings["train.steps"] for e in entries(Settings(steps=7))} == {7}
    (long,) = entries(Settings(only=("three times",)))
    assert long.settings["train.steps"] == 3 * found[-1].settings["train.steps"]
    with pytest.raises(ConfigError, match="no entry is called so"):
        entries(Settings(only=("nothing of the kind",)))


def test_the_figure_has_a_line_for_every_rung(tmp_path):
    """Catches a chart without what its curves are to be compared with."""
    row = Row(Entry("ours", "bootstrap-best"), (outcome(tmp_path / "a", [(3.0, 0.2), (2.2, 0.4)], []),))
    drawn = figure([row])
    assert "ours" in drawn and "context of 1" in drawn and "context of 2" in drawn


def test_the_figures_of_the_facts(tmp_path):
    """Catches a figure of entries that were not trained, and one that leaves out what tells of growth."""
    run = outcome(tmp_path / "a", [(3.0, 0.2), (2.2, 0.4)], [], reward=[0.1, 0.3], reward_mean=[0.02, 0.02])
    assert facts_figures([Row(Entry("selfplay", "bootstrap-selfplay"), (run,))]) == {}
    drawn = facts_figures([Row(Entry("confidence", "bootstrap-confidence"), (run,))])
    assert set(drawn) == {"collapse.svg", "confidence.svg"}
    for said in ("expected reward", "accuracy", "plain mean of rewards"):
        assert said in drawn["confidence.svg"]
    assert "0.020" in drawn["confidence.svg"] and "confidence" in drawn["collapse.svg"]


def test_quarters_are_of_the_whole_run():
    """Catches an early quarter that still holds the start, and a last one that is a single noisy value."""
    assert quarters([(x, float(x)) for x in range(1, 9)]) == (3.5, 7.5)


WELL = [(4.0, 0.1), (2.4, 0.3), (2.0, 0.4), (1.7, 0.5)]
COLLAPSE = [(4.0, 0.05), (3.0, 0.2), (6.0, 0.24), (7.0, 0.25)]
FLAT, RISING = [0.02] * 8, [0.1 * i for i in range(1, 9)]
# By claim: runs that show it, and ones that do not; each a run for every entry, as arguments of `outcome`.
Made = list[dict[str, Any]]
SHOWN: dict[str, tuple[Made, Made]] = {
    "collapses": ([{"curve": COLLAPSE}], [{"curve": WELL}]),
    "caught": ([{"status": [0] * 5 + [2]}], [{"status": [0] * IN_TIME + [2]}]),
    "climbs": ([{"status": [0, 1]}], [{"status": [0, 2]}]),
    "says_nothing": ([{"reward": RISING, "reward_mean": FLAT}], [{"reward": RISING, "reward_mean": RISING}]),
    "peaks": ([{"curve": COLLAPSE}], [{"curve": WELL}]),
    "stalls": ([{"curve": [(3.0, 0.25)] * 8, "reward": RISING}], [{"curve": WELL * 2, "reward": FLAT}]),
    "earlier": ([{"curve": WELL}, {"curve": COLLAPSE}], [{"curve": COLLAPSE}, {"curve": WELL}]),
    "sickens": ([{}, {"ece": 0.3, "status": [2]}], [{}, {"ece": 0.15, "status": [2]}]),
    "graduates": ([{"stage": [0, 1, 1, 2, 3, 4]}], [{"stage": [0, 1, 2, 3]}]),
    "wins": ([{"win_rate": [0.4, 0.4, 0.6, 0.6]}, {}], [{"win_rate": [0.9, 0.9, 0.4, 0.4]}, {}]),
    "in_seconds": ([{"curve": [(2.3, 0.3), (1.9, 0.4), (1.7, 0.5)]}], [{"curve": COLLAPSE}]),
    "above_all": ([{"curve": WELL}], [{"curve": WELL[:-1]}]),
    "ends_lower": ([{"curve": WELL}, {"curve": COLLAPSE}], [{}, {}]),
}


@pytest.mark.parametrize("fact", FACTS, ids=[fact.look.__name__ for fact in FACTS])
def test_a_fact_holds_where_it_shows_and_nowhere_else(fact, tmp_path):
    """Catches a claim that any run would confirm, or that a run which shows it does not."""
    for holds, made in zip((True, False), SHOWN[fact.look.__name__], strict=True):
        assert len(made) == len(fact.entries)
        runs = [
            outcome(tmp_path / f"{holds}{i}", **{"curve": WELL, "status": [0], **settings})
            for i, settings in enumerate(made)
        ]
        found, said = fact.look(*runs)
        assert found is holds and said


def test_facts_speak_of_entries_that_there_are():
    """Catches a fact whose entry was renamed, and which is silently left out ever after."""
    labels = {e.label for e in entries(Settings())}
    assert {label for fact in FACTS for label in fact.entries} <= labels
    assert set(CONTRASTS) <= labels


def test_what_is_told(tmp_path):
    """Catches a fact that is told without its runs, and seeds that are not counted."""
    runs = tuple(outcome(tmp_path / str(i), curve, [0, 2]) for i, curve in enumerate((COLLAPSE, WELL)))
    table = told([Row(Entry("exhaustive", "bootstrap-exhaustive"), runs)])
    assert len([row for row in table if row.startswith("| ")]) == 1 + 2
    assert "| 1 of 2 |" in table[-2] and "| 2 of 2 |" in table[-1]
    assert "accuracy 25.0% (bigram 27.0%)" in table[-2] and "bad at step 2; bad at step 2" in table[-1]
