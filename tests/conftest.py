"""Fixtures shared by all tests: where the real text and the conformance cases lie."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


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
