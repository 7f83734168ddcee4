"""The calibration study on runs that are there: whose they are, what it averages, what it writes."""

import json

import pytest

from checks import ConfigError
from experiments import calibration
from experiments.calibration import Settings, folders, pooled, row, table
from experiments.study import stamp
from tests.tiny_train import here, trained


def record(place, *lines) -> None:
    folder = place / "results" / "compare"
    folder.mkdir(parents=True)
    (folder / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def line(run: str, label: str = "ours", role: str = "row", diverged: bool = False) -> dict:
    return {"label": label, "group": "muon", "role": role, "run": run, "diverged": diverged}


def numbers(ece: float, temperature: float) -> dict:
    of_top = {"top": 5, "ece": 2 * ece, "mass_beyond": ece, "gold_beyond": 0.02}
    of_top |= {"temperature": temperature, "ce_before": 1.6, "ce_after": 1.5}
    chance = {"spread": 0.001, "alone": ece / 5, "stretches": 50}
    buckets = [{"confidence": 0.35, "accuracy": 0.5, "tokens": 10.0}]
    return {"val/ce": 1.6, "val/ece": ece, "calibration": of_top, "chance": chance, "reliability": buckets}


def test_the_runs_of_a_study_are_its_rows(place, monkeypatch):
    """Catches runs of the tuning, or diverged ones, among those that a table speaks of."""
    monkeypatch.setattr(calibration, "ROOT", place)
    record(place, line("a"), line("b"), line("c", role="tuning"), line("d", diverged=True), line("e", "theirs"))
    for name in "abcde":
        (place / "runs" / "compare" / name).mkdir(parents=True)
    found = folders(Settings())
    assert {label: [p.name for p in paths] for label, paths in found.items()} == {
        "muon · ours": ["a", "b"],
        "muon · theirs": ["e"],
    }
    (place / "runs" / "compare" / "b").rmdir()
    with pytest.raises(ConfigError, match="is not there"):
        folders(Settings())
    with pytest.raises(ConfigError, match=r"experiments\.tokens first"):
        folders(Settings(study="tokens"))


def test_seeds_are_averaged_and_bins_pooled():
    """Catches a mean of one seed, and a bin whose tokens weigh by run instead of by token."""
    seeds, beyond = [numbers(0.01, 0.9), numbers(0.03, 1.1)], {"mass_beyond": 0.1, "gold_beyond": 0.1}
    said = row("ours", seeds)
    assert "0.0200 ± 0.0141" in said and "0.0400 ± 0.0283" in said and "1.000 ± 0.141" in said and "-0.1000" in said
    assert "| 2.00 ± 1.41 | 2.00 ± 0.00 |" in said  # per cent
    assert "| 0.0040 ± 0.0028 |" in said  # by chance
    short = [{**n, "calibration": {"top": 5, "ece": 0.1, **beyond}, "chance": {}} for n in seeds]
    assert row("of a short text", short).count("|") == said.count("|")
    assert "2 seeds" in table({"ours": seeds}, Settings(), stamp("calibration", []))
    more = {"reliability": [{"confidence": 0.36, "accuracy": 0.2, "tokens": 30.0}]}
    assert pooled([seeds[0], more], 15) == [pytest.approx((0.3575, 0.275))]


def test_a_run_is_measured_and_written_down(place):
    """Catches a study that breaks on a real run, or figures without their command."""
    run = trained("run")
    outcome = here("--runs", str(run), "--out", "out", "--top", "3", main=calibration.main)
    assert outcome.code == 0, outcome.err
    files = {path.name: path.read_text() for path in (place / "out").iterdir()}
    assert set(files) == {"record.json", "runs.jsonl", "table.md", "figure.svg"}
    assert "top-3 ECE" in files["table.md"] and "experiments.calibration --runs" in files["table.md"]
    (measured,) = map(json.loads, files["runs.jsonl"].splitlines())
    last = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines() if "val/ce" in text][-1]
    assert measured["val/ce"] == pytest.approx(last["val/ce"], rel=1e-5)
    assert measured["calibration"]["top"] == 3 and 0.25 <= measured["calibration"]["temperature"] <= 4
    assert files["figure.svg"].startswith("<svg")
