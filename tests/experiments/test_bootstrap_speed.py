"""The speed of bootstrapping: every table of the study, on a small text and with a small policy."""

import json

import pytest

from avatarl import mixed
from config import DataConfig
from data.prepare import prepare
from experiments import bootstrap_speed as study
from tests.tiny_train import write_corpus

TINY = ["--run.device", "cpu", "--run.threads", "1", "--rounds", "1", "--steps", "1", "--statistics-rounds", "1"]
TINY += ["--decisions", "32", "--epoch-context", "16", "--epoch-batch", "32", "--epoch-steps", "1"]


def test_every_table_is_filled(tmp_path, monkeypatch, capsys):
    """Catches a preset, a statistic or a form of contexts that is not timed, and an epoch that forgets its steps."""
    dataset = prepare(DataConfig(corpus=str(write_corpus(tmp_path / "corpus.txt"))))
    monkeypatch.setattr(study, "prepare", lambda data: dataset)
    monkeypatch.setattr(mixed, "FIT_STEPS", 2)
    monkeypatch.setattr(study, "TWENTY_MILLION", {"n_layer": 1, "n_head": 2, "n_embd": 16})
    assert study.main([*TINY, "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    table = (tmp_path / "out" / "table.md").read_text()
    assert [p["preset"] for p in record["presets"]] == study.NAMES
    assert all(p["decisions_per_second"] > 0 and f"`{p['preset']}`" in table for p in record["presets"])
    assert {p["preset"] for p in record["presets"] if p["opponent_seconds"]} == {"bootstrap-selfplay"}
    assert next(p["ratio"] for p in record["presets"] if p["preset"] == study.BASE) == pytest.approx(1)
    assert len(record["statistics"]) == 6 and all(s > 0 for s in record["statistics"].values())
    assert all(f"| {label} |" in table for label in record["statistics"])
    assert [(e["form"], e["context"]) for e in record["epochs"]] == [("sequence", 16), ("windows", 8)]
    for e in record["epochs"]:
        assert 32 * e["steps"] == pytest.approx(len(dataset.train), abs=48), "every character once, but for the edges"
        assert e["decisions_per_second"] * e["seconds"] == pytest.approx(32 * e["steps"])
    assert f"{len(dataset.train):,} tokens" in table and "epoch, windows" in capsys.readouterr().out
