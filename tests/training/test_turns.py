"""Folders in which one works at a time: refused, or waited for."""

import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from config import ConfigError
from files import held
from training import turns
from training.distributed import World
from training.turns import alone, in_turn


def test_a_run_at_work_is_refused_and_free_afterwards(tmp_path):
    """Catches a lock that is asked for and not kept, and one that is never given back."""
    with alone(tmp_path, World()):
        with pytest.raises(ConfigError, match="another process is training this run"), alone(tmp_path, World()):
            pass
        with held(tmp_path) as free:
            assert not free
    with held(tmp_path) as free:
        assert free


def test_whoever_comes_second_waits_and_says_so_once(tmp_path, monkeypatch, capsys):
    """Catches a second one that does not wait, that waits for ever, or that gives up when its patience ends."""
    monkeypatch.setattr(turns, "PATIENCE", 0.05)
    monkeypatch.setattr(turns, "BETWEEN", 0.01)
    with ExitStack() as other:
        other.enter_context(held(tmp_path))
        begun = time.monotonic()
        threading.Timer(0.3, other.close).start()
        with in_turn(tmp_path, World(), "this cache"):
            assert time.monotonic() - begun > 0.25
            with held(tmp_path) as free:
                assert not free
    assert capsys.readouterr().err == f"waiting for another process, which is at this cache: {Path(tmp_path)}\n"
