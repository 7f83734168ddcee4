"""Dense n-gram tables: p(next | the last 0 to 3 tokens), precomputed once, looked up in one gather.

    tables = load_tables(train_ids, vocab_size, longest=3, folder=run_cache)
    tables.for_sequence(tokens, 2)          # tokens (B, T) -> (B, T, V): trigrams at every position at once
    tables.log_reference(context)           # context (N, C) -> (N, V): the add-one-smoothed bigram

The probabilities are the n-gram critic's (avatarl/ngram.py), without leaving anything out: interpolated absolute
discounting, an unseen context being judged by the shorter one. They come from the same counts and the same formula,
and are laid out for all V^n contexts, seen or not, so that a context is a row number. That is what small vocabularies
can afford; the suffix array (avatarl/suffixes.py) is for the others. For tinyshakespeare's 65 characters and contexts
of up to 3, 73 MB.

Shapes: L tokens of the text, V vocabulary, N contexts of C tokens; B sequences of T.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from avatarl.ngram_counts import Level, Stream, checked_text, count_levels, interpolate
from avatarl.ngram_index import look_up
from avatarl.stored import read_stored, write_stored
from checks import require

TABLE_LIMIT = 2**28  # probabilities of one NgramTables: 1 GiB; partial credit takes as much again
LAYOUT = "1"  # of a stored table; another number makes every stored one foreign


def row_offsets(vocab_size: int, longest: int) -> list[int]:
    """The first row of each context length 0 … `longest`, and how many rows there are."""
    return [sum(vocab_size**m for m in range(n)) for n in range(longest + 2)]


def check_tables(vocab_size: int, longest: int) -> None:
    """Raise ConfigError unless tables of contexts of 0 to `longest` tokens are small enough to lay out."""
    require(longest >= 0, "longest context of the n-gram tables", longest, "use 0 or more tokens")
    entries = row_offsets(vocab_size, longest)[-1] * vocab_size
    fits = [n for n in range(longest) if row_offsets(vocab_size, n)[-1] * vocab_size <= TABLE_LIMIT]
    shorter = f"use contexts of at most {fits[-1]}, or " if fits else "use "
    users = "bootstrap.ngram-weight" + ("" if 1 in fits else ", bootstrap.kl-coef and bootstrap.guidance")
    require(
        entries <= TABLE_LIMIT,
        "longest context of the n-gram tables",
        longest,
        f"with {vocab_size:,} tokens they would hold {entries:,} probabilities, and the limit is {TABLE_LIMIT:,}; "
        f"{shorter}the suffix array, which takes any vocabulary and any length: --bootstrap.soft suffix "
        f"--bootstrap.soft-weight 1 in place of {users}",
    )


@dataclass(frozen=True)
class NgramTables:
    """p(next | context) for every context of 0 to `longest` tokens (DESIGN section 8, Statistics).

    Row offset(n) + code of a context of n tokens, its code being the number that they spell in base V.
    """

    table: Tensor  # (R, V) float32
    reference: Tensor  # (1 + V, V) float32: add-one-smoothed log-probabilities, contexts of 0 and 1
    longest: int

    @staticmethod
    def build(tokens: Stream, vocab_size: int, longest: int = 3, discount: float = 0.75) -> "NgramTables":
        """Count a text (L,) of ids in [0, vocab_size).

        Raises ConfigError for a table above TABLE_LIMIT, an unusable text, or one with one distinct token.
        """
        check_tables(vocab_size, longest)
        ids = checked_text(tokens, vocab_size, discount, least=longest + 1)
        offsets = row_offsets(vocab_size, longest)
        table = np.empty((offsets[-1], vocab_size), np.float32)
        shorter: np.ndarray = np.full((1, vocab_size), 1 / vocab_size, np.float32)  # below the unigram
        p, codes = np.full(1, 1 / vocab_size), np.zeros(1, np.int64)  # of the level's entries, the next one's contexts
        for n, level in enumerate(count_levels(ids, vocab_size, longest)):
            p, passed_on = interpolate(level, p, discount)
            share: np.ndarray = np.ones(vocab_size**n, np.float32)
            share[codes] = passed_on
            rows = table[offsets[n] : offsets[n + 1]]  # (V^n, V)
            by_suffix = rows.reshape(-1, *shorter.shape)  # the first token of a context apart from its suffix
            np.multiply(share.reshape(by_suffix.shape[:2])[..., None], shorter, out=by_suffix)
            codes = codes[level.parents] * vocab_size + level.keys % vocab_size
            rows.reshape(-1)[codes] = p
            shorter = rows
        reference = _add_one(ids, vocab_size)
        return NgramTables(torch.from_numpy(table), reference, longest)

    @property
    def vocab_size(self) -> int:
        return self.table.shape[1]

    @property
    def memory(self) -> int:
        """Bytes that the tables take."""
        return self.table.nbytes + self.reference.nbytes

    def to(self, device: torch.device | str) -> "NgramTables":
        """The same on `device`."""
        return NgramTables(self.table.to(device), self.reference.to(device), self.longest)

    def rows(self, context: Tensor, length: int) -> Tensor:
        """The row of the last `length` tokens of contexts (N, C), or of all C where there are fewer: (N,) int64."""
        self._check(length)
        used = min(length, context.shape[1])
        code = context.new_zeros(len(context))
        for token in context[:, context.shape[1] - used :].unbind(1):
            code = code * self.vocab_size + token
        return code + row_offsets(self.vocab_size, used)[used]

    def probs(self, context: Tensor, length: int) -> Tensor:
        """p(· | the last `length` tokens of each context): (N, C) int64 → (N, V)."""
        return self.table.index_select(0, self.rows(context, length))

    def prob(self, context: Tensor, length: int, actions: Tensor) -> Tensor:
        """p of `actions` (N, A) alone: (N, C) int64 → (N, A)."""
        return look_up(self.table, self.rows(context, length)[:, None] * self.vocab_size + actions)

    def for_sequence(self, tokens: Tensor, length: int) -> Tensor:
        """p(· | the last `length` tokens up to and with each position's own): (B, T) int64 → (B, T, V).

        Positions from which fewer tokens can be seen use those.
        """
        rows = self._sequence_rows(tokens, length)
        return self.table.index_select(0, rows.flatten()).view(*rows.shape, -1)

    def log_reference(self, context: Tensor, length: int = 1) -> Tensor:
        """log((c + 1) / (C + V)) of every token, after the last `length` (0 or 1) tokens: (N, C) → (N, V), nats.

        Finite everywhere: what a policy is compared with by KL (DESIGN section 8, GRPO).
        """
        if length not in (0, 1):
            raise ValueError(f"length = {length}: the reference has contexts of 0 and 1 token")
        seen = min(length, context.shape[1])
        rows = context[:, -1] + 1 if seen else context.new_zeros(len(context))
        return self.reference.index_select(0, rows)

    def _sequence_rows(self, tokens: Tensor, length: int) -> Tensor:
        """The row of the context that ends in each token: (B, T) → (B, T) int64."""
        self._check(length)
        offsets = row_offsets(self.vocab_size, length)
        rows = torch.zeros_like(tokens)
        for back in range(min(length, tokens.shape[1])):
            rows[:, back:] += tokens[:, : tokens.shape[1] - back] * self.vocab_size**back
        seen = torch.arange(1, tokens.shape[1] + 1, device=tokens.device).clamp_max(length)
        return rows + torch.tensor(offsets, device=tokens.device)[seen]

    def _check(self, length: int) -> None:
        if not 0 <= length <= self.longest:
            raise ValueError(f"length = {length}: these tables hold contexts of 0 to {self.longest} tokens")


def _add_one(ids: np.ndarray, vocab_size: int) -> Tensor:
    """log((c + 1) / (C + V)) after no token, then after each token: (1 + V, V) float32."""
    levels: list[Level] = list(count_levels(ids, vocab_size, 1))
    counts = np.zeros((1 + vocab_size, vocab_size))
    counts[0] = levels[0].counts
    counts[1:].reshape(-1)[levels[1].keys] = levels[1].counts
    smoothed = (counts + 1) / (counts.sum(1, keepdims=True) + vocab_size)
    return torch.from_numpy(np.log(smoothed).astype(np.float32))


def load_tables(tokens: Stream, vocab_size: int, longest: int, folder: Path, discount: float = 0.75) -> NgramTables:
    """The tables of a text, read from `folder` where they were stored for it before, else built and stored there.

    The file's name is a hash of the text and the settings. A file that is damaged or was made for something else is
    rebuilt; a folder that cannot be written to costs nothing but the time next time.
    """
    check_tables(vocab_size, longest)
    ids = checked_text(tokens, vocab_size, discount, least=longest + 1)
    settings = f"{LAYOUT} {vocab_size} {longest} {discount!r} "
    digest = hashlib.sha256(settings.encode() + ids.tobytes()).hexdigest()
    path = folder / f"ngrams-{digest[:16]}.safetensors"
    stored = read_stored(path, digest)
    if stored is not None and stored.keys() == {"table", "reference"}:
        return NgramTables(stored["table"], stored["reference"], longest)
    tables = NgramTables.build(ids, vocab_size, longest, discount)
    write_stored(path, digest, {"table": tables.table, "reference": tables.reference})
    return tables
