"""The n-gram critic: what statistics of the training text say about the next token.

    critic = NgramCritic(train_ids, vocab_size, context=4)
    opinion = critic.opinion(tokens, positions)     # tokens (B, T), positions (B,): where each window starts
    opinion.top_ids(16); opinion.log_probs(ids)

Interpolated absolute discounting (DESIGN section 3, Critics). With c the counts after a context, C their sum,
U how many are above 0, and d the discount:

    p_n(w) = (max(c(w) − d, 0) + d · U · p_{n−1}(w)) / C,     p_{−1} = 1/V,     p_n = p_{n−1} where C = 0

Unlike a textbook n-gram, a training position is judged by counts without its own occurrence (leave-one-out):
with it the critic would merely repeat gold. Kneser–Ney's continuation counts are left out for simplicity.

All contexts form one trie. A *row* is a context; an *entry* is a context with one token after it, hence also
a longer context: the entries of one length, sorted by (context, token), are the rows of the next, in order.
Shapes: B windows, T positions, N = B·T, V vocabulary, R rows, E entries, L tokens of the corpus, and the
J = context + 2 distributions that are mixed (the uniform one, the unigram, one for each longer context).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from config import require

Stream = np.ndarray | Tensor  # token ids (L,) of any integer type
DENSE_ENTRIES = 2**26  # rows are also kept dense, V floats each, level by level up to so many
CHUNK_ENTRIES = 2**23  # probabilities (N·V) that an opinion computes and keeps at a time
# The first rows: 1/V for every token; what unseen contexts point at, without counts; the unigram.
UNIFORM, UNSEEN, ROOT = range(3)


@dataclass(frozen=True)
class Level:
    """What follows the M different contexts of one length n (numpy, int64)."""

    keys: np.ndarray  # (E,) context · V + token of each entry, rising
    counts: np.ndarray  # (E,) how often that token follows that context, at least 1
    windows: np.ndarray  # (L − n,) the entry that the n + 1 tokens from each place of the corpus on make
    parents: np.ndarray  # (E,) context of each entry
    totals: np.ndarray  # (M,) C: 0 only for a context that occurs nowhere but at the corpus's end
    kinds: np.ndarray  # (M,) U


def count_levels(corpus: np.ndarray, vocab_size: int, longest: int) -> Iterator[Level]:
    """Count what follows every context of 0, 1, … `longest` tokens of corpus (L,), one length at a time.

    Contexts are numbered by the level before, so that a key stays below L · V however long they are.
    """
    windows, contexts = np.zeros(len(corpus), np.int64), 1
    for n in range(longest + 1):
        keys = windows[: len(corpus) - n] * vocab_size + corpus[n:]  # (L − n,)
        keys, counts, windows = _rank(keys, contexts * vocab_size)
        parents = keys // vocab_size
        totals = np.bincount(parents, weights=counts, minlength=contexts).astype(np.int64)
        yield Level(keys, counts, windows, parents, totals, np.bincount(parents, minlength=contexts))
        contexts = len(keys)


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


def _checked(stream: Stream, vocab_size: int, discount: float, least: int) -> np.ndarray:
    """The stream as (L,) int64; ConfigError for fewer than `least` tokens, ids outside V, a bad discount."""
    require(0 < discount < 1, "critic.ngram-discount", discount, "use a discount in (0, 1)")
    ids = np.asarray(stream.cpu() if isinstance(stream, Tensor) else stream).astype(np.int64)
    fix = f"too few tokens; use at least {least}, or a shorter context"
    require(len(ids) >= least, "length of the n-gram text", len(ids), fix)
    low, high = ids.min(), ids.max()
    fix = f"outside the vocabulary of {vocab_size}; use the tokenizer that encoded the text"
    require(low >= 0 and high < vocab_size, "ids of the n-gram text", f"{low} to {high}", fix)
    return ids


@dataclass(frozen=True)
class NgramTable:
    """The trie as tensors. Entry V + i is row 3 + i: the uniform row's V entries, no contexts, come first."""

    vocab_size: int
    keys: Tensor  # (E,) int64, row · V + token, rising
    mass: Tensor  # (E,) float32, c − d; 1/V in the uniform row
    totals: Tensor  # (R,) float32, C; 1 for the uniform row, 0 for the unseen one
    kinds: Tensor  # (R,) float32, U; 0 for both
    starts: Tensor  # (R,) int64, first entry of each row
    widths: tuple[int, ...]  # J numbers: most entries of a row, for the rows of each length
    dense: Tensor  # (dense rows, V) float32, the mass of every token in the rows of the shortest contexts
    dense_columns: int  # how many of the J distributions have dense rows: 2 to J

    def step(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """The rows of the contexts `rows` with `tokens` after them (int64, same shape), or UNSEEN."""
        entry, found = self._find(rows, tokens)
        return torch.where(found, entry + (ROOT + 1 - self.vocab_size), UNSEEN)

    def mass_at(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """max(c − d, 0) of `tokens` in `rows`, broadcast against each other, float32."""
        if self.dense_columns == len(self.widths):
            return self.dense.view(-1)[rows * self.vocab_size + tokens]
        entry, found = self._find(rows, tokens)
        return self.mass[entry] * found

    def mix(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Σ_j weights[:, j] · mass of row rows[:, j], for all tokens: (N, J), (N, J) → (N, V) float32.

        O(N · V). Sparse rows are padded to the longest of their level, so that no size leaves the device.
        """
        d = self.dense_columns
        out = F.embedding_bag(rows[:, :d], self.dense, per_sample_weights=weights[:, :d], mode="sum")
        for j in range(d, len(self.widths)):
            place = torch.arange(self.widths[j], device=rows.device)  # (W,)
            row = rows[:, j : j + 1]
            inside = place < self.kinds[row]  # (N, W)
            entry = torch.where(inside, self.starts[row] + place, 0)
            token = torch.where(inside, self.keys[entry] - row * self.vocab_size, 0)
            out.scatter_add_(1, token, self.mass[entry] * weights[:, j : j + 1] * inside)
        return out

    def _find(self, rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        key = rows * self.vocab_size + tokens
        entry = torch.searchsorted(self.keys, key).clamp_max_(len(self.keys) - 1)
        return entry, self.keys[entry] == key


def build_table(
    corpus: np.ndarray, vocab_size: int, context: int, discount: float, device: torch.device | str
) -> NgramTable:
    """One table on `device` of all contexts of 0 to `context` tokens in corpus (L,) int64."""
    keys, mass = [np.arange(vocab_size)], [np.full(vocab_size, 1 / vocab_size)]
    totals, kinds = [np.array([1, 0])], [np.array([0, 0])]  # of UNIFORM and UNSEEN
    widths, row_count, dense_rows, dense_columns = [vocab_size], ROOT, ROOT, 1
    for level in count_levels(corpus, vocab_size, context):
        keys.append(level.keys + row_count * vocab_size)
        mass.append(level.counts - discount)
        totals.append(level.totals)
        kinds.append(level.kinds)
        widths.append(int(level.kinds.max()))
        row_count += len(level.totals)
        if row_count * vocab_size <= DENSE_ENTRIES or len(widths) == 2:
            dense_rows, dense_columns = row_count, len(widths)

    def tensor(parts: list[np.ndarray], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(dtype).to(device)

    entry_keys, entry_mass = tensor(keys, torch.int64), tensor(mass, torch.float32)
    dense = torch.zeros(dense_rows * vocab_size, device=device)
    inside = entry_keys < len(dense)
    dense[entry_keys[inside]] = entry_mass[inside]
    return NgramTable(
        vocab_size,
        entry_keys,
        entry_mass,
        tensor(totals, torch.float32),
        tensor(kinds, torch.float32),
        torch.searchsorted(entry_keys, torch.arange(row_count, device=device) * vocab_size),
        tuple(widths),
        dense.view(dense_rows, vocab_size),
        dense_columns,
    )


class NgramCritic:
    """Judges every token by interpolated n-gram counts of the training text (DESIGN section 3, Critics).

    corpus (L,) holds the ids of the training stream, in [0, vocab_size); `context` is the longest context in
    tokens. A table costs about 30 bytes for each different window of up to context + 1 tokens, and at most
    4 · DENSE_ENTRIES more. Raises ConfigError for a corpus or a setting that gives no table.
    """

    def __init__(
        self,
        corpus: Stream,
        vocab_size: int,
        *,
        context: int = 4,
        discount: float = 0.75,
        leave_one_out: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        require(context >= 0, "critic.ngram-context", context, "use 0 or more tokens")
        ids = _checked(corpus, vocab_size, discount, least=context + 1)
        self.vocab_size, self.context, self.discount = vocab_size, context, discount
        self.leave_one_out = leave_one_out
        self.table = build_table(ids, vocab_size, context, discount, device)
        self.corpus = torch.from_numpy(ids).int().to(device)  # (L,)
        # The table of n tokens counted an occurrence when the n tokens before it match; the uniform row none.
        self._needed_matches = torch.tensor([2**62, *range(context + 1)], device=device)  # (J,)

    def opinion(self, tokens: Tensor, positions: Tensor | None = None) -> "NgramOpinion":
        """What follows each of tokens (B, T), N = B·T in row-major order; contexts stay inside the window.

        positions (B,) is the offset of tokens[:, 0] in the corpus, so that gold at (b, t) is
        corpus[positions[b] + t + 1], whose occurrence is left out. None: nothing is left out.
        """
        rows = self._rows(tokens)
        totals, kinds = self.table.totals[rows], self.table.kinds[rows]  # (N, J)
        if positions is None or not self.leave_one_out:
            return NgramOpinion(self.table, rows, self._weights(totals, kinds))
        gold, own = self._own_occurrence(tokens, positions)
        mass = self.table.mass_at(rows, gold[:, None])  # (N, J)
        only = own * (mass < 1)  # a count of 1 has mass 1 − d: without it, one kind fewer
        weights = self._weights(totals - own, kinds - only)
        p_gold = (weights * (mass - own).clamp_min_(0)).sum(-1)  # (N,)
        return NgramOpinion(self.table, rows, weights, (gold, p_gold))

    def _rows(self, tokens: Tensor) -> Tensor:
        """The row of every distribution to mix after each token: (B, T) → (N, J) int64."""
        shorter = torch.full_like(tokens, ROOT)
        columns = [torch.full_like(tokens, UNIFORM), shorter]
        for _ in range(self.context):
            row = self.table.step(shorter, tokens)
            columns.append(row)
            shorter = F.pad(row[:, :-1], (1, 0), value=UNSEEN)  # the context that ends one token earlier
        return torch.stack(columns, -1).flatten(0, 1)

    def _own_occurrence(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Gold (N,) int64 and, as 0 or 1, which tables counted it after this very context: (N, J) float32."""
        last = len(self.corpus) - 1
        place = torch.arange(tokens.shape[1], device=tokens.device)
        here = positions[:, None] + place  # (B, T)
        gold = self.corpus[(here + 1).clamp_max(last)].long()
        mismatch = torch.where(tokens == self.corpus[here.clamp_max(last)], -1, place)
        matches = place - mismatch.cummax(1).values  # how many tokens up to here are the corpus's own
        matches = torch.where(here < last, matches, -1)  # past its end there is no gold
        own = matches.view(-1, 1) >= self._needed_matches
        return gold.view(-1), own.float()

    def _weights(self, totals: Tensor, kinds: Tensor) -> Tensor:
        """Factors (N, J) of each row's mass in the interpolated probability, from its C and U (N, J)."""
        seen, totals = totals > 0, totals.clamp_min(1)
        passed_on = torch.where(seen, self.discount * kinds / totals, 1.0)
        onward = passed_on.flip(-1).cumprod(-1).flip(-1)  # Π over this and all longer contexts
        return seen / totals * F.pad(onward[:, 1:], (0, 1), value=1.0)


class NgramOpinion:
    """What the n-gram critic thinks at N positions (a CriticOpinion); log-probabilities in nats, float32."""

    def __init__(
        self, table: NgramTable, rows: Tensor, weights: Tensor, gold: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self._table, self._rows, self._weights = table, rows, weights  # (N, J) both
        self._gold = gold  # ids and probabilities (N,) of the one token whose counts are not the table's

    def rows(self, start: int, stop: int) -> "NgramOpinion":
        """The opinion at positions start … stop − 1."""
        gold = None if self._gold is None else (self._gold[0][start:stop], self._gold[1][start:stop])
        return NgramOpinion(self._table, self._rows[start:stop], self._weights[start:stop], gold)

    def top_ids(self, k: int) -> Tensor:
        """The k likeliest tokens, best first, ties to the lowest id: (N, k) int64. Costs O(N · V).

        torch.topk leaves ties open; pairs (p, lowest id) never tie, and floats >= 0 sort like their bits.
        """
        ids = torch.arange(self._table.vocab_size, device=self._rows.device)
        ranks = ((part._probs.view(torch.int32).long() << 32) - ids for part in self._parts())
        return torch.cat([rank.topk(k).indices for rank in ranks])

    def log_probs(self, ids: Tensor) -> Tensor:
        """Log-probabilities over the full vocabulary of ids (N, K), as (N, K).

        Gathered from all V where these fit a chunk (top_ids shares them), else one lookup per id and length.
        """
        if self._fits:
            return self._probs.gather(1, ids).log_()
        mass = self._table.mass_at(self._rows[:, None], ids[:, :, None])  # (N, K, J)
        p = (mass * self._weights[:, None]).sum(-1)  # (N, K)
        if self._gold is not None:
            gold, p_gold = self._gold
            p = torch.where(ids == gold[:, None], p_gold[:, None], p)
        return p.log_()

    def full(self) -> Tensor:
        """All log-probabilities: (N, V)."""
        return torch.cat([part._probs.log() for part in self._parts()])

    @property
    def _fits(self) -> bool:
        return len(self._rows) * self._table.vocab_size <= CHUNK_ENTRIES

    def _parts(self) -> Iterator["NgramOpinion"]:
        """This opinion, in pieces of at most CHUNK_ENTRIES probabilities."""
        if self._fits:
            yield self
            return
        size = max(1, CHUNK_ENTRIES // self._table.vocab_size)
        for start in range(0, len(self._rows), size):
            yield self.rows(start, start + size)

    @cached_property
    def _probs(self) -> Tensor:
        p = self._table.mix(self._rows, self._weights)  # (N, V)
        if self._gold is not None:
            gold, p_gold = self._gold
            p.scatter_(1, gold[:, None], p_gold[:, None])
        return p


def ngram_ladder(
    train: Stream, val: Stream, vocab_size: int, longest: int = 6, discount: float = 0.75, skip: int = 10
) -> list[dict[str, float]]:
    """How n-grams of `train` predict `val`: {"context", "ce" (nats), "accuracy"} for contexts of 1 … longest.

    Contexts run over the whole of `val`; its first `skip` tokens are not scored. Time and memory grow with
    the different windows, not with V: an entry is scored from its own suffix, and the likeliest token after
    a context is among its entries or is its suffix's. Raises ConfigError for unusable streams.
    """
    train = _checked(train, vocab_size, discount, least=longest + 1)
    val = _checked(val, vocab_size, discount, least=skip + 1)
    p, guess = np.full(len(val), 1 / vocab_size), np.zeros(len(val), np.int64)
    context = np.zeros(len(val), np.int64)  # number of what stands before each token; −1: unseen
    scored = _Scored.uniform(len(train), vocab_size)
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
    train: Stream, vocab_size: int, longest: int = 6, discount: float = 0.75, skip: int = 10
) -> list[dict[str, float]]:
    """The ladder on `train` itself, each token judged by counts without it: {"context", "ce"} each."""
    train = _checked(train, vocab_size, discount, least=max(longest, skip) + 1)
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
    windows: np.ndarray  # the level's own
    suffix: np.ndarray  # (E,) the entry one level below that lacks the first token

    @staticmethod
    def uniform(length: int, vocab_size: int) -> "_Scored":
        """Below the unigram of a corpus of `length` tokens: one context, one entry, 1/V."""
        zero, share = np.zeros(1, np.int64), np.full(1, 1 / vocab_size)
        return _Scored(share, np.ones(1), zero, share, np.zeros(length + 1, np.int64), zero)

    def longer(self, level: Level, vocab_size: int, discount: float) -> "_Scored":
        """The next level, whose contexts are this one's entries."""
        suffix = np.empty(len(level.keys), np.int64)
        suffix[level.windows] = self.windows[1:]
        totals = np.maximum(level.totals, 1)
        passed_on = np.where(level.totals > 0, discount * level.kinds / totals, 1)
        p = (level.counts - discount) / totals[level.parents] + passed_on[level.parents] * self.p[suffix]

        best, best_p = self.best[self.suffix], passed_on * self.best_p[self.suffix]
        starts = np.flatnonzero(np.diff(level.parents, prepend=-1))
        parent, top = level.parents[starts], np.maximum.reduceat(p, starts)
        top_entry = np.flatnonzero(p == np.repeat(top, level.kinds[parent]))
        lowest = top_entry[np.diff(level.parents[top_entry], prepend=-1) > 0]  # of equals, the first entry
        token = level.keys[lowest] % vocab_size
        wins = (top > best_p[parent]) | ((top == best_p[parent]) & (token < best[parent]))
        best[parent[wins]], best_p[parent[wins]] = token[wins], top[wins]
        return _Scored(p, passed_on, best, best_p, level.windows, suffix)
