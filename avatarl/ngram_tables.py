"""Tables of n-gram counts that answer in a few tensor operations: dense for small vocabularies, else sparse.

Both hold the trie of ngram_counts.py as tensors. A *row* is a context: UNSEEN (what contexts that the text
lacks point at; without counts), ROOT (the empty context), then the contexts of 1, 2, … tokens. C counts what
follows a row, U the different tokens among it; the *mass* of a token in it is max(c − d, 0).

- `DenseTable`: V numbers a row, so that every question is one gather per length; O(N · V) for N positions.
- `SparseTable`: the tokens that occur in each row, likeliest first; nothing is ever of size (N, V). About 55
  bytes an entry: 74 MB for half a million GPT-2 tokens of WikiText-2, contexts of 4; built in a second or two.

Shapes: N positions, V vocabulary, R rows, E entries, K tokens asked for per position, and J = context + 1
rows per position, the longest context first, the unigram last.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from avatarl.ngram_counts import Level, count_levels, interpolate
from avatarl.ngram_index import KeyIndex, look_up

DENSE_VOCABULARY = 256  # characters and bytes: scoring all tokens costs less than finding the best few
DENSE_BIGRAMS = 4096  # up to here, a sparse table has its bigrams in dense form too: 64 MB at most
DENSE_ENTRIES = 2**26  # the most masses of a dense table, 256 MB: long contexts of long texts pass it
UNSEEN, ROOT, FIRST = range(3)  # FIRST: of a context of one token


class DenseTable(NamedTuple):
    """The mass, and the row of the longer context, of every token after every context."""

    totals: Tensor  # (R,) float32, C
    kinds: Tensor  # (R,) float32, U
    mass: Tensor  # (R, V) float32
    longer: Tensor  # (rows of all but the longest contexts, V) int32

    @staticmethod
    def build(levels: list[Level], vocab_size: int, discount: float) -> "DenseTable":
        first = ROOT + np.cumsum([0, *(len(level.totals) for level in levels)])  # row of each level's first context
        mass = np.zeros((first[-1], vocab_size), np.float32)
        longer = np.full((first[-2], vocab_size), UNSEEN, np.int32)
        for n, level in enumerate(levels):
            place = first[n] * vocab_size + level.keys
            mass.reshape(-1)[place] = np.maximum(level.counts - discount, 0)
            if n + 1 < len(levels):
                longer.reshape(-1)[place] = first[n + 1] + np.arange(len(place))
        none = np.zeros(1)  # of UNSEEN
        totals = _tensor([none, *(level.totals for level in levels)], torch.float32)
        kinds = _tensor([none, *(level.kinds for level in levels)], torch.float32)
        return DenseTable(totals, kinds, torch.from_numpy(mass), torch.from_numpy(longer))

    @property
    def vocab_size(self) -> int:
        return self.mass.shape[1]

    def step(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """The rows of the contexts `rows` with `tokens` after them, or UNSEEN: int64, same shape."""
        return look_up(self.longer, rows * self.vocab_size + tokens).long()

    def mass_at(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """The mass of `tokens` in `rows`, broadcast against each other: float32."""
        return look_up(self.mass, rows * self.vocab_size + tokens)

    def mix(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Σ_j weights[:, j] · mass in row rows[:, j], of all tokens: (N, J), (N, J) → (N, V) float32."""
        return F.embedding_bag(rows, self.mass, per_sample_weights=weights, mode="sum")


class SparseTable(NamedTuple):
    """Entries, row by row; a row's by falling interpolated probability p_n, ties to the lowest id.

    The root's entries come first and are all V tokens, without mass where never seen. Entry i is also the row
    FIRST + i.
    """

    totals: Tensor  # (R,) float32, C
    kinds: Tensor  # (R,) float32, U
    starts: Tensor  # (R + 1,) int32, first entry of each row
    tokens: Tensor  # (E,) int32
    mass: Tensor  # (E,) float32
    suffixes: Tensor  # (E,) int32, the entry of the same token in the context without its first token
    entries: KeyIndex  # of the keys row · V + token
    dense: Tensor  # (S, V) float32, the mass of every token in the rows before S

    @staticmethod
    def build(levels: Iterable[Level], vocab_size: int, discount: float) -> "SparseTable":
        """One level at a time, so that an iterator's levels are freed on the way."""
        totals, kinds, starts = ([np.zeros(1, np.int64)] for _ in range(3))  # of UNSEEN
        tokens, mass, suffixes, keys = [], [], [], []
        shallow_rows = FIRST + (vocab_size if vocab_size <= DENSE_BIGRAMS else 0)
        dense = np.zeros((shallow_rows, vocab_size), np.float32)
        p, below, first = np.full(1, 1 / vocab_size), np.full(1, -1), 0  # p and place of the entries one level below
        for level in levels:
            p, _ = interpolate(level, p, discount)
            row, token = below[level.parents] + FIRST, level.keys % vocab_size
            order = np.lexsort((-p, row))  # stable: of equals the lowest id comes first
            row, token = row[order], token[order]
            key, new_mass = row * vocab_size + token, np.maximum(level.counts - discount, 0)[order]
            contexts = below.argsort()
            totals.append(level.totals[contexts])
            kinds.append(level.kinds[contexts])
            starts.append(first + np.searchsorted(row, below[contexts] + FIRST))
            tokens.append(token)
            mass.append(new_mass)
            suffixes.append(below[level.suffixes][order].clip(min=0))  # the root's have none
            keys.append(key)
            shallow = row < len(dense)
            dense[row[shallow], token[shallow]] = new_mass[shallow]
            below = np.empty_like(order)
            below[order] = first + np.arange(len(order))
            first += len(order)
        starts.append(np.full(1, first))
        return SparseTable(
            _tensor(totals, torch.float32),
            _tensor(kinds, torch.float32),
            _tensor(starts, torch.int32),
            _tensor(tokens, torch.int32),
            _tensor(mass, torch.float32),
            _tensor(suffixes, torch.int32),
            KeyIndex.build(np.concatenate(keys)),
            torch.from_numpy(dense),
        )

    @property
    def vocab_size(self) -> int:
        return self.dense.shape[1]

    def step(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """The rows of the contexts `rows` with `tokens` after them, or UNSEEN: int64, same shape."""
        place, found = self.entries.find(rows * self.vocab_size + tokens)
        return torch.where(found, place + FIRST, UNSEEN).long()

    def mass_at(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """The mass of `tokens` in `rows`, broadcast against each other: float32."""
        return self._mass_of(rows * self.vocab_size + tokens)

    def mix_at(self, rows: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Σ_j weights[:, j] · mass in row rows[:, j], of tokens ids (N, K): (N, J), (N, J) → (N, K) float32."""
        mass = look_up(self.dense[ROOT], ids)
        mixed = weights[:, -1:] * mass
        for length in range(1, rows.shape[1]):
            j = rows.shape[1] - 1 - length
            key = rows[:, j : j + 1] * self.vocab_size + ids
            if length == 1 and len(self.dense) > FIRST:
                mass = look_up(self.dense, key)
            else:  # what a context lacks, a longer one lacks too: then a key that never is, and lies in the cache
                mass = self._mass_of(torch.where(mass > 0, key, 0))
            mixed.addcmul_(weights[:, j : j + 1], mass)
        return mixed

    def candidates(self, rows: Tensor, weights: Tensor, m: int) -> tuple[Tensor, Tensor]:
        """The first m entries of every row: their tokens (N, J, m + 1) int32, and Σ_j weights · mass of each.

        What a row has fewer, a token that a longer context of the position proposes too, and the last column
        are −inf. The masses of a token in shorter contexts are found along its suffixes. Assumes that each row
        is the next one's context with a token before it, or UNSEEN.

        m = k entries a row hold the k likeliest tokens if the weights are those of p_n: after a context, a
        token that is no entry of its row has p_n = (d U / C) p_{n−1}, so it either is one of the k likeliest
        at p_{n−1}, or k others precede it there, and here. And so on down to the root, which has all tokens.
        """
        n, width = rows.shape
        start = look_up(self.starts, rows).unsqueeze(-1)  # (N, J, 1)
        stop = look_up(self.starts, rows + 1).unsqueeze(-1)
        column = torch.arange(m + 1, dtype=torch.int32, device=rows.device)
        entries = start + column  # (N, J, m + 1)
        inside = entries < torch.minimum(stop, start + m)
        entries *= inside
        mixed = torch.where(inside, 0.0, -torch.inf)
        corner = torch.arange(0, n * width * (m + 1), m + 1, device=rows.device).view(n, width, 1)
        chain = entries[:, :0]
        for j in range(width):
            if j > 0:
                chain = look_up(self.suffixes, chain)  # (N, j, m + 1): from the rows before, now in this one
                twin = torch.where(inside[:, :j], chain - start[:, j : j + 1], m).clamp_max_(m)
                mixed.view(-1).index_fill_(0, twin.long().add_(corner[:, j : j + 1]).view(-1), -torch.inf)
            chain = torch.cat((chain, entries[:, j : j + 1]), 1)
            mixed[:, : j + 1] += look_up(self.mass, chain) * weights[:, j, None, None]
        return look_up(self.tokens, entries), mixed

    def _mass_of(self, keys: Tensor) -> Tensor:
        place, found = self.entries.find(keys)
        return look_up(self.mass, place) * found


def build_table(
    corpus: np.ndarray, vocab_size: int, context: int, discount: float, device: torch.device | str
) -> DenseTable | SparseTable:
    """One table on `device` of all contexts of 0 to `context` tokens in corpus (L,) int64.

    Dense for at most DENSE_VOCABULARY tokens, unless R · V passes DENSE_ENTRIES; else sparse.
    """
    levels: Iterable[Level] = count_levels(corpus, vocab_size, context)
    if vocab_size <= DENSE_VOCABULARY:
        levels = list(levels)
        row_count = ROOT + sum(len(level.totals) for level in levels)
        if row_count * vocab_size <= DENSE_ENTRIES:
            return DenseTable(*(t.to(device) for t in DenseTable.build(levels, vocab_size, discount)))
    sparse = SparseTable.build(levels, vocab_size, discount)
    return SparseTable(*(part.to(device) for part in sparse))  # type: ignore[arg-type]


def _tensor(parts: Sequence[ArrayLike], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(dtype)
