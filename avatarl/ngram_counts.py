"""Counting n-grams: what follows every context of 0, 1, 2, … tokens of a text (numpy).

All contexts form one trie. An *entry* is a context with one token after it, hence also a longer context: the
entries of one length, sorted by (context, token), are the contexts of the next, in order. Its *suffix* is the
entry one length shorter, without the first token, on which its interpolated probability falls back.

Shapes: L tokens of the corpus; at each length M contexts and E entries.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from config import require

Stream = np.ndarray | Tensor  # token ids (L,) of any integer type


@dataclass(frozen=True)
class Level:
    """What follows the M different contexts of one length n (int64). For n = 0 the entries are all V tokens."""

    keys: np.ndarray  # (E,) context · V + token of each entry, rising
    counts: np.ndarray  # (E,) how often that token follows that context: at least 1, but for n = 0
    windows: np.ndarray  # (L − n,) the entry that the n + 1 tokens from each place of the corpus on make
    parents: np.ndarray  # (E,) context of each entry
    suffixes: np.ndarray  # (E,) the entry one level below that lacks the first token; 0 for n = 0
    totals: np.ndarray  # (M,) C: 0 for what the corpus lacks, or has at its very end alone
    kinds: np.ndarray  # (M,) U


def count_levels(corpus: np.ndarray, vocab_size: int, longest: int) -> Iterator[Level]:
    """Count what follows every context of 0, 1, … `longest` tokens of corpus (L,), one length at a time.

    Contexts are numbered by the level before, so that a key stays below L · V however long they are.
    """
    contexts, shorter = 1, np.zeros(len(corpus) + 1, np.int64)
    keys, counts, windows = np.arange(vocab_size), np.bincount(corpus, minlength=vocab_size), corpus
    for n in range(longest + 1):
        if n > 0:
            keys, counts, windows = _rank(shorter[:-1] * vocab_size + corpus[n:], contexts * vocab_size)
        parents, suffixes = keys // vocab_size, np.zeros(len(keys), np.int64)
        suffixes[windows] = shorter[1:]
        totals = np.bincount(parents, counts, contexts).astype(np.int64)
        kinds = np.bincount(parents, counts > 0, contexts).astype(np.int64)
        yield Level(keys, counts, windows, parents, suffixes, totals, kinds)
        contexts, shorter = len(keys), windows


def _rank(keys: np.ndarray, span: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(different keys, their counts, index of each key among them) for keys in [0, span)."""
    if span > 4 * len(keys):  # below, counting beats sorting
        unique, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        return unique, counts, inverse
    counts = np.bincount(keys, minlength=span)
    unique = np.flatnonzero(counts)
    rank = np.empty(span, np.int64)
    rank[unique] = np.arange(len(unique))
    return unique, counts[unique], rank[keys]


def interpolate(level: Level, shorter: np.ndarray, discount: float) -> tuple[np.ndarray, np.ndarray]:
    """(p_n of each entry's token after its context (E,), share passed on to the shorter context (M,)).

    `shorter` holds p_{n−1} of the entries one level below; 1/V alone for n = 0.
    """
    totals = np.maximum(level.totals, 1)
    passed_on = np.where(level.totals > 0, discount * level.kinds / totals, 1)
    mass = np.maximum(level.counts - discount, 0)
    p = mass / totals[level.parents] + passed_on[level.parents] * shorter[level.suffixes]
    return p, passed_on


def checked_stream(stream: Stream, vocab_size: int, discount: float, least: int) -> np.ndarray:
    """The stream as (L,) int64; ConfigError for fewer than `least` tokens, ids outside V, a bad discount."""
    require(0 < discount < 1, "critic.ngram-discount", discount, "use a discount in (0, 1)")
    ids = np.asarray(stream.cpu() if isinstance(stream, Tensor) else stream).astype(np.int64)
    fix = f"too few tokens; use at least {least}, or a shorter context"
    require(len(ids) >= least, "length of the n-gram text", len(ids), fix)
    low, high = ids.min(), ids.max()
    fix = f"outside the vocabulary of {vocab_size}; use the tokenizer that encoded the text"
    require(low >= 0 and high < vocab_size, "ids of the n-gram text", f"{low} to {high}", fix)
    return ids


def checked_text(stream: Stream, vocab_size: int, discount: float, least: int) -> np.ndarray:
    """As `checked_stream`, and ConfigError for a text of one distinct token, which has nothing to teach."""
    ids = checked_stream(stream, vocab_size, discount, least=max(least, 2))
    fix = "every token is the same, so there is nothing to learn; use another corpus"
    require(bool((ids != ids[0]).any()), "different tokens in the training text", 1, fix)
    return ids
