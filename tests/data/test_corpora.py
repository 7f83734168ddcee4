"""Where corpora are found, what a download may leave behind, and what bad text is answered with."""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import urllib3

from config import ConfigError
from data import corpora
from data.corpora import TINYSHAKESPEARE_SHA256, TINYSHAKESPEARE_URL, load_corpus


class Network:
    """Stands in for requests.get: serves `content`, or raises `failure` before or after half of it."""

    def __init__(self) -> None:
        self.content: bytes | None = None
        self.failure: BaseException | None = None
        self.status = 200
        self.requests: list[dict] = []

    def get(self, url: str, **options: object) -> requests.Response:
        self.requests.append({"url": url, **options})
        if self.content is None:
            raise requests.ConnectionError("no network in tests")
        response = requests.Response()
        response.status_code, response.url, response.raw = self.status, url, self
        return response

    def stream(self, size: int, decode_content: bool) -> Iterator[bytes]:
        assert self.content is not None
        half = io.BytesIO(self.content[: len(self.content) // 2] if self.failure else self.content)
        yield from iter(lambda: half.read(size), b"")
        if self.failure:
            raise self.failure

    def close(self) -> None:
        """As urllib3's responses."""


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    """A network that is down until a test gives it content."""
    fake = Network()
    monkeypatch.setattr(requests, "get", fake.get)
    return fake


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: Network) -> Path:
    """An empty place: working directory, and data/ as the project's data folder."""
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(corpora, "DATA_FOLDER", tmp_path / "data")
    monkeypatch.delenv("AVATARL_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def files_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_places_are_tried_in_order(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a name taken from the project although $AVATARL_DATA or the working directory has it."""
    monkeypatch.setenv("AVATARL_DATA", str(home / "mine"))
    for folder in ("data/poems", "mine/poems", "poems"):
        put(home / folder / "input.txt", folder)
        found = load_corpus("poems")
        assert (found.text, found.source, found.fallback) == (folder, str(home / folder), False)
        assert found.name == "poems"


def test_folder_reads_input_txt_or_else_all_in_order(home: Path) -> None:
    """Catches files joined in the order of the directory, or others mixed into a prepared input.txt."""
    for name in ("b.txt", "a.txt", "c.txt", "notes.md"):
        put(home / "poems" / name, name)
    assert load_corpus("poems").text == "a.txtb.txtc.txt"
    put(home / "poems" / "input.txt", "whole")
    assert load_corpus(str(home / "poems")).text == "whole"


def test_text_and_hash_are_those_of_the_bytes(home: Path) -> None:
    """Catches newline translation, which changes text and hash from one system to the next."""
    put(home / "poem.txt", "é\r\n\n")
    corpus = load_corpus("poem.txt")
    assert corpus.text == "é\r\n\n"
    assert corpus.sha256 == hashlib.sha256("é\r\n\n".encode()).hexdigest()


def test_pydoc_is_embedded_and_long_enough_to_train_on() -> None:
    """Catches a fallback that needs the disk or the network, or that lost its text."""
    corpus = load_corpus("pydoc")
    assert corpus.source == "embedded" and not corpus.fallback
    assert 300_000 < len(corpus.text) < 2_000_000


def test_download_is_stored_once(home: Path, network: Network, shakespeare: str, capsys: pytest.CaptureFixture) -> None:
    """Catches a download on every run, one that can hang for ever, and a file other than what was checked."""
    network.content = shakespeare.encode()
    for _ in range(2):
        corpus = load_corpus(None)
        assert corpus.text == shakespeare and corpus.sha256 == TINYSHAKESPEARE_SHA256
        assert corpus.name == "tinyshakespeare" and not corpus.fallback
    assert [r["url"] for r in network.requests] == [TINYSHAKESPEARE_URL]
    assert network.requests[0]["timeout"][0] <= 5
    assert files_in(home / "data") == ["tinyshakespeare/input.txt"]
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("failure", [urllib3.exceptions.ProtocolError("cut"), KeyboardInterrupt()])
def test_interrupted_download_leaves_no_file(
    home: Path, network: Network, shakespeare: str, failure: BaseException
) -> None:
    """Catches half a corpus that the next run would find and train on."""
    network.content, network.failure = shakespeare.encode(), failure
    with pytest.raises((ConfigError, KeyboardInterrupt)):
        load_corpus("tinyshakespeare")
    assert files_in(home) == []


@pytest.mark.parametrize("status, content, reason", [(200, b"<html>log in</html>", "sha256"), (404, b"none", "404")])
def test_wrong_download_leaves_no_file(home: Path, network: Network, status: int, content: bytes, reason: str) -> None:
    """Catches a proxy's login page or an error page that is taken for Shakespeare."""
    network.content, network.status = content, status
    with pytest.raises(ConfigError, match=reason):
        load_corpus("tinyshakespeare")
    assert files_in(home) == []


def test_download_into_a_folder_that_cannot_be_written(
    home: Path,
    network: Network,
    shakespeare: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Catches a run that fails on a read-only checkout although it holds the text."""
    monkeypatch.setattr(corpora, "DATA_FOLDER", put(home / "no-folder", "a file"))
    network.content = shakespeare.encode()
    corpus = load_corpus("tinyshakespeare")
    assert corpus.text == shakespeare and corpus.source == TINYSHAKESPEARE_URL
    assert capsys.readouterr().err.startswith("warning: ")


def test_unnamed_corpus_falls_back_with_one_warning(network: Network, capsys: pytest.CaptureFixture) -> None:
    """Catches a silent change of corpus, a warning nobody sees, and retries without a network."""
    corpus = load_corpus(None)
    assert (corpus.name, corpus.fallback) == ("pydoc", True)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and warning.count("\n") == 1
    assert "pydoc" in warning and "tinyshakespeare" in warning
    assert len(network.requests) == 1


@pytest.mark.parametrize("name", ["tinyshakespeare", "openwebtext", "no-such-corpus"])
def test_named_corpus_never_falls_back(home: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run on another corpus than the one that was named, and an error without the places tried."""
    monkeypatch.setenv("AVATARL_DATA", str(home / "mine"))
    with pytest.raises(ConfigError) as caught:
        load_corpus(name)
    message = str(caught.value)
    assert "\n" not in message
    for place in (home / name, home / "mine" / name, home / "data" / name):
        assert str(place) in message


def test_edited_shakespeare_is_used_and_said(home: Path, capsys: pytest.CaptureFixture) -> None:
    """Catches results on an edited text that pass for results on tinyshakespeare."""
    put(home / "data/tinyshakespeare/input.txt", "To be")
    corpus = load_corpus(None)
    assert corpus.text == "To be" and not corpus.fallback
    warning = capsys.readouterr().err
    assert corpus.sha256 in warning and TINYSHAKESPEARE_SHA256 in warning and warning.count("\n") == 1


def test_bad_text_is_one_clear_line(home: Path) -> None:
    """Catches tracebacks and guesses instead of the file, the place and the way out."""
    put(home / "empty.txt", "")
    put(home / "folder" / "readme.md", "no text here")
    (home / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    put(home / "mixed" / "a.txt", "fine")
    (home / "mixed" / "b.txt").write_bytes(b"x\xff")
    expected = {
        "empty.txt": ["empty.txt is empty"],
        "folder": ["folder is a folder without .txt files"],
        "latin.txt": ["latin.txt is not UTF-8", "0xe9", "offset 3"],
        "mixed": [str(Path("mixed", "b.txt")), "0xff", "offset 1"],
        str(home / "none" / "x.txt"): ["x.txt is not there"],
        "empty.txt/x": ["x is not there"],
        "": ["data.corpus = ''"],
    }
    for name, parts in expected.items():
        with pytest.raises(ConfigError) as caught:
            load_corpus(name)
        message = str(caught.value)
        assert "\n" not in message
        for part in parts:
            assert part in message, (name, message)


def test_empty_folder_does_not_hide_the_download(home: Path, network: Network, shakespeare: str) -> None:
    """Catches a data/tinyshakespeare/ left empty that keeps the corpus from ever arriving."""
    (home / "data" / "tinyshakespeare").mkdir()
    network.content = shakespeare.encode()
    assert load_corpus("tinyshakespeare").text == shakespeare


def test_the_cache_may_stand_elsewhere(tmp_path, monkeypatch):
    """Catches a variable that is ignored, and an empty one that is taken for the folder one stands in."""
    monkeypatch.delenv("AVATARL_CACHE", raising=False)
    usual = corpora.cache_folder()
    assert usual == corpora.DATA_FOLDER / "cache"
    monkeypatch.setenv("AVATARL_CACHE", "")
    assert corpora.cache_folder() == usual
    monkeypatch.setenv("AVATARL_CACHE", str(tmp_path))
    assert corpora.cache_folder() == tmp_path
