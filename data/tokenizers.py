"""Tokenizers: characters, byte-level BPE trained here, and GPT-2's; each saves itself beside a run.

`decode(encode(text)) == text` for all of them. Only `char` has unknown characters, and refuses them by name.
Text that spells out <|endoftext|> is ordinary text: the special token never comes from `encode`.
Source: DESIGN section 5.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from config import ConfigError
from data.gpt2_quick import QuickEncoder, quick_encoder
from files import write_atomic

END_OF_TEXT = "<|endoftext|>"
QUICK_FROM = 1_000_000  # characters of text for which it pays to load gigatoken

# No rule of GPT-2's splitting looks across this boundary, so text cut here gives the same tokens as uncut.
_CUT = re.compile(r"[!-~](?=\n)")


class Tokenizer(Protocol):
    """Text to token ids and back."""

    kind: str
    vocab_size: int
    end_of_text: int | None
    """Id of <|endoftext|>, where the vocabulary has it."""

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, (n,) int64. Raises ConfigError for what the vocabulary can't express."""
        ...

    def decode(self, ids: ArrayLike) -> str:
        """Text of token ids, any integer sequence (n,); bytes that are no UTF-8 become U+FFFD."""
        ...

    def state(self) -> dict[str, Any]:
        """What `load_tokenizer` needs besides the kind, in plain JSON types."""
        ...

    def save(self, path: Path) -> None:
        """Write tokenizer.json to `path`, a file or an existing folder, whole or not at all."""
        write_atomic(_file_of(path), self._content())

    @property
    def fingerprint(self) -> str:
        """sha256 of what `save` writes."""
        return hashlib.sha256(self._content().encode()).hexdigest()

    def _content(self) -> str:
        return json.dumps({"kind": self.kind, **self.state()}) + "\n"


class CharTokenizer(Tokenizer):
    """One token per character of a fixed set. Raises ValueError when it is empty or repeats itself."""

    kind = "char"
    end_of_text: int | None = None

    def __init__(self, characters: str) -> None:
        if not characters or len(set(characters)) != len(characters):
            raise ValueError("the characters of a vocabulary must be at least one and distinct")
        self.characters = characters
        self.vocab_size = len(characters)
        self._codes = _code_points(characters)
        # Id of every code point up to one past the largest; -1 where there is none.
        self._ids = np.full(int(self._codes.max()) + 2, -1, dtype=np.int64)
        self._ids[self._codes] = np.arange(self.vocab_size)

    def encode(self, text: str) -> np.ndarray:
        ids = self._ids[np.minimum(_code_points(text), len(self._ids) - 1)]
        unseen = np.flatnonzero(ids < 0)
        if unseen.size:
            at = int(unseen[0])
            raise ConfigError(
                f"character {text[at]!r} at position {at} is not among the {self.vocab_size} characters of "
                "the training corpus; remove it, or train with --data.tokenizer bpe, which knows them all"
            )
        return ids

    def decode(self, ids: ArrayLike) -> str:
        return self._codes[_checked(ids, self.vocab_size)].tobytes().decode("utf-32-le", "surrogatepass")

    def state(self) -> dict[str, Any]:
        return {"characters": self.characters}


class BpeTokenizer(Tokenizer):
    """Byte-level BPE, pre-split as GPT-2's; <|endoftext|> is token 0.

    `tokens` are in id order and `merges` in order of rank, both in GPT-2's printable spelling of bytes;
    `backend` is the Hugging Face tokenizer made of them. Raises ValueError when they don't fit together.
    """

    kind = "bpe"
    end_of_text: int | None = 0

    def __init__(self, tokens: list[str], merges: list[tuple[str, str]]) -> None:
        hugging_face = _hugging_face()
        self.tokens, self.merges = tokens, merges
        self.vocab_size = len(tokens)
        vocabulary = {token: i for i, token in enumerate(tokens)}
        if tokens[:1] != [END_OF_TEXT] or len(vocabulary) != len(tokens):
            raise ValueError(f"the tokens must be distinct and begin with {END_OF_TEXT}")
        if missing := set(hugging_face.pre_tokenizers.ByteLevel.alphabet()) - set(tokens):
            raise ValueError(f"{len(missing)} of the 256 bytes have no token")
        if any(part not in vocabulary for a, b in merges for part in (a, b, a + b)):
            raise ValueError("a merge names a token that is not there")
        self.backend = hugging_face.Tokenizer(hugging_face.models.BPE(vocabulary, merges))
        self.backend.pre_tokenizer = hugging_face.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.backend.decoder = hugging_face.decoders.ByteLevel()

    def encode(self, text: str) -> np.ndarray:
        _utf8(text)  # refuses what is no character
        parts = self.backend.encode_batch_fast(list(pieces(text, 1 << 16)))  # in parallel
        return np.array([i for part in parts for i in part.ids], dtype=np.int64)

    def decode(self, ids: ArrayLike) -> str:
        return self.backend.decode(_checked(ids, self.vocab_size).tolist(), skip_special_tokens=False)

    def state(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "merges": [list(pair) for pair in self.merges]}


class Gpt2Tokenizer(Tokenizer):
    """OpenAI's GPT-2 BPE: tiktoken's, and for much text the same by gigatoken, where that is installed.

    Raises ConfigError when its vocabulary can't be had.
    """

    kind = "gpt2"
    vocab_size = 50257
    end_of_text: int | None = 50256

    def __init__(self) -> None:
        try:
            import tiktoken
        except ImportError:
            raise ConfigError("data.tokenizer = 'gpt2' needs tiktoken; pip install tiktoken") from None
        try:
            self._encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # no network, or a file with the wrong hash
            raise ConfigError(
                f"data.tokenizer = 'gpt2': its vocabulary could not be downloaded ({type(error).__name__}); "
                "connect to the network once, or set TIKTOKEN_CACHE_DIR to a folder where tiktoken has "
                "stored it, or use --data.tokenizer bpe"
            ) from None

    def encode(self, text: str) -> np.ndarray:
        return self._ids(text, self._quick(len(text))).astype(np.int64)

    def encode_documents(self, texts: Iterable[str]) -> np.ndarray:
        """Token ids of all texts, each followed by <|endoftext|>, (n,) uint16."""
        texts, end = list(texts), np.array([self.vocab_size - 1], np.uint16)
        quick, parts = self._quick(sum(map(len, texts))), [np.empty(0, np.uint16)]
        for text in texts:
            parts += (self._ids(text, quick), end)
        return np.concatenate(parts)

    def library(self, characters: int) -> str:
        """Which library encodes that much text; it is loaded then."""
        return "tiktoken" if self._quick(characters) is None else "gigatoken"

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of text that each token stands for, (V,) int64; 0 for <|endoftext|>."""
        return _byte_lengths(self._encoding)

    def _quick(self, characters: int) -> QuickEncoder | None:
        return quick_encoder(self._encoding) if characters >= QUICK_FROM else None

    def _ids(self, text: str, quick: QuickEncoder | None) -> np.ndarray:
        data = _utf8(text)
        if quick is not None:
            return quick.encode(data)
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def decode(self, ids: ArrayLike) -> str:
        return self._encoding.decode(_checked(ids, self.vocab_size).tolist())

    def state(self) -> dict[str, Any]:
        return {}


def train_char(text: str) -> CharTokenizer:
    """The characters of `text`, the whole corpus, in code-point order."""
    return CharTokenizer("".join(sorted(set(text))))


def train_bpe(text: str, vocab_size: int) -> BpeTokenizer:
    """Byte-level BPE of at most `vocab_size` tokens (fewer if the text runs out of pairs to merge)."""
    hugging_face = _hugging_face()
    backend = hugging_face.Tokenizer(hugging_face.models.BPE())
    backend.pre_tokenizer = hugging_face.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = hugging_face.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=hugging_face.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(pieces(text, 1 << 16), trainer)
    vocabulary = backend.get_vocab()
    merges = json.loads(backend.to_str())["model"]["merges"]
    return BpeTokenizer(sorted(vocabulary, key=vocabulary.__getitem__), [(a, b) for a, b in merges])


def build_tokenizer(kind: str, text: str, bpe_vocab: int) -> Tokenizer:
    """A new tokenizer: char and bpe learn from `text`, gpt2 is what it is."""
    if kind == "char":
        return train_char(text)
    if kind == "bpe":
        return train_bpe(text, bpe_vocab)
    if kind == "gpt2":
        return Gpt2Tokenizer()
    raise ConfigError(f"data.tokenizer = {kind!r}: use char, bpe or gpt2")


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer saved at `path`, a tokenizer.json or the folder that holds it.

    Raises ConfigError when the file is missing or broken.
    """
    file = _file_of(path)
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        kind = state["kind"]
        if kind == "char":
            return CharTokenizer(state["characters"])
        if kind == "bpe":
            return BpeTokenizer(state["tokens"], [(a, b) for a, b in state["merges"]])
        if kind != "gpt2":
            raise ValueError(f"unknown kind {kind!r}")
    except ConfigError:  # a missing library, not a broken file
        raise
    except OSError as error:
        raise ConfigError(f"tokenizer {file} can't be read: {error.strerror}; name a run's folder") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"tokenizer {file} is broken ({type(error).__name__}: {error}); restore it from a copy of the run"
        ) from None
    return Gpt2Tokenizer()


def pieces(text: str, size: int) -> Iterator[str]:
    """`text` in pieces of about `size` characters, cut only where every tokenizer here splits anyway."""
    start = 0
    while start < len(text):
        cut = _CUT.search(text, start + size - 1)
        stop = cut.end() if cut else len(text)
        yield text[start:stop]
        start = stop


def _file_of(path: Path) -> Path:
    return path / "tokenizer.json" if path.is_dir() else path


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{text[error.start]!r} at position {error.start} is a lone surrogate, no character; remove it"
        ) from None


@functools.cache
def _byte_lengths(encoding: Any) -> np.ndarray:
    ordinary = [len(encoding.decode_single_token_bytes(i)) for i in range(encoding.eot_token)]
    lengths = np.array([*ordinary, 0], dtype=np.int64)
    lengths.setflags(write=False)
    return lengths


def _checked(ids: ArrayLike, vocab_size: int) -> np.ndarray:
    places = np.asarray(ids, dtype=np.int64)
    if wrong := places[(places < 0) | (places >= vocab_size)].tolist():
        raise IndexError(f"token id {wrong[0]} is outside the vocabulary of {vocab_size}")
    return places


def _hugging_face() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ConfigError("data.tokenizer = 'bpe' needs tokenizers; pip install tokenizers") from None
    return tokenizers
