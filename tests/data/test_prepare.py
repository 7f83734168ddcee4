"""Splits, vocabularies that must not leak, the token cache, and texts that are too short."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from config import ConfigError, DataConfig
from data import corpora
from data import prepare as preparing
from data.prepare import check_length, prepare
from data.tokenizers import BpeTokenizer, CharTokenizer, pieces, train_char


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with its own data folder and cache."""
    monkeypatch.setattr(corpora, "DATA_FOLDER", tmp_path / "data")
    monkeypatch.delenv("AVATARL_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cache_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of any size go through the cache."""
    monkeypatch.setattr(preparing, "CACHED_FROM", {"char": 0, "bpe": 0, "gpt2": 0})


def put(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def test_shakespeare_splits_as_everyone_splits_it(
    shared: Path, shakespeare: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a split that is off by one or a vocabulary without the held-out characters."""
    monkeypatch.setenv("AVATARL_DATA", str(shared / "data"))
    data = prepare(DataConfig(corpus="tinyshakespeare"))
    assert (len(data.train), len(data.val)) == (1_003_854, 111_540)
    assert data.tokenizer.vocab_size == 65 and data.train.dtype == data.val.dtype == np.uint16
    assert data.tokenizer.decode(data.train) + data.tokenizer.decode(data.val) == shakespeare
    assert data.val_bytes == 111_540
    assert data.corpus_sha256 == corpora.TINYSHAKESPEARE_SHA256
    assert (data.corpus_name, data.fallback) == ("tinyshakespeare", False)
    assert data.corpus_source == str(shared / "data" / "tinyshakespeare")


@pytest.mark.parametrize("length, share, held_out", [(10, 0.1, 1), (10, 0.9, 9), (100, 0.07, 7), (3, 0.5, 2)])
def test_split_is_exact(home: Path, length: int, share: float, held_out: int) -> None:
    """Catches binary fractions that move a character to the other side."""
    path = put(home / "a.txt", "ab" * (length // 2) + "b" * (length % 2))
    assert len(prepare(DataConfig(corpus=path, val_fraction=share)).val) == held_out


def test_separate_validation_corpus(home: Path) -> None:
    """Catches a tenth held out although another corpus validates, and bytes counted as characters."""
    data = prepare(DataConfig(corpus=put(home / "a.txt", "abcé" * 10), val_corpus=put(home / "b.txt", "aéé")))
    assert len(data.train) == 40 and data.tokenizer.decode(data.val) == "aéé"
    assert data.val_bytes == 5
    assert data.corpus_source.endswith("a.txt")


def test_unseen_character_of_the_validation_corpus(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a message that leaves open which text, or counts from the piece instead of the text's start."""
    monkeypatch.setattr(preparing, "pieces", lambda text, size: pieces(text, 3))
    config = DataConfig(corpus=put(home / "a.txt", "ab\n" * 9), val_corpus=put(home / "b.txt", "ab\nab\nab\nabz"))
    with pytest.raises(ConfigError) as caught:
        prepare(config)
    for part in ("b.txt", "'z'", "position 11 "):
        assert part in str(caught.value)


def test_bpe_learns_from_the_training_split_alone(home: Path) -> None:
    """Catches merges learned from held-out text, which make validation easier than it is."""
    data = prepare(DataConfig(corpus=put(home / "a.txt", "ab " * 300 + "qz " * 33), tokenizer="bpe", bpe_vocab=300))
    assert isinstance(data.tokenizer, BpeTokenizer)
    assert "Ġab" in data.tokenizer.tokens
    assert not any("qz" in token for token in data.tokenizer.tokens)


def test_train_start_and_stop_cut_tokens_not_vocabulary(home: Path) -> None:
    """Catches halves for cross-fitting that overlap, leave a gap, or speak different vocabularies."""
    path = put(home / "a.txt", "a" * 33 + "b" * 33 + "c" * 9)
    whole = prepare(DataConfig(corpus=path))
    halves = [
        prepare(DataConfig(corpus=path, train_stop=0.5)),
        prepare(DataConfig(corpus=path, train_start=0.5)),
    ]
    assert np.array_equal(np.concatenate([half.train for half in halves]), whole.train)
    for half in halves:
        assert half.tokenizer.fingerprint == whole.tokenizer.fingerprint
        assert np.array_equal(half.val, whole.val)


def test_given_tokenizer_is_used(home: Path) -> None:
    """Catches a resume that numbers the characters anew after the corpus grew or shrank."""
    path = put(home / "a.txt", "bcb" * 10)
    data = prepare(DataConfig(corpus=path, tokenizer="bpe"), tokenizer=train_char("abcd"))
    assert data.train[:3].tolist() == [1, 2, 1]
    with pytest.raises(ConfigError, match=r"a\.txt.*'b'"):
        prepare(DataConfig(corpus=path), tokenizer=train_char("c"))


def test_fallback_is_recorded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Catches a run that doesn't know that it trained on the embedded corpus."""

    def offline(url: str, size: int) -> bytes:
        raise corpora.DownloadError("no network in tests")

    monkeypatch.setattr(corpora, "_fetch", offline)
    data = prepare(DataConfig())
    assert (data.corpus_name, data.corpus_source, data.fallback) == ("pydoc", "embedded", True)
    assert capsys.readouterr().err.count("warning: ") == 1


@pytest.mark.usefixtures("cache_everything")
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_cache_is_memory_mapped_and_spares_the_work(
    kind: Literal["char", "bpe"], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a cache that is never read, or read for another text or tokenizer."""
    config = DataConfig(corpus=put(home / "a.txt", "hear, hear\n" * 40), tokenizer=kind, bpe_vocab=260)
    first = prepare(config)
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_encoded", None)
        if kind == "bpe":
            patch.setattr(preparing, "build_tokenizer", None)
        again = prepare(config)
    assert isinstance(again.train, np.memmap) and not again.train.flags.writeable
    assert np.array_equal(again.train, first.train) and np.array_equal(again.val, first.val)
    put(home / "a.txt", "here, here\n" * 40)
    other = prepare(config)
    assert other.tokenizer.decode(other.train).startswith("here, here\n")
    reader = train_char("here, \nz")
    assert reader.decode(prepare(config, tokenizer=reader).train).startswith("here, here\n")
    assert not [p for p in (home / "data" / "cache").rglob("*") if p.name.startswith(".")]


@pytest.mark.usefixtures("cache_everything")
@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "zip", "dtype", "shape"])
def test_broken_cache_is_rebuilt(damage: str, home: Path) -> None:
    """Catches a run that dies of, or trains on, a file cut short by a full disk."""
    config = DataConfig(corpus=put(home / "a.txt", "hear, hear\n" * 40), tokenizer="bpe", bpe_vocab=260)
    good = prepare(config)
    expected = np.array(good.train)
    files = sorted((home / "data" / "cache").rglob("*.*"))
    assert [f.name for f in files if f.is_file()].count("tokens.npy") == 2
    for file in files:
        content = file.read_bytes()
        file.unlink()  # the old file is still mapped
        if damage in ("dtype", "shape") and file.suffix == ".npy":
            np.save(file, np.zeros(4, np.float32) if damage == "dtype" else np.zeros((2, 2), np.uint16))
        else:
            bad = {
                "empty": b"",
                "garbage": b"noise" * 99,
                "truncated": content[:-5],
                "zip": b"PK\x03\x04" + content,
            }
            file.write_bytes(bad.get(damage, b"noise"))
    again = prepare(config)
    assert np.array_equal(again.train, expected) and again.tokenizer.fingerprint == good.tokenizer.fingerprint
    for file in files:
        if file.suffix == ".npy":
            assert np.load(file).dtype == np.uint16


@pytest.mark.usefixtures("cache_everything")
def test_cache_that_cannot_be_written(home: Path, capsys: pytest.CaptureFixture) -> None:
    """Catches a run that stops because of a read-only checkout."""
    put(home / "data", "a file where the folder should be")
    data = prepare(DataConfig(corpus=put(home / "a.txt", "abc" * 30)))
    assert data.tokenizer.decode(data.train) == "abc" * 27
    assert "warning: " in capsys.readouterr().err


def test_small_texts_leave_no_cache(home: Path) -> None:
    """Catches a cache that fills up with what takes a millisecond to make again."""
    prepare(DataConfig(corpus=put(home / "a.txt", "abc" * 30), tokenizer="bpe", bpe_vocab=257))
    assert not (home / "data").exists()


def test_check_length_says_what_would_fit(home: Path) -> None:
    """Catches a window without its last target, and a first batch that fails deep inside."""
    data = prepare(DataConfig(corpus=put(home / "a.txt", "ab" * 50)))  # 90 and 10 tokens
    check_length(data, 9)
    with pytest.raises(ConfigError, match=r"validation split .* has 10 tokens.* needs 11.*block-size 9 "):
        check_length(data, 10)
    with pytest.raises(ConfigError, match=r"training split .* has 90 tokens.* needs 91.*block-size 89 "):
        check_length(data, 90)
    tiny = prepare(DataConfig(corpus=put(home / "b.txt", "a")))
    with pytest.raises(ConfigError, match="more text") as caught:
        check_length(tiny, 1)
    assert "--model.block-size" not in str(caught.value)


def test_large_vocabularies_need_more_than_16_bits(home: Path) -> None:
    """Catches ids that wrap around in uint16."""
    text = "".join(chr(c) for c in range(0x10000, 0x10000 + 70_000))
    data = prepare(DataConfig(corpus=put(home / "a.txt", text)))
    assert isinstance(data.tokenizer, CharTokenizer) and data.train.dtype == np.uint32
    assert data.tokenizer.decode(data.val) == text[63_000:]


def test_tokens_say_what_they_stand_for(home):
    """Catches pieces of words taken for characters, which words and lines are looked for in, and pieces unnamed."""
    text = "the cat sat on the mat, the rat sat on the cat. " * 40
    (home / "text.txt").write_text(text)
    spelled, bpe = (prepare(DataConfig(corpus="text.txt", tokenizer=kind, bpe_vocab=300)) for kind in ("char", "bpe"))
    assert spelled.characters == spelled.strings == sorted(set(text))
    assert bpe.characters is None and len(bpe.strings) == bpe.tokenizer.vocab_size
    assert "".join(bpe.strings[i] for i in bpe.train) + "".join(bpe.strings[i] for i in bpe.val) == text
