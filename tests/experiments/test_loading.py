"""The command that times tokenising and loading, on little."""

import json
from pathlib import Path

import pytest

from experiments import loading
from tests.tiny_train import here


@pytest.fixture(autouse=True)
def at_hand(shared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """GPT-2's vocabulary and a short text."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "data" / "gpt2-bpe"))
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("To be, or not to be: that is the question.\n" * 500)


def test_it_measures_and_writes(tmp_path: Path) -> None:
    """Catches a table without a corpus or a shape, and a record without the machine."""
    words = ["--corpora", "text.txt", "--seconds", "0.02", "--tokens", "600000", "--out", str(tmp_path / "out")]
    Path("below").mkdir()
    Path("below/large.txt").write_text("".join(f"Line {i}, or so.\n" for i in range(4000)))
    words += ["--text", "below/large.txt"]
    outcome = here(*words, main=loading.main)
    assert outcome.code == 0, outcome.err
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["processor"] and record["versions"]["gigatoken"] and record["command"].endswith("--text large.txt")
    assert record["large"][0]["name"] == "large.txt" and "below" not in json.dumps(record)
    (text,) = record["tokenised"]
    assert text["megabytes"] == pytest.approx(0.0215, rel=0.01)
    assert min(text[kind] for kind in ("tiktoken", "first", "known", "uncut")) > 0
    assert [(row["block_size"], row["batch_size"]) for row in record["loaded"]] == list(loading.SHAPES)
    page = (tmp_path / "out" / "table.md").read_text()
    assert "| text.txt | 0.02 |" in page and "| 1,024 | 480 |" in page


def test_a_large_text_is_passed_once(tmp_path: Path) -> None:
    """Catches files of a folder that are left out, tenths that are not the whole, and a path that enters the record."""
    folder = tmp_path / "secret" / "texts"
    folder.mkdir(parents=True)
    for name in ("a.txt", "b.md", "c.bin"):
        (folder / name).write_text("".join(f"Line {i} of {name}, or so.\n" for i in range(1500)))
    found = loading.one_pass(folder)
    size = sum((folder / name).stat().st_size for name in ("a.txt", "b.md"))
    assert found.megabytes == pytest.approx(size / 1e6) and found.name == "texts"
    assert len(found.tenths) == 10 and min(found.tenths) <= found.first <= max(found.tenths)
    page = "\n".join(loading.large_table([found]))
    assert "| texts | 0.1 |" in page and "secret" not in page


def test_a_text_that_is_too_short_or_no_text_is_refused(tmp_path: Path) -> None:
    """Catches a trace of decoding, and a tenth of nothing."""
    (tmp_path / "binary").write_bytes(b"\xff" * 100)
    for name, said in (("binary", "UTF-8"), ("text.txt", "use more than"), ("absent", "No such file")):
        outcome = here("--text", str(tmp_path / name), "--corpora", "text.txt", main=loading.main)
        assert outcome.code == 2 and said in outcome.errors[0]


def test_other_tokens_are_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a speed at which the wrong tokens are made."""
    encode = loading.QuickEncoder.encode
    monkeypatch.setattr(loading.QuickEncoder, "encode", lambda *rest: encode(*rest)[1:])
    outcome = here("--corpora", "text.txt", "--seconds", "0.02", main=loading.main)
    assert outcome.code == 2 and "not tokenised as tiktoken" in outcome.errors[0]
    assert here("--corpora", "pydoc", main=loading.main).code == 2


def test_without_gigatoken_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a trace of imports after half a minute, and tiktoken's speed under the name of gigatoken."""

    def absent(name: str) -> str:
        raise loading.PackageNotFoundError(name)

    monkeypatch.setattr(loading, "version", absent)
    outcome = here("--corpora", "text.txt", main=loading.main)
    assert outcome.code == 2 and "pip install gigatoken" in outcome.errors[0]
