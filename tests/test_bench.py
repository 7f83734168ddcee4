"""The command: what it refuses, writes, and says at the end."""

import json
import sys
from pathlib import Path

import pytest
import torch

import bench
from benchmarks import GPU_PARTS, PARTS
from benchmarks.table import Table
from benchmarks.timing import Arm, Conditions, measure
from tests.tiny_train import Outcome, here


def run(*words: str) -> Outcome:
    return here(*words, main=bench.main)


def good(conditions: Conditions):
    """A part of two tables."""
    for name in ("first", "second"):
        yield measure(name, [Arm("a", lambda: None), Arm("b", lambda: None, ["a"])], conditions)


def bad(conditions: Conditions):
    """A part that fails after its first table."""
    yield measure("first", [Arm("a", lambda: None)], conditions)
    raise RuntimeError("the disk is full")


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """Two parts of our own, and a folder to write to."""
    monkeypatch.setattr("benchmarks.timing.UNIT_SECONDS", 1e-9)
    monkeypatch.setattr("benchmarks.timing.peak_bytes", lambda run, device: run() and None)
    monkeypatch.setattr(bench, "parts_of", lambda gpu: {"step": good, "loss": bad})
    return ["--rounds", "3", "--seed", "7", "--threads", "1", "--out", str(tmp_path / "out")]


def test_the_gpu_set_needs_a_gpu(monkeypatch):
    """Catches minutes of CPU work under the name of a GPU, and an error of a page's length."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = run("--gpu")
    assert outcome.code == 2
    assert outcome.errors == ["error: gpu = True: PyTorch sees no GPU here; leave --gpu out to time the CPU"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--parts", "step,los"], "step, loss, generation"),
        (["--gpu", "--parts", "growth"], "tests, loss, char, large"),
        (["--rounds", "0"], "rounds = 0"),
        (["--seconds", "-1"], "seconds = -1"),
        (["--threads", "-1"], "threads = -1"),
    ],
)
def test_bad_settings_are_named(words, named):
    """Catches a typo that times everything, or nothing."""
    outcome = run(*words)
    assert outcome.code == 2 and len(outcome.errors) == 1 and named in outcome.errors[0]


def test_every_part_that_is_offered_exists():
    """Catches a part that is listed and not there."""
    assert set(bench.parts_of(gpu=False)) == set(PARTS)
    assert set(bench.parts_of(gpu=True)) == set(GPU_PARTS)
    assert sum(GPU_PARTS.values()) < bench.GPU_LIMIT < 600


def test_raw_numbers_and_a_page_are_written(parts, tmp_path):
    """Catches a timing without its machine, command, commit or seed, and a page that lacks a table."""
    assert run("--parts", "step", *parts).code == 0
    record = json.loads((tmp_path / "out" / "cpu" / "step.json").read_text())
    assert record["command"].startswith("python bench.py --parts step") and record["seed"] == 7
    assert {"git", "versions", "hardware", "started", "rounds", "seconds", "tables"} <= set(record)
    assert record["hardware"]["threads"] == 1 and "torch" in record["versions"]
    assert [t["title"] for t in record["tables"]] == ["first", "second"]
    assert [len(r["seconds"]) for t in record["tables"] for r in t["rows"]] == [3] * 4
    page = (tmp_path / "out" / "cpu.md").read_text()
    assert page.count("## step") == 1 and "### first" in page and "### second" in page and record["command"] in page


def test_a_part_that_fails_keeps_what_it_had(parts, tmp_path):
    """Catches a failure that exits with 0, or takes finished tables and other parts with it."""
    outcome = run("--parts", "step,loss", *parts)
    assert outcome.code == 1 and outcome.errors == ["error: loss: the disk is full"]
    page = (tmp_path / "out" / "cpu.md").read_text()
    assert page.index("## step") < page.index("## loss") and "**failed**: the disk is full" in page


def test_a_second_run_replaces_only_its_own_part(parts, tmp_path):
    """Catches a page that forgets what an earlier command measured."""
    run("--parts", "loss", *parts)
    run("--parts", "step", *parts)
    page = (tmp_path / "out" / "cpu.md").read_text()
    assert page.count("\n## step\n") == page.count("\n## loss\n") == 1
    assert page.index("## step") < page.index("## loss")


def test_the_gpu_set_is_cut_in_time(parts, tmp_path, monkeypatch):
    """Catches a set that outlasts its limit, also where some code on the way swallows exceptions."""

    def stubborn(conditions: Conditions):
        yield measure("quick", [Arm("a", lambda: None)], conditions)
        while True:
            try:
                sum(range(1000))
            except Exception:
                continue

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("training.hardware.choose_device", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(bench, "parts_of", lambda gpu: {"tests": stubborn})
    monkeypatch.setattr(bench, "GPU_LIMIT", 1.0)
    outcome = run("--gpu", "--parts", "tests", *parts)
    assert outcome.code == 1 and "cut after 1 s" in outcome.errors[0]
    assert "quick" in (tmp_path / "out" / "cpu.md").read_text()


def test_the_page_names_a_table_that_was_skipped(parts, tmp_path, monkeypatch):
    """Catches a table without rows that breaks the page."""
    monkeypatch.setattr(bench, "parts_of", lambda gpu: {"step": lambda c: iter([Table("t", notes=["skipped: why"])])})
    assert run("--parts", "step", *parts).code == 0
    assert "- skipped: why" in (tmp_path / "out" / "cpu.md").read_text()


def test_help_does_not_wait_for_torch():
    """Catches an import that makes --help slow."""
    source = Path(bench.__file__).read_text()
    top = source[: source.index("ROOT =")]
    assert "import torch" not in top and "matplotlib" not in sys.modules
