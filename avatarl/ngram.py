"""The n-gram critic: what statistics of the training text say about the next token.

    critic = NgramCritic(train_ids, vocab_size, context=4)
    opinion = critic.opinion(tokens, positions)     # tokens (B, T), positions (B,): where each window starts
    opinion.top_ids(16); opinion.log_probs(ids)

Interpolated absolute discounting (DESIGN section 3, Critics). With c the counts after a context, C their sum,
U how many are above 0, and d the discount:

    p_n(w) = (max(c(w) − d, 0) + d · U · p_{n−1}(w)) / C,     p_{−1} = 1/V,     p_n = p_{n−1} where C = 0

Unlike a textbook n-gram, a training position is judged by counts without its own occurrence (leave-one-out):
with it the critic would merely repeat gold. Kneser–Ney's continuation counts are left out for simplicity.

The counts lie in the tables of ngram_tables.py, as rows of masses max(c − d, 0). At a position p_n unrolls to

    p(w) = floor + Σ_j weight_j · mass of w in row j,

over the contexts that end there: J = context + 1 rows, the longest context first, the unigram last. Leaving a
token out changes weights, the floor, and the mass of gold alone.
Shapes: B windows, T positions, N = B·T, V vocabulary, L tokens of the corpus.
"""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from avatarl.action_space import top_ids
from avatarl.ngram_counts import Stream, checked_stream
from avatarl.ngram_index import look_up
from avatarl.ngram_tables import DENSE_VOCABULARY, ROOT, UNSEEN, DenseTable, SparseTable, build_table
from config import require

CHUNK_ENTRIES = 2**23  # probabilities that an opinion computes at a time
SPARE = 4  # candidates of a row beyond k, where leaving out may change their order


class NgramCritic:
    """Judges every token by interpolated n-gram counts of the training text (DESIGN section 3, Critics).

    corpus (L,) holds the ids of the training stream, in [0, vocab_size); `context` is the longest context in
    tokens. Raises ConfigError for a corpus or a setting that gives no table.
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
        ids = checked_stream(corpus, vocab_size, discount, least=context + 1)
        self.vocab_size, self.context, self.discount = vocab_size, context, discount
        self.leave_one_out = leave_one_out
        self.table = build_table(ids, vocab_size, context, discount, device)
        self.corpus = torch.from_numpy(ids).int().to(device)  # (L,)
        # A row of n tokens counted an occurrence when the n tokens before it match.
        self._needed_matches = torch.arange(context, -1, -1, device=device)  # (J,)

    def opinion(self, tokens: Tensor, positions: Tensor | None = None) -> "NgramOpinion":
        """What follows each of tokens (B, T), N = B·T in row-major order; contexts stay inside the window.

        positions (B,) is the offset of tokens[:, 0] in the corpus, so that gold at (b, t) is
        corpus[positions[b] + t + 1], whose occurrence is left out. None: nothing is left out.
        """
        rows = self._rows(tokens)
        totals, kinds = look_up(self.table.totals, rows), look_up(self.table.kinds, rows)  # (N, J)
        if positions is None or not self.leave_one_out:
            return NgramOpinion(self.table, rows, *self._weights(totals, kinds))
        gold, own = self._own_occurrence(tokens, positions)
        mass = self.table.mass_at(rows, gold.unsqueeze(-1))  # (N, J)
        only = own * (mass < 1)  # a count of 1 has mass 1 − d: without it, one kind fewer
        weights, floor = self._weights(totals - own, kinds - only)
        p_gold = floor + (weights * (mass - own).clamp_min_(0)).sum(-1)  # (N,)
        return NgramOpinion(self.table, rows, weights, floor, (gold, p_gold))

    @property
    def reach(self) -> int:
        """The longest context that is used, in tokens, or the one that it is given though it uses none."""
        return max(1, self.context)

    def after(self, context: Tensor) -> "NgramOpinion":
        """What follows each of contexts (N, C), nothing left out."""
        rows = self._rows(context).unflatten(0, context.shape)[:, -1]  # (N, J)
        totals, kinds = look_up(self.table.totals, rows), look_up(self.table.kinds, rows)
        return NgramOpinion(self.table, rows, *self._weights(totals, kinds))

    def _rows(self, tokens: Tensor) -> Tensor:
        """The row of every context that ends in each token: (B, T) → (N, J) int64."""
        batch, length = tokens.shape
        rows = tokens.new_full((batch, length + 1, self.context + 1), UNSEEN)  # at 0: before the window
        rows[..., -1] = ROOT
        for j in reversed(range(self.context)):
            rows[:, 1:, j] = self.table.step(rows[:, :-1, j + 1], tokens)
        return rows[:, 1:].flatten(0, 1)

    def _own_occurrence(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Gold (N,) int64 and, as 0 or 1, which rows counted it after this very context: (N, J) float32."""
        last = len(self.corpus) - 1
        place = torch.arange(tokens.shape[1], device=tokens.device)
        here = positions[:, None] + place  # (B, T)
        gold = self.corpus[(here + 1).clamp_max(last)].long()
        mismatch = torch.where(tokens == self.corpus[here.clamp_max(last)], -1, place)
        matches = place - mismatch.cummax(1).values  # how many tokens up to here are the corpus's own
        matches = torch.where(here < last, matches, -1)  # past its end there is no gold
        own = matches.view(-1, 1) >= self._needed_matches
        return gold.view(-1), own.float()

    def _weights(self, totals: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
        """From each row's C and U (N, J), the factor of its mass in p (N, J), and the floor of p (N,)."""
        seen, totals = totals > 0, totals.clamp_min(1)
        share = torch.where(seen, self.discount * kinds / totals, 1.0).cumprod(-1)  # left to shorter contexts
        weights = seen / totals
        weights[:, 1:] *= share[:, :-1]
        return weights, share[:, -1] / self.vocab_size


class NgramOpinion:
    """What the n-gram critic thinks at N positions (a CriticOpinion); log-probabilities in nats, float32."""

    def __init__(
        self,
        table: DenseTable | SparseTable,
        rows: Tensor,
        weights: Tensor,
        floor: Tensor,
        gold: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self._table, self._rows, self._weights, self._floor = table, rows, weights, floor  # (N, J) twice, (N,)
        self._gold = gold  # ids and probabilities (N,) of the one token whose counts are not the table's

    def rows(self, start: int, stop: int) -> "NgramOpinion":
        """The opinion at positions start … stop − 1."""
        here = slice(start, stop)
        gold = None if self._gold is None else (self._gold[0][here], self._gold[1][here])
        return NgramOpinion(self._table, self._rows[here], self._weights[here], self._floor[here], gold)

    def evidence(self) -> Tensor:
        """How often the longest context that was seen was seen, less the own occurrence: (N,) float32."""
        seen = self._weights > 0  # (N, J); the longest of them has the weight 1 / C
        longest = seen.byte().argmax(-1, keepdim=True)
        return 1 / self._weights.gather(-1, longest)[:, 0].clamp_min(1e-9)

    def top_ids(self, k: int) -> Tensor:
        """The k likeliest tokens, best first, ties to the lowest id: (N, k) int64.

        Exact, but for one case: a sparse table ranks the first entries of every row, in an order from before
        anything was left out. Gold is always ranked. In a row of more than m = k + SPARE entries, leaving one
        out changes C and U by at most 1 in m, so that another entry would have to pass SPARE better ones by
        that. Raises ValueError for k > V.
        """
        vocab_size = self._table.vocab_size
        if k > vocab_size:
            raise ValueError(f"top-k asks for {k} tokens of a vocabulary of {vocab_size}; use k <= {vocab_size}")
        return torch.cat([part._top_ids(k) for part in self._parts()])

    def log_probs(self, ids: Tensor) -> Tensor:
        """Log-probabilities over the full vocabulary of ids (N, K), as (N, K)."""
        chunks = ids.split(self._chunk_size)
        return torch.cat([part._probs(chunk).log_() for part, chunk in zip(self._parts(), chunks, strict=True)])

    def full(self) -> Tensor:
        """All log-probabilities: (N, V)."""
        vocabulary = torch.arange(self._table.vocab_size, device=self._rows.device)
        return self.log_probs(vocabulary.expand(len(self._rows), -1))

    @property
    def _chunk_size(self) -> int:
        """Positions at a time: for a sparse table as if its work were that of the largest dense one."""
        return max(1, CHUNK_ENTRIES // min(self._table.vocab_size, DENSE_VOCABULARY))

    def _parts(self) -> Iterator["NgramOpinion"]:
        """This opinion, or pieces of it of _chunk_size positions."""
        if len(self._rows) <= self._chunk_size:
            yield self
            return
        for start in range(0, len(self._rows), self._chunk_size):
            yield self.rows(start, start + self._chunk_size)

    @cached_property
    def _dense(self) -> Tensor:
        """All probabilities (N, V) from a dense table, which top_ids and log_probs share."""
        assert isinstance(self._table, DenseTable)
        p = self._table.mix(self._rows, self._weights).add_(self._floor[:, None])
        if self._gold is not None:
            gold, p_gold = self._gold
            p.scatter_(1, gold[:, None], p_gold[:, None])
        return p

    def _probs(self, ids: Tensor) -> Tensor:
        if isinstance(self._table, DenseTable):
            return self._dense.gather(1, ids)
        p = self._table.mix_at(self._rows, self._weights, ids).add_(self._floor[:, None])  # (N, K)
        if self._gold is not None:
            gold, p_gold = self._gold
            p = torch.where(ids == gold[:, None], p_gold[:, None], p)
        return p

    def _top_ids(self, k: int) -> Tensor:
        if isinstance(self._table, DenseTable):
            return top_ids(self._dense, k)
        m = k if self._gold is None else k + SPARE
        ids, p = self._table.candidates(self._rows, self._weights, m)  # (N, J, m + 1)
        p += self._floor[:, None, None]
        if self._gold is not None:
            gold, p_gold = self._gold[0].int(), self._gold[1]
            p = torch.where(ids == gold[:, None, None], -torch.inf, p)
            ids[:, 0, m], p[:, 0, m] = gold, p_gold  # in the last column, which is free
        ids = ids.flatten(1).long()  # (N, J (m + 1))
        return ids.gather(1, _best(p.flatten(1), ids, k))


def _best(p: Tensor, ids: Tensor, k: int) -> Tensor:
    """Columns of the k largest of p (N, C), best first, of equals the lowest of ids (N, C): (N, k).

    torch.topk leaves ties open; pairs (p, lowest id) never tie, and floats >= 0 sort like their bits.
    """
    rank = (p.view(torch.int32).long() << 32) - ids  # (N, C)
    return rank.topk(k).indices
