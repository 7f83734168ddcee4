"""What followed every context of the mixed critic, and how often: one table for all kinds of context.

A *row* is a context, given by its key (mixed_contexts.py); row 0 is what the text lacks. Its *entries* are the tokens
that followed it. Shapes: L tokens, J kinds of context, N positions, V vocabulary, R rows, E entries.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from avatarl.ngram_index import KeyIndex, look_up

UNSEEN = 0


class ContextCounts(NamedTuple):
    """Entries row by row."""

    rows: KeyIndex  # row − 1 of every key
    starts: Tensor  # (R + 1,) int64, first entry of each row
    tokens: Tensor  # (E,) int32
    counts: Tensor  # (E,) float32

    @staticmethod
    def build(keys: np.ndarray, following: np.ndarray, vocab_size: int) -> tuple["ContextCounts", np.ndarray]:
        """Count what follows contexts: keys (J, L) int64, no two kinds sharing one, and tokens (L,).

        Returns the table, and the entry that each place counts in: (J, L) int32, −1 where the key is negative.
        """
        row_keys, starts, tokens, counts = [], [np.zeros(1, np.int64)], [], []
        entry_of: np.ndarray = np.full(keys.shape, -1, np.int32)
        first = 0
        for j, kind in enumerate(keys):
            known = kind >= 0
            contexts, row = np.unique(kind[known], return_inverse=True)
            pair = row * vocab_size + following[known]
            entries, entry, often = np.unique(pair, return_inverse=True, return_counts=True)
            row_keys.append(contexts)
            starts.append(first + np.searchsorted(entries, np.arange(len(contexts)) * vocab_size))
            tokens.append(entries % vocab_size)
            counts.append(often)
            entry_of[j, known] = first + entry
            first += len(entries)
        starts.append(np.full(1, first))
        table = ContextCounts(
            rows=KeyIndex.build(np.concatenate(row_keys)),
            starts=torch.from_numpy(np.concatenate(starts)),
            tokens=torch.from_numpy(np.concatenate(tokens).astype(np.int32)),
            counts=torch.from_numpy(np.concatenate(counts).astype(np.float32)),
        )
        return table, entry_of

    def to(self, device: torch.device | str) -> "ContextCounts":
        """The same on `device`."""
        return ContextCounts(*(part.to(device) for part in self))  # type: ignore[arg-type]

    def find(self, keys: Tensor) -> Tensor:
        """The row of every key, of any shape: int64."""
        place, found = self.rows.find(keys)
        return torch.where(found, place + 1, UNSEEN).long()

    def after(self, rows: Tensor, vocab_size: int) -> Tensor:
        """How often every token followed the contexts in rows (N, J): (N, J, V) float32."""
        flat = rows.flatten()
        start = look_up(self.starts, flat)
        many = look_up(self.starts, flat + 1) - start
        n = torch.repeat_interleave(many)  # which context each of the entries belongs to
        entry = torch.arange(len(n), device=flat.device) + (start - many.cumsum(0) + many)[n]
        counts = torch.zeros(len(flat) * vocab_size, device=flat.device)
        counts[n * vocab_size + look_up(self.tokens, entry)] = look_up(self.counts, entry)  # all places differ
        return counts.view(*rows.shape, vocab_size)
