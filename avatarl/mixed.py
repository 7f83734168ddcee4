"""The mixed n-gram critic: every context length is an expert, and what each is worth is learnt from the text.

    critic = MixedCritic(train_ids, vocab_size, context=8)
    opinion = critic.opinion(tokens, positions)     # tokens (B, T), positions (B,): where each window starts

Interpolation (ngram.py) lets the longest context speak first and passes on a discounted rest. Here all lengths
speak at once, as a product of experts:

    log p(w) = b(w) + Σ_n weight_n · log p_n(w) + constant,

p_n being the interpolated n-gram with modified Kneser–Ney's three discounts for counts of 1, 2 and more (Chen and
Goodman, 1998, from raw counts, not continuation counts). weight_n depends on how often the context of n tokens was
seen and by how many different tokens it was followed, b on the token alone. Both are fitted to the training text,
each position judged without its own occurrence. In w the fit is a softmax regression: it has one optimum.

Source: log-linear interpolation (Klakow, 1998), with the confidence buckets of compressors that mix contexts.
Shapes: B windows, T positions, N = B·T, V vocabulary, J = context + 1 lengths, the longest first, the unigram last.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from avatarl.critics import DenseOpinion
from avatarl.mixed_counts import MAX_VOCABULARY, ROOT, UNSEEN, CountTable
from avatarl.ngram_counts import Stream, checked_stream
from avatarl.ngram_index import look_up
from config import require

FIT_POSITIONS = 30_000
FIT_STEPS = 240
FIT_BATCH = 2048
FIT_RATE = 0.03
TOTALS = 13  # buckets of C: 0, 1, 2, 3–4, 5–8, …
KINDS = 4  # buckets of U: 1, 2–3, 4–8, more
MEMORY_BYTES = 2**29
SMALLEST = 1e-9  # a probability that rounding made 0 or less


Experts = Iterator[tuple[int, Tensor, Tensor]]  # which of the J, its log p_n (N, V), and its bucket (N,)


class Gates(NamedTuple):
    """What each expert is worth: `weights` (J, TOTALS · KINDS) by its confidence, and `bias` (V,)."""

    weights: Tensor
    bias: Tensor


class MixedCritic:
    """Judges every token by all contexts of 0 to `context` tokens together.

    corpus (L,): ids of the training stream, in [0, vocab_size). Contexts reach back beyond a window's first token
    where its place in the corpus is known. Building takes seconds for a million characters. Raises ConfigError for
    a corpus or a setting that gives no table.

    remember: what was once said of a position of the corpus is kept (in float16, 2 · L · V bytes, if that is at most
    MEMORY_BYTES) and not thought out again. For training on the corpus's own tokens alone.
    """

    def __init__(
        self,
        corpus: Stream,
        vocab_size: int,
        *,
        context: int = 8,
        leave_one_out: bool = True,
        remember: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        require(context >= 1, "critic.mixed-context", context, "use 1 or more tokens")
        require(
            vocab_size <= MAX_VOCABULARY,
            "critic.kind",
            "mixed",
            f"it scores the whole vocabulary of {vocab_size:,} tokens at every position, and stops at "
            f"{MAX_VOCABULARY:,}; use --critic.kind ngram",
        )
        ids = checked_stream(corpus, vocab_size, 0.5, least=context + 2)
        self.vocab_size, self.context, self.leave_one_out = vocab_size, context, leave_one_out
        self.table = CountTable.build(ids, vocab_size, context).to(device)
        self.corpus = torch.from_numpy(ids).to(device)  # (L,) int64
        self._needed_matches = torch.arange(context, -1, -1, device=device)  # (J,)
        self.gates = self._fit()
        self._memory = self._known = None
        if remember and leave_one_out and 2 * len(ids) * vocab_size <= MEMORY_BYTES:
            self._memory = torch.empty(len(ids), vocab_size, dtype=torch.float16, device=device)
            self._known = torch.zeros(len(ids), dtype=torch.bool, device=device)
            if self._memory.is_cuda:  # there a step must not wait to hear what is known; a CPU learns on the way
                for start in range(0, len(ids), 2**14):
                    self._learn(torch.arange(start, min(start + 2**14, len(ids)), device=device))

    def opinion(self, tokens: Tensor, positions: Tensor | None = None) -> DenseOpinion:
        """What follows each of tokens (B, T), N = B·T in row-major order.

        positions (B,) is the offset of tokens[:, 0] in the corpus: what stands before it there belongs to the
        contexts, and the occurrence of gold at (b, t), corpus[positions[b] + t + 1], is left out of the counts.
        None: contexts stay inside the window and nothing is left out.
        """
        if positions is not None and self._memory is not None:
            places = positions[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
            return DenseOpinion(self._recall(places.flatten()))
        return DenseOpinion(self._mix(self.judged_by_each(tokens, positions)))

    @property
    def reach(self) -> int:
        """The longest context that is used, in tokens."""
        return self.context

    def after(self, context: Tensor) -> DenseOpinion:
        """What follows each of contexts (N, C), nothing left out."""
        rows = self._rows(context, None).unflatten(0, context.shape)[:, -1]  # (N, J)
        return DenseOpinion(self._mix(self._experts(rows, None, None)))

    def judged_by_each(self, tokens: Tensor, positions: Tensor | None) -> Experts:
        """What every expert thinks of tokens (B, T), the shortest context first; arguments as of `opinion`."""
        own = gold = None
        if positions is not None and self.leave_one_out:
            gold, own = self._own_occurrence(tokens, positions)
        return self._experts(self._rows(tokens, positions), gold, own)

    def _recall(self, places: Tensor) -> Tensor:
        """Log-probabilities (n, V) of what follows the corpus's tokens at `places` (n,), remembered or made now."""
        assert self._memory is not None and self._known is not None
        if not places.is_cuda:
            new = places[~self._known[places]]
            if len(new):
                self._learn(new)
        return self._memory.index_select(0, places).float()

    def _learn(self, places: Tensor) -> None:
        """Judge the corpus's tokens at `places` (n,), and remember it."""
        assert self._memory is not None and self._known is not None
        self._memory[places] = self._mix(self.judged_by_each(self.corpus[places][:, None], places)).half()
        self._known[places] = True

    def _mix(self, experts: Experts) -> Tensor:
        """The product of the experts, each weighed by its confidence: log-probabilities (N, V)."""
        score = self.gates.bias
        for j, log_p, bucket in experts:
            score = torch.addcmul(score, self.gates.weights[j][bucket][:, None], log_p)
        return score.log_softmax(-1)

    def _experts(self, rows: Tensor, gold: Tensor | None, own: Tensor | None) -> Experts:
        """Yields (j, log p_n (N, V), bucket (N,)) for every length, the shortest first."""
        table, n = self.table, len(rows)
        p = torch.full((n, self.vocab_size), 1 / self.vocab_size, device=rows.device)
        for j in reversed(range(rows.shape[1])):
            row, length = rows[:, j], rows.shape[1] - 1 - j
            total, kinds, held = (look_up(part, row) for part in (table.totals, table.kinds, table.held))  # (N,) each
            if own is not None and gold is not None:
                count = table.count_of(row, gold) * own[:, j]
                without = table.discount(length, count) - table.discount(length, (count - 1).clamp_min(0))
                total, kinds, held = total - own[:, j], kinds - own[:, j] * (count == 1), held - without
            seen = total > 0
            scale = seen / total.clamp_min(1)
            p.mul_(torch.where(seen, held * scale, 1.0)[:, None])
            table.add_mass(p, row, scale, length)
            if own is not None and gold is not None:
                p.scatter_add_(1, gold[:, None], ((without - own[:, j]) * scale)[:, None])
            p.clamp_min_(SMALLEST)
            yield j, p.log(), buckets(total, kinds)

    def _rows(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """The row of every context that ends in each token: (B, T) → (N, J) int64."""
        batch, n = tokens.shape[0], self.context
        before = torch.full((batch, n), self.vocab_size, device=tokens.device)  # no token: no context
        if positions is not None:
            places = positions[:, None] + torch.arange(-n, 0, device=tokens.device)
            before = torch.where(places >= 0, self.corpus[places.clamp(0, len(self.corpus) - 1)], before)
        stream = torch.cat((before, tokens), 1)  # (B, n + T)
        rows = stream.new_full((batch, stream.shape[1] + 1, n + 1), UNSEEN)
        rows[..., -1] = ROOT
        for j in reversed(range(n)):
            rows[:, 1:, j] = self.table.step(rows[:, :-1, j + 1], stream)
        return rows[:, n + 1 :].flatten(0, 1)

    def _own_occurrence(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Gold (N,) int64 and, as 0 or 1, which rows counted it after this very context: (N, J) float32."""
        last = len(self.corpus) - 1
        place = torch.arange(tokens.shape[1], device=tokens.device)
        here = positions[:, None] + place  # (B, T)
        gold = self.corpus[(here + 1).clamp_max(last)]
        mismatch = torch.where(tokens == self.corpus[here.clamp_max(last)], -1 - self.context, place)
        matches = place - mismatch.cummax(1).values  # how many tokens up to here are the corpus's own
        matches = torch.minimum(matches, here + 1)  # none stand before the first
        matches = torch.where(here < last, matches, -1)  # past its end there is no gold
        own = matches.view(-1, 1) >= self._needed_matches
        return gold.view(-1), own.float()

    def _fit(self) -> Gates:
        """The gates with the best leave-one-out likelihood on a sample of the corpus, by Adam from a fixed seed."""
        device, length = self.corpus.device, len(self.corpus)
        draw = torch.Generator().manual_seed(0)
        count = min(FIT_POSITIONS, length - self.context - 1)
        places = (torch.randperm(length - self.context - 1, generator=draw)[:count] + self.context).to(device)
        features, slots = self._features(places)
        gold = self.corpus[places + 1]
        weights = torch.zeros(self.context + 1, TOTALS * KINDS, device=device)
        weights[0] = 0.5
        bias = torch.zeros(self.vocab_size, device=device)
        parameters = [weights.requires_grad_(), bias.requires_grad_()]
        adam = torch.optim.Adam(parameters, lr=FIT_RATE)
        offset = torch.arange(self.context + 1, device=device) * (TOTALS * KINDS)
        with torch.enable_grad():
            for step in range(FIT_STEPS):
                adam.param_groups[0]["lr"] = FIT_RATE * (1 - step / FIT_STEPS)
                pick = torch.randint(count, (FIT_BATCH,), generator=draw).to(device)
                w = weights.view(-1)[slots[pick] + offset]  # (n, J)
                score = torch.bmm(w[:, None], features[pick])[:, 0] + bias
                loss = torch.nn.functional.cross_entropy(score, gold[pick])
                adam.zero_grad()
                loss.backward()
                adam.step()
        return Gates(weights.detach(), bias.detach())

    @torch.no_grad()
    def _features(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """log p_n (n, J, V) and buckets (n, J) of the tokens at `places` (n,), leave-one-out."""
        features = torch.empty(len(places), self.context + 1, self.vocab_size, device=places.device)
        slots = torch.empty(len(places), self.context + 1, dtype=torch.int64, device=places.device)
        for start in range(0, len(places), 4096):
            part = slice(start, start + 4096)
            for j, log_p, bucket in self.judged_by_each(self.corpus[places[part]][:, None], places[part]):
                features[part, j], slots[part, j] = log_p, bucket
        return features, slots


def buckets(totals: Tensor, kinds: Tensor) -> Tensor:
    """The bucket (N,) of contexts seen `totals` times and followed by `kinds` different tokens (N,)."""
    by_total = torch.where(totals > 0, totals.clamp_min(1).log2().ceil() + 1, 0.0).clamp_max(TOTALS - 1)
    by_kinds = (kinds > 1).float() + (kinds > 3) + (kinds > 8)
    return (by_total * KINDS + by_kinds).long()
