"""Counts of every context for the mixed critic: what followed it, how often, and how much of it is discounted.

One table holds the trie of ngram_counts.py. A *row* is a context: UNSEEN (what the text lacks), ROOT (the empty
context), then one row for every entry, which is the context of the next length (ngram_counts.py).

Shapes: N positions, V vocabulary, R rows, E entries.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from avatarl.ngram_counts import count_levels
from avatarl.ngram_index import KeyIndex, look_up

MAX_VOCABULARY = 4096
DENSE_ELEMENTS = 2**20  # masses kept as rows of V as well: those of the short contexts, which have many entries
UNSEEN, ROOT, FIRST = range(3)


class CountTable(NamedTuple):
    """Entries row by row, a row's by token."""

    totals: Tensor  # (R,) float32, C: tokens that followed
    kinds: Tensor  # (R,) float32, U: different ones
    held: Tensor  # (R,) float32, what the discounts take of C
    starts: Tensor  # (R + 1,) int64, first entry of each row
    tokens: Tensor  # (E,) int64
    counts: Tensor  # (E,) float32
    mass: Tensor  # (E,) float32, count − discount
    entries: KeyIndex  # of the keys row · (V + 1) + token
    discounts: Tensor  # (J, 4): for a count of 0, 1, 2, more; by length
    dense: Tensor  # (S, V) mass in the rows before S
    dense_lengths: int  # contexts shorter than this lie in `dense`

    @staticmethod
    def build(corpus: np.ndarray, vocab_size: int, longest: int) -> "CountTable":
        """Count contexts of 0 to `longest` tokens in corpus (L,)."""
        nothing: np.ndarray = np.zeros(1)  # what follows UNSEEN
        totals, kinds, held, starts = ([nothing] for _ in range(4))
        tokens, counts, mass, keys, discounts = [], [], [], [], []
        row_of_context, first, dense_rows, dense_lengths = np.full(1, ROOT), 0, FIRST, 0
        for length, level in enumerate(count_levels(corpus, vocab_size, longest)):
            some = level.counts > 0  # the unigram's level lists all tokens
            d = discounts_of(level.counts)
            taken = d[np.minimum(level.counts, 3)]
            totals.append(level.totals)
            kinds.append(level.kinds)
            held.append(np.bincount(level.parents, taken, len(level.totals)))
            starts.append(first + np.searchsorted(level.parents, np.arange(len(level.totals))))
            tokens.append(level.keys % vocab_size)
            counts.append(level.counts)
            mass.append(np.where(some, level.counts - taken, 0))
            keys.append(row_of_context[level.parents] * (vocab_size + 1) + tokens[-1])
            discounts.append(d)
            if row_of_context[-1] < DENSE_ELEMENTS // vocab_size:
                dense_rows, dense_lengths = int(row_of_context[-1]) + 1, length + 1
            row_of_context = FIRST + first + np.arange(len(level.keys))
            first += len(level.keys)
        missing = FIRST + first - sum(map(len, totals))  # the longest entries are rows without entries
        key, all_tokens, all_mass = np.concatenate(keys), np.concatenate(tokens), np.concatenate(mass)
        dense = np.zeros((dense_rows, vocab_size), np.float32)
        row = key // (vocab_size + 1)
        shallow = row < dense_rows
        dense[row[shallow], all_tokens[shallow]] = all_mass[shallow]
        by_row = [_floats([*part, np.zeros(missing)]) for part in (totals, kinds, held)]
        return CountTable(
            totals=by_row[0],
            kinds=by_row[1],
            held=by_row[2],
            starts=torch.from_numpy(np.concatenate([*starts, np.full(missing + 1, first)]).astype(np.int64)),
            tokens=torch.from_numpy(all_tokens),
            counts=_floats(counts),
            mass=_floats([all_mass]),
            entries=KeyIndex.build(key),
            discounts=_floats([np.stack(discounts)]),
            dense=torch.from_numpy(dense),
            dense_lengths=dense_lengths,
        )

    def to(self, device: torch.device | str) -> "CountTable":
        """The same on `device`."""
        return CountTable(*(x if isinstance(x, int) else x.to(device) for x in self))  # type: ignore[arg-type]

    def step(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """The rows of the contexts `rows` with `tokens` (V: none) after them, or UNSEEN: int64, same shape."""
        place, found = self.entries.find(rows * (self.dense.shape[1] + 1) + tokens)
        return torch.where(found, place + FIRST, UNSEEN).long()

    def count_of(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """How often each of `tokens` (N,) followed the context in its row (N,): float32."""
        place, found = self.entries.find(rows * (self.dense.shape[1] + 1) + tokens)
        return look_up(self.counts, place) * found

    def discount(self, length: int, counts: Tensor) -> Tensor:
        """What is taken of `counts` (N,) after contexts of `length` tokens: (N,)."""
        return self.discounts[length][counts.clamp_max(3).long()]

    def add_mass(self, p: Tensor, rows: Tensor, scale: Tensor, length: int) -> None:
        """p (N, V) += scale (N,) · mass of every token in rows (N,), contexts of `length` tokens, in place."""
        if length < self.dense_lengths:
            p.addcmul_(self.dense.index_select(0, rows), scale[:, None])
            return
        start = look_up(self.starts, rows)
        many = look_up(self.starts, rows + 1) - start
        n = torch.repeat_interleave(many)  # which position each of the entries belongs to
        entry = torch.arange(len(n), device=p.device) + (start - many.cumsum(0) + many)[n]
        place = n * p.shape[1] + look_up(self.tokens, entry)
        p.view(-1).index_add_(0, place, look_up(self.mass, entry) * scale[n])


def discounts_of(counts: np.ndarray) -> np.ndarray:
    """What is taken of a count of 0, 1, 2 and more: (4,), from how many of the entries (E,) occur once to four times.

    Chen and Goodman (1998), equation 17; 0.5, 1, 1.5 of small texts that lack one of these counts.
    """
    n1, n2, n3, n4 = (float((counts == c).sum()) for c in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return np.array([0, 0.5, 1.0, 1.5])
    y = n1 / (n1 + 2 * n2)
    estimates = [c - (c + 1) * y * after / n for c, n, after in ((1, n1, n2), (2, n2, n3), (3, n3, n4))]
    return np.array([0, *np.clip(estimates, 0.1, (0.95, 1.9, 2.85))])


def _floats(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))
