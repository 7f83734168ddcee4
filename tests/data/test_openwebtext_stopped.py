"""Real processes and signals: whoever stops the tokenising of a corpus, it goes on where it was."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data import openwebtext, shards
from data.shards import Manifest
from data.tokenizers import Gpt2Tokenizer
from tests.data.builders import DONE, TEXTS, expected, furnished, made, make, put
from tests.tiny_train import ROOT, SAYING, environment, files_below

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, gpt2: Gpt2Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with documents, and GPT-2's vocabulary at hand."""
    return furnished(tmp_path, monkeypatch)


def test_processes_that_are_killed_lose_nothing(home: Path, gpt2: Gpt2Tokenizer) -> None:
    """Catches workers that outlive their parent, and a stream with a gap or a repetition after SIGKILL: the command
    as it is given, on two processes."""
    draw, words = random.Random(1), SAYING.split()
    texts = [" ".join(draw.choices(words, k=400)) for _ in range(1500)]
    put(home / "source" / "a.jsonl", texts)
    everything = expected(gpt2, [*texts, *TEXTS[9:]])
    command = [sys.executable, "-m", "data.prepare", "mine", "--source", str(home / "source"), "--processes", "2"]
    command += ["--shard-characters", "20000"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
    ) as process:
        wait_for(lambda: len(Manifest.load(home / "data/mine").shards) > 3)
        children = [int(p.name) for p in Path("/proc").glob("[0-9]*") if parent_of(p) == process.pid]
        process.send_signal(signal.SIGKILL)
    assert len(children) >= 2
    wait_for(lambda: not any(alive(child) for child in children))
    folder = home / "data" / "mine"
    assert len(Manifest.load(folder).shards) > 3 and not Manifest.load(folder).complete
    again = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "continuing" in again.stdout and np.array_equal(made(home), everything)
    assert files_below(folder) == DONE


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    """Return once `what` holds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if what():
                return
        except ValueError:  # no manifest yet
            pass
        time.sleep(0.02)
    raise AssertionError("it never came")


def parent_of(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def quiet_signals() -> Iterator[None]:
    """SIGTERM is put back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_sigterm_stops_it_like_ctrl_c(monkeypatch: pytest.MonkeyPatch, quiet_signals: None) -> None:
    """Catches a scheduler's polite request that leaves an exit code of success, or a handler that stays."""
    before = signal.getsignal(signal.SIGTERM)

    def terminated(folder: Path, cut: openwebtext.Cut) -> shards.Shard:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("SIGTERM was ignored")

    monkeypatch.setattr(openwebtext, "make_shard", terminated)
    outcome = make()
    assert outcome.code == 143 and "continues where it stopped" in outcome.out
    assert signal.getsignal(signal.SIGTERM) is before
