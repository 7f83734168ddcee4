"""A corpus is tokenised whole: every document once and in order, however often and wherever that is interrupted."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import corpora, documents, openwebtext, shards
from data.openwebtext import Settings
from data.shards import Manifest, open_corpus
from data.tokenizers import Gpt2Tokenizer
from tests.data.builders import DONE, TEXTS, expected, furnished, made, make, put
from tests.tiny_train import files_below, here

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, gpt2: Gpt2Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with documents, and GPT-2's vocabulary at hand."""
    return furnished(tmp_path, monkeypatch)


def test_every_document_is_there_once_and_in_order(home: Path, gpt2: Gpt2Tokenizer) -> None:
    """Catches documents lost between files or shards, a missing <|endoftext|>, and counts that do not add up."""
    outcome = make()
    assert outcome.code == 0, outcome.err
    assert np.array_equal(made(home), expected(gpt2))
    corpus = open_corpus(home / "data" / "mine")
    manifest = corpus.manifest
    assert np.array_equal(corpus.tokens, expected(gpt2)) and isinstance(corpus.tokens.base, np.memmap)
    assert len(manifest.shards) > 4 and manifest.documents == len(TEXTS)
    assert manifest.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert files_below(home / "data" / "mine") == DONE
    said = f"{len(TEXTS)} documents, {manifest.text_bytes:,} bytes of text, {manifest.tokens:,} tokens"
    assert said in outcome.out and manifest.sha256 in outcome.out and "--data.corpus mine" in outcome.out


def test_shards_depend_on_the_documents_alone(home: Path) -> None:
    """Catches a corpus whose hash, by which critics and caches are found, depends on how it was made."""
    make()
    first = open_corpus(home / "data" / "mine").sha256
    shutil.rmtree(home / "data")
    make(characters=1000)
    assert open_corpus(home / "data" / "mine").sha256 != first  # other shards, other sums
    shutil.rmtree(home / "data")
    make()
    assert open_corpus(home / "data" / "mine").sha256 == first


class Death(BaseException):
    """The process is gone: nothing after it happens."""


class Mortal:
    """Lets so many operations on files through, and none after them. The last one may still happen."""

    def __init__(self, patch: pytest.MonkeyPatch, lives: int, late: bool) -> None:
        self.lives, self.late, self.dead = lives, late, False
        patch.setattr(os, "replace", self.watched(os.replace))
        patch.setattr(os, "fsync", self.watched(os.fsync))
        patch.setattr(Path, "unlink", self.watched(Path.unlink))

    def watched(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def step(*rest: Any, **options: Any) -> Any:
            if self.dead:
                raise Death
            self.lives -= 1
            if self.lives >= 0:
                return operation(*rest, **options)
            self.dead = True
            if self.late:
                operation(*rest, **options)
            raise Death

        return step


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_death_between_any_two_steps_costs_nothing(home: Path, gpt2: Gpt2Tokenizer, late: bool) -> None:
    """Catches an order of writing, renaming, recording and deleting in which a kill loses or doubles documents."""
    settings = Settings("mine", "source", processes=1, shard_characters=700)
    folder, deaths = settings.folder, 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            try:
                Mortal(patch, deaths, late)
                openwebtext.prepare_documents(settings)
                break
            except Death:
                deaths += 1
        assert openwebtext.prepare_documents(settings) == 0
        assert np.array_equal(made(home), expected(gpt2)), deaths
        assert files_below(folder) == DONE and Manifest.load(folder).documents == len(TEXTS)
    assert deaths > 15


def test_finished_shards_are_not_made_again(home: Path, gpt2: Gpt2Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a restart from the beginning, and one that repeats what other processes had finished ahead of order."""
    made_before = openwebtext.make_shard
    asked: list[int] = []

    def failing(folder: Path, cut: openwebtext.Cut) -> shards.Shard:
        asked.append(cut.number)
        if cut.number == 3 and asked.count(3) == 1:
            raise KeyboardInterrupt
        return made_before(folder, cut)

    monkeypatch.setattr(openwebtext, "make_shard", failing)
    outcome = make()
    assert outcome.code == 130 and "continues where it stopped" in outcome.out
    monkeypatch.setattr(openwebtext, "make_shard", made_before)
    folder = home / "data" / "mine"
    manifest = Manifest.load(folder)
    assert len(manifest.shards) == 3 and not manifest.complete
    source = openwebtext.open_source("source", "text", "file")
    third, fourth, *_ = openwebtext.cuts(source, manifest, 100)
    openwebtext.make_shard(folder, fourth)  # as another process does ahead of the third
    monkeypatch.setattr(openwebtext, "make_shard", failing)
    assert make().code == 0
    assert asked.count(4) == 0 and asked.count(0) == 1 and asked.count(3) == 2 and third.number == 3
    assert np.array_equal(made(home), expected(gpt2))


def test_what_was_not_recorded_is_cut_off(home: Path, gpt2: Gpt2Tokenizer) -> None:
    """Catches tokens that a killed process had appended and that would come twice."""
    make()
    folder = home / "data" / "mine"
    manifest = Manifest.load(folder)
    manifest.complete = False
    del manifest.shards[2:]
    manifest.save(folder)
    (folder / ".shard-00003.bin.x").write_bytes(b"half")
    (folder / "shard-00002.bin").write_bytes(b"without its description")
    (folder / "shard-00001.json").write_text("{}")
    assert make().code == 0
    assert np.array_equal(made(home), expected(gpt2)) and files_below(folder) == DONE


def test_a_damaged_shard_is_not_joined(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a shard whose bytes changed between its process and the stream."""
    write = shards.write_shard

    def broken(folder: Path, shard: shards.Shard, data: bytes) -> None:
        write(folder, shard, bytes(len(data)) if shard.index == 1 else data)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_shard", broken)
        outcome = make()
        assert outcome.code == 1 and "shard-00001.bin does not match its checksum" in outcome.errors[0]
    assert make().code == 0
    assert make("--verify").code == 0


def test_verify_reads_everything(home: Path) -> None:
    """Catches a check that compares sizes and no contents."""
    make()
    assert "is whole" in make("--verify").out
    path = home / "data" / "mine" / "tokens.bin"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    outcome = make("--verify")
    assert outcome.code == 1 and "1 of " in outcome.errors[0] and "checksums" in outcome.errors[0]


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda home: put(home / "source" / "d.jsonl", ["more"]), "files = 3, not for 4"),
        (lambda home: put(home / "source" / "a.jsonl", ["other"]), "names and sizes"),
        (lambda home: ["--shard-characters", "300"], "shard_characters = 100, not for 300"),
        (lambda home: ["--column", "n"], "column = 'text', not for 'n'"),
        (lambda home: (home / "data/mine/manifest.json").write_text("{"), "can't be understood"),
        (lambda home: (home / "data/mine/manifest.json").write_text('{"format": 9}'), "format 9"),
        (lambda home: (home / "data/mine/manifest.json").unlink(), "holds other files"),
        (lambda home: (home / "data/mine/tokens.bin").write_bytes(b"xy"), "has 2 of the"),
    ],
)
def test_other_work_is_never_continued(home: Path, change: Callable[[Path], Any], named: str) -> None:
    """Catches two sources in one stream, and a folder of something else that is overwritten."""
    make()
    words = change(home)
    outcome = make(*(words if isinstance(words, list) else []))
    if (home / "data/mine/tokens.bin").stat().st_size == 2:  # a complete corpus is looked at when it is opened
        with pytest.raises(ValueError, match="has 2 "):
            open_corpus(home / "data" / "mine")
    assert outcome.code == 2 and named in outcome.errors[0], outcome


def test_only_one_process_prepares_a_corpus(home: Path) -> None:
    """Catches two commands that append to one file."""
    with shards.locked(home / "data" / "mine"):
        outcome = make()
    assert outcome.code == 2 and "another process" in outcome.errors[0]
    assert make().code == 0


def test_the_disk_is_asked_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a preparation that fills the disk after an hour."""
    (home / "text").mkdir()
    (home / "text" / "a.txt").write_text("The end. " * 1000)
    usage = shutil.disk_usage(home)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    outcome = here("b", "--source", "text", "--processes", "1", main=openwebtext.main)
    assert outcome.code == 2 and "GB are needed" in outcome.errors[0] and "--out" in outcome.errors[0]
    assert not (home / "data" / "b" / "tokens.bin").stat().st_size


def test_what_will_be_made_is_said_first(home: Path) -> None:
    """Catches a prediction in characters, of one process, or of all that is there already."""
    (home / "text").mkdir()
    (home / "text" / "a.txt").write_text("Häng. " * 1000, encoding="utf-8")
    outcome = here("b", "--source", "text", "--processes", "1", main=openwebtext.main)
    tokens = open_corpus(home / "data" / "b").manifest.tokens
    assert "1 documents, 0.0 MB of text" in outcome.out and f"about {tokens / 1e6:,.1f} M" in outcome.out
    settings = Settings("b", "text", processes=4)
    source = openwebtext.open_source("text", "text", "file")
    predicted = openwebtext.predict(settings, source, Manifest({}), openwebtext.tokenizer_here())
    assert predicted is not None and predicted.text_bytes == 7000 and predicted.tokens == pytest.approx(tokens)
    slow = predicted._replace(bytes_per_second=7000 / 240)  # 240 s for one process
    assert any("about 1.0 min: 4 x" in line for line in openwebtext.plan(settings, source, Manifest({}), slow))


def test_a_finished_corpus_is_left_alone(home: Path) -> None:
    """Catches a second command that needs the source, or begins again."""
    make()
    shutil.rmtree(home / "source")
    outcome = here("mine", main=openwebtext.main)
    assert outcome.code == 0 and "is complete" in outcome.out


@pytest.mark.parametrize(
    "words, named",
    [
        (["mine"], "source = ''"),
        (["mine", "--source", "./nowhere"], "no such file or folder"),
        (["mine", "--source", "empty"], "no file that is .txt"),
        (["mine", "--source", "mixed"], "several kinds"),
        (["mine", "--source", "source", "--column", "body"], "column = 'body'"),
        (["mine", "--source", "bad", "--processes", "1"], "not UTF-8"),
        (["mine", "--source", "blank", "--processes", "1"], "holds no text"),
        (["../mine", "--source", "source"], "name = '../mine'"),
        (["mine", "--source", "source", "--processes", "-1"], "processes = -1"),
    ],
)
def test_bad_input_is_one_clear_line(home: Path, words: list[str], named: str) -> None:
    """Catches a traceback of the library instead of the field and the way out."""
    for name in ("empty", "mixed", "bad", "blank"):
        (home / name).mkdir()
    (home / "mixed" / "a.txt").write_text("text")
    put(home / "mixed" / "b.jsonl", ["text"])
    (home / "bad" / "a.txt").write_bytes(b"caf\xe9")
    (home / "blank" / "a.jsonl").write_text('{"text": ""}\n')
    outcome = here(*words, main=openwebtext.main)
    assert outcome.code == 2 and len(outcome.errors) == 1 and named in outcome.errors[0], outcome


def test_the_library_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an ImportError where one line would help."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    outcome = make()
    assert outcome.code == 2 and "pip install datasets" in outcome.errors[0]


def test_a_data_set_with_a_script_is_read_as_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches OpenWebText given up because the library no longer runs its script."""
    local = datasets.load_dataset("json", data_files={"train": ["source/c.jsonl"]}, split="train", streaming=True)
    asked: list[Any] = []

    def load(name: str, revision: str | None = None, **_: Any) -> Any:
        asked.append((name, revision))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")
        return local

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(documents, "_commit", lambda name, revision: "c0ffee")
    outcome = here("openwebtext", "--processes", "1", main=openwebtext.main)
    assert outcome.code == 0, outcome.err
    assert asked == [("Skylion007/openwebtext", None), ("Skylion007/openwebtext", "refs/convert/parquet")]
    manifest = open_corpus(corpora.tokens_folder("openwebtext") or Path()).manifest
    assert manifest.documents == 13 and manifest.made_for["commit"] == "c0ffee"
    assert "8,013,769 documents, 39,769.5 MB of text" in outcome.out


def test_without_a_network_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error of many lines from deep inside the library."""

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    outcome = here("openwebtext", main=openwebtext.main)
    assert outcome.code == 2 and len(outcome.errors) == 1 and "\n" not in outcome.err.strip()
    assert "Couldn't reach the Hub" in outcome.errors[0] and "--source" in outcome.errors[0]


def test_a_kill_before_the_last_word_costs_nothing(home: Path, gpt2: Gpt2Tokenizer) -> None:
    """Catches a corpus whose shards are all there, and that can neither be finished nor used."""
    assert make().code == 0
    manifest = home / "data" / "mine" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    outcome = make()
    assert outcome.code == 0, outcome.err
    assert np.array_equal(made(home), expected(gpt2)) and '"complete": true' in manifest.read_text()


def test_a_source_without_text_is_said(home: Path) -> None:
    """Catches a division by nothing, and a corpus of no tokens."""
    (home / "empty.txt").write_text("")
    outcome = here("b", "--source", "empty.txt", "--processes", "1", main=openwebtext.main)
    assert outcome.code == 2 and "it holds no text" in outcome.errors[0]


def test_a_column_of_numbers_is_said(home: Path) -> None:
    """Catches a traceback from the tokenizer where --column names what is no text."""
    outcome = make("--column", "n")
    assert outcome.code == 2 and "column = 'n'" in outcome.errors[0] and "int64 there, not text" in outcome.errors[0]
