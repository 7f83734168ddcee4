"""GPT-2's tokens by looking words up: what tiktoken says of a text, sooner where words repeat.

GPT-2 splits a text before it merges bytes, and none of its rules looks across the place where white space begins, nor
across that before its last character when a word follows. A text may therefore be cut there, and a language repeats
its words: the tokens of white space and the word behind it are asked of tiktoken once, many words at a time, and
remembered. Text that hardly repeats its words gains nothing: `python -m experiments.loading` measures both. Source:
DESIGN section 5.
"""

import functools
import re
from array import array
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

REMEMBERED = 500_000  # words, some 120 MB; the first ones that are met, among which the frequent ones are
LONGEST = 32  # characters of a word that is remembered
# Two characters of white space or more, up to where white space begins again.
_RUN = re.compile(r"(\s\s+\S*)")
# A word of letters and what follows of these are two pieces to GPT-2; an apostrophe may begin a third kind.
_MARKS = '!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~'
# White space to Python, but not to GPT-2.
_SEPARATORS = "\x1c\x1d\x1e\x1f"
# White space besides spaces and line breaks: of texts of ASCII, and of all others.
_RARE = "\t\r\x0b\x0c"
_RARE_ANYWHERE = re.compile("[\t\r\x0b\x0c\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")
# In a text with a space before each line break, two cuts in a row behind neither of which a word begins. Between
# them a run of white space goes on.
_NO_WORDS = ("   ", "  \n ", " \n  ", " \n \n ")
_NO_LAST_WORDS = ("  ", "  \n", " \n ", " \n \n")


class WordEncoder:
    """Ordinary text to GPT-2's token ids with a tiktoken `encoding`, exactly as that encodes it.

    Text that spells out <|endoftext|> is text. Lone surrogates are for callers to refuse.
    """

    def __init__(self, encoding: Any, remembered: int = REMEMBERED) -> None:
        self._encoding = encoding
        self._lengths = byte_lengths(encoding)
        self._new = _New([], [])
        self._spaced = _Words(" ", remembered, self._new, self._ids)
        self._as_is = _Words("", remembered // 4, self._new, self._ids)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, (n,) uint16."""
        return self._joined(self._pieces(text))

    def encode_documents(self, texts: Iterable[str], end_of_text: int) -> np.ndarray:
        """Token ids of all texts, each followed by `end_of_text`: (n,) uint16."""
        end = array("H", [end_of_text]).tobytes()
        return self._joined(chain.from_iterable((*self._pieces(text), end) for text in texts))

    def _joined(self, pieces: Iterable[bytes | bytearray]) -> np.ndarray:
        found = list(pieces)  # looks up all of them, and so knows which are new
        self._ask()
        return np.frombuffer(b"".join(found), dtype=np.uint16)

    def _pieces(self, text: str) -> list[bytes | bytearray]:
        if any(character in text for character in _SEPARATORS):
            return [self._ids(text)]
        found: list[bytes | bytearray] = []
        cuts = text.replace("\n", " \n")  # every space begins a word, and so does every line break
        if _is_plain(cuts):
            first, *words = cuts.split(" ")
            if first:
                found.append(self._as_is[first])
            found += map(self._spaced.__getitem__, words)
            return found
        for i, part in enumerate(_RUN.split(text)):
            if i % 2:
                found.append(self._as_is[part])
            elif part:
                first, *words = part.replace("\n", " \n").split(" ")  # white space stands alone here
                if first:
                    found.append(self._as_is[first])
                found += map(self._spaced.__getitem__, words)
        return found

    def _ask(self) -> None:
        """Fill in the ids of all new words: those that may stand side by side are encoded as one text."""
        words, places = list[str](), list[bytearray]()
        for word, place in zip(*self._new, strict=True):
            if word[0].isspace() and not word[-1].isspace():
                words.append(word)
                places.append(place)
            else:
                place[:] = self._ids(word)
        if words:
            tokens = self._encoding.encode_to_numpy("".join(words), disallowed_special=())
            ends = np.cumsum([len(word) if word.isascii() else len(word.encode()) for word in words])  # in bytes
            stops = np.searchsorted(np.cumsum(self._lengths[tokens]), ends) + 1  # a word ends where a token does
            stored, start = tokens.astype(np.uint16).tobytes(), 0
            for place, stop in zip(places, (2 * stops).tolist(), strict=True):
                place[:] = stored[start:stop]
                start = stop
        self._new.words.clear()
        self._new.places.clear()
        self._spaced.settle()
        self._as_is.settle()

    def _ids(self, text: str) -> bytes:
        return array("H", self._encoding.encode_ordinary(text)).tobytes()


def _is_plain(cuts: str) -> bool:
    """Whether a text with a space before each line break may be cut at every space; False where in doubt."""
    rare = any(map(cuts.__contains__, _RARE)) if cuts.isascii() else _RARE_ANYWHERE.search(cuts) is not None
    return not (rare or any(map(cuts.__contains__, _NO_WORDS)) or cuts.endswith(_NO_LAST_WORDS))


class _New(NamedTuple):
    """Words that are still to be asked for. Two lists: pairs of them would set off the garbage collector."""

    words: list[str]
    places: list[bytearray]
    """Where their ids go."""


class _Words(dict[str, bytes | bytearray]):
    """The ids of words, as the bytes of uint16: of `prefix` + word, but of a word alone that begins with a newline.

    A word that is missing gets an empty place, which is entered in `new`, unless it is a known one with marks behind
    it; those are short and few, and `ask` knows their ids. Up to `limit` words are kept.
    """

    def __init__(self, prefix: str, limit: int, new: _New, ask: Callable[[str], bytes]) -> None:
        super().__init__()
        self._prefix, self._limit, self._new = prefix, limit, new
        self._marks = functools.lru_cache(maxsize=10_000)(ask)
        self._unsettled: list[str] = []

    def __missing__(self, word: str) -> bytes | bytearray:
        keep = len(self) < self._limit and len(word) <= LONGEST
        stem = word.rstrip(_MARKS)
        if len(stem) < len(word) and stem.isalpha() and stem.isascii():
            known = self.get(stem)
            if isinstance(known, bytes):
                joined = known + self._marks(word[len(stem) :])
                if keep:
                    self[word] = joined
                return joined
        ids = bytearray()
        self._new.words.append(word if word.startswith("\n") else self._prefix + word)
        self._new.places.append(ids)
        if keep:
            self[word] = ids
            self._unsettled.append(word)
        return ids

    def settle(self) -> None:
        """Once their ids are filled in: keep them in the smaller and faster type."""
        self.update((word, bytes(self[word])) for word in self._unsettled)
        self._unsettled.clear()


@functools.cache
def byte_lengths(encoding: Any) -> np.ndarray:
    """How many bytes of text each ordinary token of a tiktoken `encoding` stands for, (V,) int64; 0 for specials."""
    lengths = np.zeros(encoding.n_vocab, dtype=np.int64)
    special = {encoding.encode_single_token(token) for token in encoding.special_tokens_set}
    ordinary = sorted(set(range(encoding.n_vocab)) - special)
    lengths[ordinary] = [len(encoding.decode_single_token_bytes(i)) for i in ordinary]
    lengths.setflags(write=False)
    return lengths
