"""The quick way to GPT-2's tokens says what tiktoken says, and steps aside where it does not."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import gpt2_quick, tokenizers
from data.gpt2_quick import AWKWARD, QuickEncoder, may_differ, quick_encoder
from data.tokenizers import Gpt2Tokenizer
from tests.tiny_train import ROOT, environment

SPACES = " \n\t\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2003\u200b\u2028\u2029\u202f\u205f\u3000\ufeff"
WORDS = ["the", "don't", "I'LL", "x'", "'s", "1234", "é", "e\u0301", "日本語", "🙂", "--", "…", "the,", 'word."']
WORDS += ["the's,", "x!?", "é.", "<|endoftext|>", "\0", "\U000323b0", "\ua7ce", "ʼn", "½", "١٢", "’ll"]
PIECES = st.sampled_from([*SPACES, "  ", "\n\n", " \n", "\r\n", *WORDS, "a" * 33, "q", "!"])
TEXTS = st.lists(PIECES, max_size=40).map("".join) | st.text()


@pytest.fixture(scope="module")
def encoder(gpt2: Gpt2Tokenizer) -> QuickEncoder:
    """One that remembers from test to test: what it has met must not matter."""
    return QuickEncoder(gpt2._encoding)


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """As in a process that has not asked for the encoder yet, and leaves none behind."""
    quick_encoder.cache_clear()
    yield
    quick_encoder.cache_clear()


def by_tiktoken(gpt2: Gpt2Tokenizer, text: str) -> list[int]:
    return gpt2._encoding.encode_ordinary(text)


@settings(deadline=None, max_examples=400)
@given(TEXTS)
@example("")
@example(" ")
@example("It's  so\n\n\n \tgood \n")
@example("\x1c! \x1d")
@example("\U000323b0's")
@example(AWKWARD)
def test_tokens_are_tiktokens(encoder: QuickEncoder, gpt2: Gpt2Tokenizer, text: str) -> None:
    """Catches a text that is split by other rules: at white space, apostrophes, digits, or at its end."""
    found = encoder.encode(text.encode())
    assert found.dtype == np.uint16 and found.tolist() == by_tiktoken(gpt2, text)


def test_every_character_is_of_the_same_class(encoder: QuickEncoder, gpt2: Gpt2Tokenizer) -> None:
    """Catches a character that is a letter, a digit or white space to one library alone: of another Unicode."""
    planes = (*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000))  # 4 to 13 hold nothing yet
    characters = [c for c in map(chr, planes) if not may_differ(c.encode())]
    assert len(characters) > 225_000
    text = "".join(f"{c}'s  {c}" for c in characters)
    expected = gpt2._encoding.encode_to_numpy(text, disallowed_special=())
    assert np.array_equal(encoder._backend.encode(text.encode()), expected)


def test_newer_letters_are_tiktokens(encoder: QuickEncoder, gpt2: Gpt2Tokenizer) -> None:
    """Catches letters of Unicode 17 that make tokens which no GPT-2 was trained on, anywhere in a text."""
    for c in "\u088f\u0c5c\u0cdc\ua7ce\ua7f1\U00010940\U00011de0\U00016ea0\U00018d80\U0001e6c0\U0002b73a\U000323b0":
        text = f"Ends {c}'s text" * 3
        assert may_differ(text.encode()) and encoder.encode(text.encode()).tolist() == by_tiktoken(gpt2, text)
    assert not may_differ(AWKWARD.encode()), "the text that decides for gigatoken is encoded by it"


def test_whole_plays_and_articles_are_encoded_alike(gpt2: Gpt2Tokenizer, shakespeare: str, shared: Path) -> None:
    """Catches what short texts do not reach: thousands of words, met for the first time and again."""
    fresh = QuickEncoder(gpt2._encoding)
    articles = (shared / "data" / "wikitext-2" / "test.txt").read_text(encoding="utf-8")
    for text in (shakespeare, articles[:600_000], shakespeare):
        expected = gpt2._encoding.encode_to_numpy(text, disallowed_special=())
        assert np.array_equal(fresh.encode(text.encode()), expected)


def test_words_without_end(encoder: QuickEncoder, gpt2: Gpt2Tokenizer) -> None:
    """Catches a word that outgrows what is remembered of it."""
    letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, size=100_000, dtype=np.uint8).tobytes()
    for text in (letters.decode(), "é" * 50_000, "7" * 100_000, "-=" * 50_000, " " * 100_000, "\n" * 100_000):
        assert encoder.encode(text.encode()).tolist() == by_tiktoken(gpt2, text)


@settings(deadline=None, max_examples=60)
@given(st.lists(TEXTS, max_size=5))
def test_documents_follow_each_other(gpt2: Gpt2Tokenizer, texts: list[str]) -> None:
    """Catches documents joined before they are split, and one whose end is missing because it is empty."""
    expected = [i for text in texts for i in [*by_tiktoken(gpt2, text), 50256]]
    for quick_from in (0, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tokenizers, "QUICK_FROM", quick_from)
            found = gpt2.encode_documents(texts)
            assert found.dtype == np.uint16 and found.tolist() == expected
            for text in texts:
                assert gpt2.encode(text).dtype == np.int64 and gpt2.encode(text).tolist() == by_tiktoken(gpt2, text)


def test_memory_does_not_grow_for_ever(gpt2: Gpt2Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches words that are kept for as long as a corpus lasts, and tokens that change when they are forgotten."""
    monkeypatch.setattr(gpt2_quick, "REMEMBERED", 1000)
    encoder = QuickEncoder(gpt2._encoding)
    backends, text = [], "To be, or not to be. " * 10  # 210 bytes
    for _ in range(12):
        assert encoder.encode(text.encode()).tolist() == by_tiktoken(gpt2, text)
        if encoder._backend not in backends:
            backends.append(encoder._backend)
    assert len(backends) == 3 and encoder._met <= 1210


def test_much_text_is_encoded_quickly(gpt2: Gpt2Tokenizer, asked_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a quick way that is never taken, one for a prompt that it costs more than it saves, and a wrong name."""
    monkeypatch.setattr(tokenizers, "QUICK_FROM", 20)
    assert gpt2.library(19) == "tiktoken" and quick_encoder.cache_info().currsize == 0
    assert gpt2.library(20) == "gigatoken"
    taken: list[bytes] = []
    encode = QuickEncoder.encode

    def counted(encoder: QuickEncoder, text: bytes) -> np.ndarray:
        taken.append(text)
        return encode(encoder, text)

    monkeypatch.setattr(QuickEncoder, "encode", counted)
    gpt2.encode("a" * 19)
    gpt2.encode_documents(["a" * 10, "b" * 9])
    assert not taken
    gpt2.encode("a" * 20)
    gpt2.encode_documents(["a" * 10, "b" * 10])
    assert [len(text) for text in taken] == [20, 10, 10]


def other_library(from_tiktoken: Any) -> ModuleType:
    module = ModuleType("gigatoken")
    module.Tokenizer = SimpleNamespace(from_tiktoken=from_tiktoken)  # type: ignore[attr-defined]
    return module


def failing(*_: object, **__: object) -> None:
    raise ValueError("unknown pretokenizer")


def shifted(*_: object, **__: object) -> object:
    return SimpleNamespace(encode=lambda text: np.arange(len(text), dtype=np.uint32))


@pytest.mark.parametrize(
    ("library", "said"),
    [
        (None, ""),
        (other_library(shifted), "it makes other tokens"),
        (other_library(failing), "ValueError: unknown pretokenizer"),
        (ModuleType("gigatoken"), "AttributeError"),
    ],
    ids=["absent", "different", "refusing", "changed"],
)
def test_tiktoken_steps_in(
    gpt2: Gpt2Tokenizer,
    asked_anew: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    library: ModuleType | None,
    said: str,
) -> None:
    """Catches tokens of a gigatoken that makes others, an error where tiktoken would do, and a warning per text."""
    monkeypatch.setitem(sys.modules, "gigatoken", library)
    monkeypatch.setattr(tokenizers, "QUICK_FROM", 0)
    for text in ("To be", "or not"):
        assert gpt2.encode(text).tolist() == by_tiktoken(gpt2, text)
    assert gpt2.library(1) == "tiktoken"
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == bool(said)
    assert not said or (said in warnings[0] and "tiktoken" in warnings[0])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted where Linux lists them")
def test_it_works_alone_and_in_forks(gpt2: Gpt2Tokenizer) -> None:
    """Catches a pool of threads in each of many worker processes, and a child of fork that waits for one for ever."""
    script = (
        "import os\n"
        "from data.tokenizers import Gpt2Tokenizer\n"
        "from data.gpt2_quick import quick_encoder\n"
        "encoder = quick_encoder(Gpt2Tokenizer()._encoding)\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "texts = [f'Text {i} of many. '.encode() * 50 for i in range(500)]\n"
        "tokens = [encoder.encode(text).tolist() for text in texts]\n"
        "assert len(os.listdir('/proc/self/task')) == before\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    os._exit(0 if [encoder.encode(text).tolist() for text in texts] == tokens else 3)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
