"""Fixtures shared by all tests: where the real text and the conformance cases lie, and a place for tiny runs."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the tensors here are tiny

import pytest
import torch

import train_core
from tests.tiny_train import write_corpus

ROOT = Path(__file__).resolve().parent.parent
# Files of long tests. Begun last, one of them would keep one worker of pytest-xdist busy while the others idle.
LONGEST_FIRST = (
    "training/test_elastic.py",
    "training/test_parallel.py",
    "on_modal/test_container.py",
    "surgery/test_hybrid.py",
    "test_resume.py",
    "data/test_openwebtext.py",
    "test_end_to_end.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Hand files to the workers of pytest-xdist as they come, not those of most tests first."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the longest files where there are several workers; skip what is marked gpu where there is none."""
    if hasattr(config, "workerinput"):
        rank = {ROOT / "tests" / name: i for i, name in enumerate(LONGEST_FIRST)}
        items.sort(key=lambda item: rank.get(item.path, len(rank)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def _missing(what: str) -> None:
    message = f"{what} not found beside the checkout (../shared) or under $AVATARL_DATA"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ../shared with data/ and conformance/; skipped without it, failed without it in CI."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        _missing("the folder shared")
    return folder


@pytest.fixture(scope="session")
def shakespeare() -> str:
    """The text of tinyshakespeare, from $AVATARL_DATA or ../shared/data."""
    roots = [Path(os.environ["AVATARL_DATA"])] if os.environ.get("AVATARL_DATA") else []
    for root in [*roots, ROOT.parent / "shared" / "data", ROOT / "data"]:
        path = root / "tinyshakespeare" / "input.txt"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    _missing("tinyshakespeare/input.txt")
    return ""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a corpus.txt, where runs take moments; no environment variable reaches it."""
    monkeypatch.chdir(tmp_path)
    for name in ("AVATARL_DATA", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    # Measuring the machine's peak takes a fifth of a second at the start of every run.
    monkeypatch.setattr(train_core, "matmul_peak", lambda device, dtype: 1e11)
    write_corpus(tmp_path / "corpus.txt")
    return tmp_path
