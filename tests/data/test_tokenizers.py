"""Round trips, unknown characters, special tokens, and files that were damaged."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st

from config import ConfigError
from data.tokenizers import (
    BpeTokenizer,
    CharTokenizer,
    Gpt2Tokenizer,
    Tokenizer,
    build_tokenizer,
    load_tokenizer,
    pieces,
    train_bpe,
    train_char,
)

fast = settings(deadline=None, max_examples=60)
AWKWARD = [
    "",
    " ",
    " a",
    "a\n\n b",
    "\r\n",
    "<|endoftext|>",
    "é\u0301",
    "\U0001f600",
    "\x00",
    "don't  stop\t",
    "中文",
]


@pytest.fixture(scope="session")
def bpe(shakespeare: str) -> BpeTokenizer:
    """Trained on a part of Shakespeare, which has none of the awkward characters."""
    return train_bpe(shakespeare[:200_000], 400)


def test_shakespeare_has_65_characters(shakespeare: str) -> None:
    """Catches a vocabulary cut before space and newline, or one in another order (checkpoints would mix)."""
    tokenizer = train_char(shakespeare)
    assert tokenizer.vocab_size == 65
    assert tokenizer.characters.startswith("\n !$&',-.3:;?ABC")
    ids = tokenizer.encode(shakespeare)
    assert ids.dtype == np.int64 and set(ids.tolist()) == set(range(65))
    assert tokenizer.decode(ids) == shakespeare
    assert tokenizer.end_of_text is None


@fast
@given(st.text(min_size=1))
def test_char_round_trip(text: str) -> None:
    """Catches a lookup that mixes up code points, for any alphabet up to the last plane."""
    tokenizer = train_char(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("").shape == (0,) and tokenizer.decode([]) == ""


def test_unseen_character_is_named() -> None:
    """Catches a KeyError, a silent replacement, and (beyond the largest code point) an index out of range."""
    tokenizer = train_char("aceg")
    for text, shown, at in (("abc", "'b'", 1), ("ca\U0001f600", "\U0001f600", 2), ("\n", "'\\n'", 0)):
        with pytest.raises(ConfigError) as caught:
            tokenizer.encode(text)
        message = str(caught.value)
        assert shown in message and f"position {at} " in message and "bpe" in message and "\n" not in message


@fast
@given(st.text())
def test_bpe_round_trip(bpe: BpeTokenizer, text: str) -> None:
    """Catches unknown tokens, an added space, and normalisation: any text must survive."""
    assert bpe.decode(bpe.encode(text)) == text


@fast
@given(st.text())
def test_gpt2_round_trip(gpt2: Gpt2Tokenizer, text: str) -> None:
    """Catches special tokens that refuse or swallow ordinary text."""
    assert gpt2.decode(gpt2.encode(text)) == text


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_round_trips(bpe: BpeTokenizer, gpt2: Gpt2Tokenizer, text: str) -> None:
    """Catches what random text rarely hits: leading spaces, runs of newlines, combining marks, NUL."""
    for tokenizer in (bpe, gpt2):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int64 and ids.ndim == 1
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_of_text not in ids


def test_bpe_has_the_size_asked_for_and_is_repeatable(shakespeare: str, bpe: BpeTokenizer) -> None:
    """Catches a vocabulary without all bytes, and a training whose result depends on thread timing."""
    assert bpe.vocab_size == 400 and len(bpe.tokens) == 400
    assert bpe.fingerprint == train_bpe(shakespeare[:200_000], 400).fingerprint
    assert bpe.decode([0]) == "<|endoftext|>"
    assert len(bpe.encode(shakespeare)) < 0.7 * len(shakespeare)
    smallest = train_bpe("", 257)
    assert smallest.vocab_size == 257 and smallest.decode(smallest.encode("né")) == "né"
    assert train_bpe("aaaa", 1024).vocab_size < 300


def test_gpt2_is_the_published_encoding(gpt2: Gpt2Tokenizer, shakespeare: str) -> None:
    """Catches another vocabulary under the same name: the count is the published one."""
    assert len(gpt2.encode(shakespeare)) == 338_025
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)
    assert gpt2.decode([50256]) == "<|endoftext|>"


@pytest.mark.parametrize("kind", ["char", "bpe", "gpt2"])
def test_saved_and_loaded_is_the_same(
    kind: str, tmp_path: Path, shakespeare: str, gpt2: Gpt2Tokenizer, bpe: BpeTokenizer
) -> None:
    """Catches a saved tokenizer that numbers tokens differently: a resumed run would read noise."""
    made: Tokenizer = {"char": train_char(shakespeare), "bpe": bpe, "gpt2": gpt2}[kind]
    made.save(tmp_path)  # a run's folder, or the file itself
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert type(loaded) is type(made) and loaded.fingerprint == made.fingerprint
        assert (loaded.kind, loaded.vocab_size) == (kind, made.vocab_size)
        assert np.array_equal(loaded.encode(shakespeare[:5000]), made.encode(shakespeare[:5000]))


def test_fingerprints_tell_tokenizers_apart() -> None:
    """Catches a fingerprint of the kind alone: a critic of another vocabulary would be accepted."""
    assert train_char("ab").fingerprint == train_char("bbaa").fingerprint
    assert train_char("ab").fingerprint != train_char("abc").fingerprint


def test_build_tokenizer_makes_what_is_asked(gpt2: Gpt2Tokenizer) -> None:
    """Catches a vocabulary size that is not handed on, and a kind that falls through."""
    assert build_tokenizer("char", "abca", 300).vocab_size == 3
    assert build_tokenizer("bpe", "abca" * 50, 259).vocab_size == 259
    assert build_tokenizer("gpt2", "abca", 300).fingerprint == gpt2.fingerprint
    with pytest.raises(ConfigError, match="char, bpe or gpt2"):
        build_tokenizer("words", "abca", 300)


def test_broken_files_are_one_clear_line(tmp_path: Path, bpe: BpeTokenizer) -> None:
    """Catches a traceback, or worse a tokenizer, from a damaged tokenizer.json."""
    file = tmp_path / "tokenizer.json"
    with pytest.raises(ConfigError, match="can't be read"):
        load_tokenizer(tmp_path)
    bpe.save(file)
    whole = json.loads(file.read_text())
    broken: list[object] = [
        {"kind": "char", "characters": "aba"},
        {"kind": "char", "characters": ""},
        {"kind": "char"},
        {"kind": "words"},
        [],
        {**whole, "tokens": whole["tokens"][:-1]},
        {**whole, "tokens": whole["tokens"][::-1]},
        {**whole, "merges": [["a"]]},
        {**whole, "merges": None},
    ]
    for text in [*map(json.dumps, broken), "", file.read_text()[:-9], "\x00"]:
        file.write_text(text)
        with pytest.raises(ConfigError, match="is broken") as caught:
            load_tokenizer(file)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is broken"):
        load_tokenizer(file)


def test_impossible_ids_and_surrogates_are_refused(bpe: BpeTokenizer, gpt2: Gpt2Tokenizer) -> None:
    """Catches negative ids that count from the end, unknown ids that vanish, surrogates made U+FFFD."""
    for tokenizer in (train_char("abc"), bpe, gpt2):
        for ids in ([-1], [0, tokenizer.vocab_size]):
            with pytest.raises(IndexError, match="outside the vocabulary"):
                tokenizer.decode(ids)
        with pytest.raises(ConfigError, match="position 1"):
            tokenizer.encode("a\ud800")
    with pytest.raises(ConfigError, match="position 1"):
        gpt2.encode_documents(["a", "a\ud800"])


def test_byte_lengths_add_up(gpt2: Gpt2Tokenizer) -> None:
    """Catches characters counted as bytes, and an end of text that counts as 13."""
    text = "naïve 日本語 🙂\n"
    assert gpt2.byte_lengths()[gpt2.encode(text)].sum() == len(text.encode())
    assert gpt2.byte_lengths().shape == (50257,) and gpt2.byte_lengths()[50256] == 0


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_pieces_give_the_same_tokens(bpe: BpeTokenizer, gpt2: Gpt2Tokenizer, shakespeare: str, size: int) -> None:
    """Catches a cut inside a token: the corpus would depend on the size of the pieces it was encoded in."""
    text = shakespeare[:3000] + "end\n\n \n it's\r\n\n.\n'll  \n\n" + shakespeare[3000:6000]
    parts = list(pieces(text, size))
    assert "".join(parts) == text and len(parts) > 3
    for encode in (bpe.encode, gpt2.encode):
        assert np.array_equal(np.concatenate([encode(part) for part in parts]), encode(text))
    whole = bpe.backend.encode(text).ids
    assert bpe.encode(text).tolist() == whole


@fast
@given(st.text(alphabet="ab '\n\t.é<|>", max_size=40), st.integers(1, 5))
def test_pieces_of_any_text(gpt2: Gpt2Tokenizer, text: str, size: int) -> None:
    """Catches cuts that are wrong only beside odd white space, accents or apostrophes."""
    parts = list(pieces(text, size))
    assert "".join(parts) == text and all(parts)
    assert [i for part in parts for i in gpt2.encode(part)] == gpt2.encode(text).tolist()


def test_gpt2_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a stack of connection errors in place of TIKTOKEN_CACHE_DIR."""
    import tiktoken

    def offline(name: str) -> None:
        raise requests.ConnectionError("no network in tests")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ConfigError, match="TIKTOKEN_CACHE_DIR"):
        Gpt2Tokenizer()


@pytest.mark.parametrize("kind, library", [("gpt2", "tiktoken"), ("bpe", "tokenizers")])
def test_missing_library_is_named(kind: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an ImportError where one pip install would help."""
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=f"pip install {library}"):
        build_tokenizer(kind, "abc", 300)


def test_char_vocabulary_must_be_a_set() -> None:
    """Catches two ids for one character."""
    with pytest.raises(ValueError, match="distinct"):
        CharTokenizer("aa")
