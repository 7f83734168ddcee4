"""What followed every context of the mixed critic, and how often: one table for all kinds of context.

A *row* is a context, given by its key (mixed_contexts.py); row 0 is what the text lacks. Its *entries* are the tokens
that followed it. Keys are hashes, so sorted keys lie evenly: the highest bits of a key say where to look for it, and
few others are there. Shapes: L tokens, J kinds of context, N positions, V vocabulary, R rows, E entries.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from avatarl.mixed_contexts import KEY_BITS
from avatarl.ngram_index import look_up

UNSEEN = 0
TOKEN_BITS = 63 - KEY_BITS


class ContextCounts(NamedTuple):
    """Rows by key, entries row by row, and what these sum to."""

    keys: Tensor  # (R,) int64, rising, of rows 1, 2, …; padded at the end
    places: Tensor  # (2^b + 1,) int32: how many keys have lower highest bits
    crowd: int  # keys with the same highest bits, at most
    starts: Tensor  # (R + 2,) int64, first entry of each row
    tokens: Tensor  # (E,) int32
    counts: Tensor  # (E,) float32
    totals: Tensor  # (R + 1,) float32, of all counts of a row
    kinds: Tensor  # (R + 1,) float32, how many of them are above 0

    @staticmethod
    def build(keys: Tensor, following: Tensor) -> tuple["ContextCounts", Tensor]:
        """Count what follows contexts: keys (L, J) int64, no two kinds sharing one, and tokens (L,).

        Tokens are below 2^TOKEN_BITS. Returns the table, and the entry that each place counts in: (L, J) int32, −1
        where the key is negative.
        """
        pairs, order = (keys << TOKEN_BITS | following[:, None]).flatten().sort()
        unknown = int(torch.searchsorted(pairs, 0))  # negative keys come first
        pairs, order = pairs[unknown:], order[unknown:]
        fresh = torch.ones(len(pairs), dtype=torch.bool)
        fresh[1:] = pairs[1:] != pairs[:-1]
        entry_of = torch.full((keys.numel(),), -1, dtype=torch.int32)
        entry_of[order] = fresh.cumsum(0, dtype=torch.int32) - 1
        del order  # 8 bytes of every context at every place
        pairs, first = pairs[fresh], fresh.nonzero()[:, 0]
        counts = first.diff(append=torch.tensor([len(fresh)]))
        contexts, entries = (pairs >> TOKEN_BITS).unique_consecutive(return_counts=True)
        bits = max(1, (2 * len(contexts)).bit_length())
        crowds = torch.bincount(contexts >> KEY_BITS - bits, minlength=2**bits)
        crowd = int(crowds.max())
        nothing = torch.zeros(1, dtype=torch.int64)
        starts = torch.cat((nothing, nothing, entries.cumsum(0)))
        table = ContextCounts(
            keys=torch.cat((contexts, torch.full((crowd,), -1))),
            places=torch.cat((nothing, crowds.cumsum(0))).int(),
            crowd=crowd,
            starts=starts,
            tokens=(pairs & 2**TOKEN_BITS - 1).int(),
            counts=counts.float(),
            totals=sums(counts, starts),
            kinds=starts.diff().float(),
        )
        return table, entry_of.view(keys.shape)

    def without(self, gone: Tensor) -> "ContextCounts":
        """The same where every entry counts for `gone` (E,) less."""
        left = self.counts - gone
        return self._replace(counts=left, totals=sums(left, self.starts), kinds=sums(left > 0, self.starts))

    def to(self, device: torch.device | str) -> "ContextCounts":
        """The same on `device`."""
        return ContextCounts(*(part if isinstance(part, int) else part.to(device) for part in self))  # type: ignore[arg-type]

    def find(self, keys: Tensor) -> Tensor:
        """The row of every key, of any shape: int64."""
        shift = KEY_BITS - (len(self.places) - 1).bit_length() + 1
        place = look_up(self.places, keys.clamp_min(0) >> shift).long()
        row = torch.full_like(keys, UNSEEN)
        for _ in range(self.crowd):
            row = torch.where((look_up(self.keys, place) == keys) & (keys >= 0), place + 1, row)
            place = place + 1
        return row

    def after(self, rows: Tensor, vocab_size: int) -> Tensor:
        """How often every token followed the contexts in `rows`, of any shape: (…, V) float32."""
        flat = rows.flatten()
        start = look_up(self.starts, flat)
        many = look_up(self.starts, flat + 1) - start
        n = torch.repeat_interleave(many)  # which context each of the entries belongs to
        entry = torch.arange(len(n), device=flat.device) + (start - many.cumsum(0) + many)[n]
        counts = torch.zeros(len(flat) * vocab_size, device=flat.device)
        counts[n * vocab_size + look_up(self.tokens, entry)] = look_up(self.counts, entry)  # all places differ
        return counts.view(*rows.shape, vocab_size)

    def seen(self, keys: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """What followed contexts (n, J), kind by kind: counts (J, n, V), their sums and how many are above 0 (J, n)."""
        rows = self.find(keys).T.contiguous()
        return self.after(rows, vocab_size), look_up(self.totals, rows), look_up(self.kinds, rows)


def sums(values: Tensor, starts: Tensor) -> Tensor:
    """The sum of every row's whole numbers (E,), whose rows begin at `starts` (R + 2,): (R + 1,) float32."""
    running = F.pad(values.long().cumsum(0), (1, 0))
    return running[starts].diff().float()
