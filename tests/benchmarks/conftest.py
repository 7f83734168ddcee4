"""Fixtures of the benchmarks' tests."""

from pathlib import Path

import pytest

from benchmarks import gpu, timing
from tests.tiny_train import write_corpus


@pytest.fixture
def quick(monkeypatch):
    """One call a timing, and neither peaks nor memory to be measured."""
    monkeypatch.setattr(timing, "UNIT_SECONDS", 1e-9)
    monkeypatch.setattr(timing, "peak_bytes", lambda run, device: run() and None)
    for module in (timing, gpu):
        monkeypatch.setattr(module, "peak_flops", lambda *_: 1e11)


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A text file of a few thousand characters."""
    return write_corpus(tmp_path / "corpus.txt")
