"""The quick way to GPT-2's tokens says what tiktoken says, whatever it has met before."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.gpt2_words import LONGEST, WordEncoder, byte_lengths
from data.tokenizers import Gpt2Tokenizer

SPACES = " \n\t\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2003\u200b\u2028\u2029\u202f\u205f\u3000\ufeff"
WORDS = [
    "the",
    "don't",
    "I'LL",
    "x'",
    "'s",
    "1234",
    "é",
    "e\u0301",
    "日本語",
    "🙂",
    "--",
    "…",
    "the,",
    'word."',
    "the's,",
    "x!?",
    "é.",
    "<|endoftext|>",
    "\0",
]
PIECES = st.sampled_from([*SPACES, "  ", "\n\n", " \n", "\r\n", *WORDS, "a" * (LONGEST + 1), "q", "!"])
TEXTS = st.lists(PIECES, max_size=40).map("".join) | st.text()


@pytest.fixture(scope="module")
def encoder(gpt2: Gpt2Tokenizer) -> WordEncoder:
    """One that remembers from test to test: what it has met must not matter."""
    return WordEncoder(gpt2._encoding)


def by_tiktoken(gpt2: Gpt2Tokenizer, text: str) -> list[int]:
    return gpt2._encoding.encode_ordinary(text)


@settings(deadline=None, max_examples=300)
@given(TEXTS)
@example("\x1c! \x1d")
@example("It's  so\n\n\n \tgood \n")
@example("a \n \n b")
@example("a\n\n b\n\nc  d")
@example("a\n\n")
@example("a  ")
@example("  a")
@example("\n\na\n b \nc")
@example(" ")
@example("")
def test_tokens_are_tiktokens(encoder: WordEncoder, gpt2: Gpt2Tokenizer, text: str) -> None:
    """Catches a text cut where one of GPT-2's rules looks across: between two spaces, at white space that is only
    Python's, at the end of the text."""
    found = encoder.encode(text)
    assert found.dtype == np.uint16 and found.tolist() == by_tiktoken(gpt2, text)


@settings(deadline=None, max_examples=60)
@given(st.lists(TEXTS, max_size=5), st.integers(0, 6))
def test_documents_follow_each_other(gpt2: Gpt2Tokenizer, texts: list[str], remembered: int) -> None:
    """Catches new words of one document entered under those of another, and a full memory that loses some."""
    expected = [i for text in texts for i in [*by_tiktoken(gpt2, text), 50256]]
    small = WordEncoder(gpt2._encoding, remembered)
    for _ in range(2):
        assert small.encode_documents(texts, 50256).tolist() == expected
    assert len(small._spaced) <= remembered


def test_whole_plays_are_encoded_alike(encoder: WordEncoder, gpt2: Gpt2Tokenizer, shakespeare: str) -> None:
    """Catches what short texts do not reach: thousands of new words that are asked for together."""
    assert np.array_equal(encoder.encode(shakespeare), gpt2.encode(shakespeare))
    documents = shakespeare[:60_000].split("\n\n")
    separate = np.concatenate([np.append(gpt2.encode(text), 50256) for text in documents])
    assert np.array_equal(gpt2.encode_documents(documents), separate)


def test_known_words_are_not_asked_for_again(gpt2: Gpt2Tokenizer) -> None:
    """Catches a memory that is never read, which would be correct and slow."""

    class Counting:
        calls = 0

        def __getattr__(self, name: str) -> object:
            Counting.calls += name.startswith("encode")
            return getattr(gpt2._encoding, name)

    words = WordEncoder(Counting())
    words.encode("to be or not to be")
    before = Counting.calls
    words.encode("to be not to be")
    assert Counting.calls == before


def test_byte_lengths_add_up(gpt2: Gpt2Tokenizer) -> None:
    """Catches characters counted as bytes, and an end of text that counts as 13."""
    lengths = byte_lengths(gpt2._encoding)
    text = "naïve 日本語 🙂\n"
    assert lengths[gpt2.encode(text)].sum() == len(text.encode())
    assert lengths.shape == (50257,) and lengths[50256] == 0
