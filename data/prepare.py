"""From the settings of `data` to token streams: load, split, tokenize, and cache what was slow to make.

The cache is data/cache/<hash>/, addressed by content: it may be deleted at any time, a broken file in it is
made again, and where it can't be written everything stays in memory. Source: DESIGN section 5.
"""

import contextlib
import hashlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from config import ConfigError, DataConfig
from data import corpora
from data.corpora import Corpus, load_corpus, warn
from data.tokenizers import Tokenizer, build_tokenizer, load_tokenizer, pieces
from files import write_atomic

CACHED_FROM = {"char": 8_000_000, "bpe": 200_000, "gpt2": 200_000}
"""Characters of text from which a tokenizer's work is kept; for less, it is done again in under a second."""

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class Dataset:
    """The two splits as token ids, and what they were made of."""

    train: np.ndarray
    """(L,) token ids, uint16 or uint32; may be memory-mapped."""
    val: np.ndarray
    """(L',) token ids."""
    tokenizer: Tokenizer
    corpus_name: str
    corpus_sha256: str
    corpus_source: str
    fallback: bool
    """pydoc was taken because no corpus was named and tinyshakespeare could not be had."""
    val_bytes: int
    """UTF-8 bytes of the validation text, for bits per byte."""


def prepare(config: DataConfig, tokenizer: Tokenizer | None = None) -> Dataset:
    """Corpus, split and tokens as `config` says, with `tokenizer` where one is given (resume, evaluation).

    Raises ConfigError for a corpus that can't be had or read, and for text that the vocabulary can't express.
    """
    corpus = load_corpus(config.corpus)
    train_text, val_text = split(corpus, config)
    if tokenizer is None:
        # The characters of the held-out text count as known; merges are learned from the training text alone.
        learn_from = train_text if config.tokenizer == "bpe" else corpus.text
        tokenizer = _tokenizer(config.tokenizer, learn_from, config.bpe_vocab)
    train = _tokens(tokenizer, train_text, f"corpus {corpus.name!r}")
    val = _tokens(tokenizer, val_text, f"validation text of {config.val_corpus or corpus.name!r}")
    return Dataset(
        train=train[int(config.train_start * len(train)) : int(config.train_stop * len(train))],
        val=val,
        tokenizer=tokenizer,
        corpus_name=corpus.name,
        corpus_sha256=corpus.sha256,
        corpus_source=corpus.source,
        fallback=corpus.fallback,
        val_bytes=len(val_text.encode()),
    )


def split(corpus: Corpus, config: DataConfig) -> tuple[str, str]:
    """Training and validation text: `corpus` cut before its last `val_fraction`, or it and `val_corpus`."""
    if config.val_corpus is not None:
        return corpus.text, load_corpus(config.val_corpus).text
    # Rounded first, so that a tenth of ten characters is one in spite of binary fractions.
    cut = math.floor(round(len(corpus.text) * (1 - config.val_fraction), 6))
    return corpus.text[:cut], corpus.text[cut:]


def check_length(dataset: Dataset, block_size: int) -> None:
    """Raise ConfigError unless both splits hold one window of `block_size` + 1 tokens."""
    for name, tokens in (("training", dataset.train), ("validation", dataset.val)):
        if len(tokens) <= block_size:
            fits = f"--model.block-size {len(tokens) - 1} or less, or " if len(tokens) > 1 else ""
            raise ConfigError(
                f"model.block-size = {block_size}: the {name} split of {dataset.corpus_name!r} has "
                f"{len(tokens)} tokens, and one window needs {block_size + 1}; use {fits}more text"
            )


def _tokenizer(kind: str, text: str, bpe_vocab: int) -> Tokenizer:
    def make() -> Tokenizer:
        return build_tokenizer(kind, text, bpe_vocab)

    if kind != "bpe" or len(text) < CACHED_FROM[kind]:
        return make()
    path = _cache_folder("bpe", str(bpe_vocab), _sha256(text)) / "tokenizer.json"
    return _kept(path, load_tokenizer, make, lambda made: made.save(path))


def _tokens(tokenizer: Tokenizer, text: str, what: str) -> np.ndarray:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)

    def make() -> np.ndarray:
        try:
            return _encoded(tokenizer, text, dtype)
        except ConfigError as error:
            raise ConfigError(f"{what}: {error}") from None

    def read(path: Path) -> np.ndarray:
        tokens = np.lib.format.open_memmap(path, mode="r")
        if tokens.dtype != dtype or tokens.ndim != 1:
            raise ValueError(f"{path} holds {tokens.dtype} of shape {tokens.shape}")
        return tokens

    def write(tokens: np.ndarray) -> None:
        content = io.BytesIO()
        np.save(content, tokens)
        write_atomic(path, content.getvalue())

    if len(text) < CACHED_FROM[tokenizer.kind]:
        return make()
    path = _cache_folder("tokens", tokenizer.fingerprint, _sha256(text)) / "tokens.npy"
    return _kept(path, read, make, write)


def _encoded(tokenizer: Tokenizer, text: str, dtype: np.dtype) -> np.ndarray:
    """Token ids of `text`, piece by piece, so that memory stays near the size of the result."""
    parts = [np.empty(0, dtype)]
    quiet = True if len(text) < CACHED_FROM["char"] else None  # None: quiet unless stderr is a terminal
    with tqdm(total=len(text), unit_scale=True, desc="characters", disable=quiet, leave=False) as bar:
        for piece in pieces(text, 1 << 22):
            try:
                parts.append(tokenizer.encode(piece).astype(dtype))
            except ConfigError:
                tokenizer.encode(text)  # raises it with the position counted from the start of the text
                raise
            bar.update(len(piece))
    return np.concatenate(parts)


def _kept(path: Path, read: Callable[[Path], Made], make: Callable[[], Made], write: Callable[[Made], None]) -> Made:
    """What is stored at `path`, or else made and stored there; memory alone where that can't be written."""
    with contextlib.suppress(OSError, ValueError):
        return read(path)
    made = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(made)
        return read(path)
    except OSError as error:
        warn(f"{path.parent} can't be written ({error.strerror}), so nothing is cached there")
        return made


def _cache_folder(*key: str) -> Path:
    return corpora.DATA_FOLDER / "cache" / _sha256("\n".join(key))[:32]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
