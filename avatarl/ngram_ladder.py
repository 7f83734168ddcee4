"""The n-gram ladder: how well n-grams of a text predict another text, or the same one leave-one-out.

    for rung in ngram_ladder(train_ids, val_ids, vocab_size):      # contexts of 1 to 6 tokens
        print(rung["context"], rung["ce"], rung["accuracy"])

The reference that stands beside a student's curve (DESIGN section 8): "passed bigram level" is then a fact.
The same interpolated probabilities as the n-gram critic's, in float64, by their own short way: an entry is
scored from its suffix, one level after the other, so that time and memory grow with the different windows of
the text, not with V.
"""

from dataclasses import dataclass

import numpy as np

from avatarl.ngram_counts import Level, Stream, checked_stream, count_levels, interpolate

NOT_SCORED = 10
"""Tokens at the beginning of a text that are context alone, as the longest contexts begin there."""


def ngram_ladder(
    train: Stream, val: Stream, vocab_size: int, longest: int = 6, discount: float = 0.75, skip: int = NOT_SCORED
) -> list[dict[str, float]]:
    """How n-grams of `train` predict `val`: {"context", "ce" (nats), "accuracy"} for contexts of 1 … longest.

    Contexts run over the whole of `val`; its first `skip` tokens are not scored. The likeliest token after a
    context is among its entries or is its suffix's. Raises ConfigError for unusable streams.
    """
    train = checked_stream(train, vocab_size, discount, least=longest + 1)
    val = checked_stream(val, vocab_size, discount, least=skip + 1)
    p, guess = np.full(len(val), 1 / vocab_size), np.zeros(len(val), np.int64)
    context = np.zeros(len(val), np.int64)  # number of what stands before each token; −1: unseen
    scored = _Scored.uniform(vocab_size)
    ladder: list[dict[str, float]] = []
    for n, level in enumerate(count_levels(train, vocab_size, longest)):
        scored = scored.longer(level, vocab_size, discount)
        key = context * vocab_size + val
        entry = np.searchsorted(level.keys, key).clip(max=len(level.keys) - 1)
        found, seen = level.keys[entry] == key, context >= 0
        p = np.where(found, scored.p[entry], np.where(seen, scored.passed_on[context], 1) * p)
        guess = np.where(seen, scored.best[context], guess)
        context = np.concatenate([[-1], np.where(found, entry, -1)[:-1]])
        if n > 0:
            ce, accuracy = -np.log(p[skip:]).mean(), (guess == val)[skip:].mean()
            ladder.append({"context": n, "ce": float(ce), "accuracy": float(accuracy)})
    return ladder


def leave_one_out_ladder(
    train: Stream, vocab_size: int, longest: int = 6, discount: float = 0.75, skip: int = NOT_SCORED
) -> list[dict[str, float]]:
    """The ladder on `train` itself, each token judged by counts without it: {"context", "ce"} each."""
    train = checked_stream(train, vocab_size, discount, least=max(longest, skip) + 1)
    p = np.full(len(train), 1 / vocab_size)
    ladder: list[dict[str, float]] = []
    for n, level in enumerate(count_levels(train, vocab_size, longest)):
        parent = level.parents[level.windows]  # (L − n,)
        count, total = level.counts[level.windows] - 1, level.totals[parent] - 1
        kinds = level.kinds[parent] - (count == 0)
        longer = (np.maximum(count - discount, 0) + discount * kinds * p[n:]) / np.maximum(total, 1)
        p[n:] = np.where(total > 0, longer, p[n:])
        if n > 0:
            ladder.append({"context": n, "ce": float(-np.log(p[skip:]).mean())})
    return ladder


@dataclass(frozen=True)
class _Scored:
    """A level with its interpolated probabilities (numpy)."""

    p: np.ndarray  # (E,) of each entry's token after its context
    passed_on: np.ndarray  # (M,) d · U / C, the share of the shorter context; 1 where C = 0
    best: np.ndarray  # (M,) likeliest token after each context, ties to the lowest id
    best_p: np.ndarray  # (M,) its probability
    suffixes: np.ndarray  # (E,) the level's own

    @staticmethod
    def uniform(vocab_size: int) -> "_Scored":
        """Below the unigram: one context, one entry, 1/V."""
        zero, share = np.zeros(1, np.int64), np.full(1, 1 / vocab_size)
        return _Scored(share, np.ones(1), zero, share, zero)

    def longer(self, level: Level, vocab_size: int, discount: float) -> "_Scored":
        """The next level, whose contexts are this one's entries."""
        p, passed_on = interpolate(level, self.p, discount)
        best, best_p = self.best[self.suffixes], passed_on * self.best_p[self.suffixes]
        starts = np.flatnonzero(np.diff(level.parents, prepend=-1))
        parent, top = level.parents[starts], np.maximum.reduceat(p, starts)
        top_entry = np.flatnonzero(p == np.repeat(top, np.diff(starts, append=len(p))))
        lowest = top_entry[np.diff(level.parents[top_entry], prepend=-1) > 0]  # of equals, the first entry
        token = level.keys[lowest] % vocab_size
        wins = (top > best_p[parent]) | ((top == best_p[parent]) & (token < best[parent]))
        best[parent[wins]], best_p[parent[wins]] = token[wins], top[wins]
        return _Scored(p, passed_on, best, best_p, level.suffixes)
