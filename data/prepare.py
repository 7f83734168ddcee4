"""From the settings of `data` to token streams: load, split, tokenize, and cache what was slow to make.

    python -m data.prepare openwebtext              tokenise a large corpus once, ahead of all runs
    python -m data.prepare --help                   the same for documents on this machine

A corpus that was tokenised ahead is memory-mapped as it is. For all others the cache is data/cache/<hash>/
(or below $AVATARL_CACHE), addressed by content: it may be deleted at any time, a broken file in it is made again,
and where it can't be written everything stays in memory. Source: DESIGN section 5.
"""

import contextlib
import hashlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from config import ConfigError, DataConfig
from data import corpora
from data.corpora import Corpus, load_corpus, tokens_folder, warn
from data.shards import TokenCorpus, open_corpus
from data.tokenizers import Gpt2Tokenizer, Tokenizer, build_tokenizer, load_tokenizer, pieces
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

    @property
    def strings(self) -> list[str]:
        """What every token stands for: (V,); empty for vocabularies that nobody asks about, such as GPT-2's."""
        tokenizer = self.tokenizer
        known = tokenizer.kind in ("char", "bpe")
        return [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)] if known else []

    @property
    def characters(self) -> list[str] | None:
        """What every token stands for, where all are single characters: (V,); else None."""
        return self.strings if self.tokenizer.kind == "char" else None


def prepare(config: DataConfig, tokenizer: Tokenizer | None = None) -> Dataset:
    """Corpus, split and tokens as `config` says, with `tokenizer` where one is given (resume, evaluation).

    Raises ConfigError for a corpus that can't be had or read, and for text that the vocabulary can't express.
    """
    folder = tokens_folder(config.corpus)
    if folder is not None:
        return _prepared(folder, config, tokenizer)
    corpus = load_corpus(config.corpus)
    train_text, val_text = (corpus.text, "") if config.val_corpus is not None else split(corpus, config.val_fraction)
    if tokenizer is None:
        # The characters of the held-out text count as known; merges are learned from the training text alone.
        learn_from = train_text if config.tokenizer == "bpe" else corpus.text
        tokenizer = _tokenizer(config.tokenizer, learn_from, config.bpe_vocab)
    train = _tokens(tokenizer, train_text, f"corpus {corpus.name!r}")
    if config.val_corpus is not None:
        val, val_bytes = _validation(config.val_corpus, tokenizer)
    else:
        val, val_bytes = _tokens(tokenizer, val_text, f"validation text of {corpus.name!r}"), len(val_text.encode())
    return Dataset(
        train=train[int(config.train_start * len(train)) : int(config.train_stop * len(train))],
        val=val,
        tokenizer=tokenizer,
        corpus_name=corpus.name,
        corpus_sha256=corpus.sha256,
        corpus_source=corpus.source,
        fallback=corpus.fallback,
        val_bytes=val_bytes,
    )


def prepare_real(config: DataConfig, who: str) -> Dataset:
    """As `prepare`, but raises ConfigError for the text embedded in Python, on which `who` would measure little."""
    dataset = prepare(config)
    if dataset.fallback or dataset.corpus_source == "embedded":
        fix = f"{who} refuse the text embedded in Python, which differs by version; name another"
        raise ConfigError(f"corpus {config.corpus!r}: {fix}")
    return dataset


def _prepared(folder: Path, config: DataConfig, tokenizer: Tokenizer | None) -> Dataset:
    """The dataset of a corpus that was tokenised ahead, its tokens memory-mapped."""
    if tokenizer is None and config.tokenizer == "gpt2":
        tokenizer = build_tokenizer("gpt2", "", config.bpe_vocab)
    corpus, name = _opened(folder, tokenizer), str(config.corpus)
    assert isinstance(tokenizer, Gpt2Tokenizer)
    if config.val_corpus is not None:
        train = corpus.tokens
        val, val_bytes = _validation(config.val_corpus, tokenizer)
    else:
        cut = split_tokens(corpus, config.val_fraction)
        train, val = corpus.tokens[:cut], corpus.tokens[cut:]
        val_bytes = text_bytes(val, tokenizer)
    return Dataset(
        train=train[int(config.train_start * len(train)) : int(config.train_stop * len(train))],
        val=val,
        tokenizer=tokenizer,
        corpus_name=name,
        corpus_sha256=corpus.sha256,
        corpus_source=str(corpus.folder),
        fallback=False,
        val_bytes=val_bytes,
    )


def _opened(folder: Path, tokenizer: Tokenizer | None) -> TokenCorpus:
    """The corpus in `folder`. Raises ConfigError unless its tokens are those of `tokenizer`."""
    corpus = open_corpus(folder)
    if not isinstance(tokenizer, Gpt2Tokenizer) or tokenizer.fingerprint != corpus.tokenizer:
        raise ConfigError(
            f"data.tokenizer: {folder} holds tokens of GPT-2, not text; use --data.tokenizer gpt2, or a corpus of text"
        )
    return corpus


def _validation(name: str, tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """All tokens of a validation corpus, text or tokens, and their bytes of text."""
    folder = tokens_folder(name)
    if folder is None:
        text = load_corpus(name).text
        return _tokens(tokenizer, text, f"validation text of {name!r}"), len(text.encode())
    corpus = _opened(folder, tokenizer)
    return corpus.tokens, corpus.manifest.text_bytes


def split_tokens(corpus: TokenCorpus, val_fraction: float, step: int = 1 << 20) -> int:
    """Where validation begins: with the first document that starts in the last `val_fraction` of the tokens.

    Inside a document only where none starts there. `step` tokens are looked at at a time.
    """
    tokens = corpus.tokens
    cut = math.floor(round(len(tokens) * (1 - val_fraction), 6))
    for start in range(max(cut - 1, 0), len(tokens) - 1, step):
        ends = np.flatnonzero(tokens[start : min(start + step, len(tokens) - 1)] == corpus.end_of_text)
        if ends.size:
            return start + int(ends[0]) + 1
    return cut


def text_bytes(tokens: np.ndarray, tokenizer: Gpt2Tokenizer, step: int = 1 << 24) -> int:
    """UTF-8 bytes of the text that tokens (L,) stand for, `step` of them at a time."""
    lengths = tokenizer.byte_lengths()
    return sum(int(lengths[tokens[start : start + step]].sum()) for start in range(0, len(tokens), step))


def split(corpus: Corpus, val_fraction: float) -> tuple[str, str]:
    """Training and validation text: `corpus` cut before its last `val_fraction`."""
    # Rounded first, so that a tenth of ten characters is one in spite of binary fractions.
    cut = math.floor(round(len(corpus.text) * (1 - val_fraction), 6))
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
    return corpora.cache_folder() / _sha256("\n".join(key))[:32]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def main(words: Sequence[str]) -> int:
    """Tokenise a corpus ahead of all runs; returns the exit code."""
    from data import openwebtext  # its command line is of no use to a run

    return openwebtext.main(words)


if __name__ == "__main__":
    from cli import run_main

    run_main(main)
