"""The n-gram formula by counting, in exact fractions; and how to make the critic store its counts either way."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction

import pytest

from avatarl import ngram, ngram_tables


def oracle(
    corpus: Sequence[int],
    vocab_size: int,
    context: int,
    discount: Fraction,
    before: Sequence[int],
    place: int | None = None,
    first: int | None = None,
) -> list[Fraction]:
    """Next-token distribution after `before`, straight from the formula; corpus[place] is left out.

    Of a large vocabulary, only the probabilities of the `first` tokens: fractions take their time.
    """
    p = [Fraction(1, vocab_size)] * (first or vocab_size)
    for n in range(min(context, len(before)) + 1):
        wanted = list(before[len(before) - n :])
        ends = [i for i in range(n, len(corpus)) if corpus[i - n : i] == wanted and i != place]
        counts = Counter(corpus[i] for i in ends)
        if ends:
            spread = discount * len(counts)
            p = [(max(counts[w] - discount, Fraction(0)) + spread * p[w]) / len(ends) for w in range(len(p))]
    return p


# What a dense table may hold, what dense bigrams may, and how many probabilities are computed at a time.
STORAGE = {
    "dense": (2**26, 4096, 2**23),
    "dense, chunked": (2**26, 4096, 9),
    "dense bigrams": (0, 4096, 2**23),
    "sparse": (0, 0, 2**23),
    "sparse, chunked": (0, 0, 9),
}


@contextmanager
def stored(storage: str) -> Iterator[None]:
    """Store counts and compute in one of the ways of STORAGE."""
    entries, bigrams, chunk = STORAGE[storage]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram_tables, "DENSE_ENTRIES", entries)
        patch.setattr(ngram_tables, "DENSE_BIGRAMS", bigrams)
        patch.setattr(ngram, "CHUNK_ENTRIES", chunk)
        yield
