"""A suffix array of the training text: p(next | the longest context that was seen), for contexts of any length.

    statistics = SuffixStatistics.build(train_ids, vocab_size)
    counts, lengths = statistics.longest(context)                 # context (N, C) -> (N, V), (N,)
    counts, lengths = statistics.longest(context, places)         # without the occurrence at text[places]
    critic = SuffixCritic(train_ids, vocab_size)                  # avatarl/critics.py's protocol

Sorted by what stands before them, read backwards, all places of the text that follow one context lie side by side:
an interval. The last P tokens before a place fit into one integer (8 of 65 characters, 3 GPT-2 tokens), so that the
intervals of the last 1, 2, … P tokens of all N contexts are found by one binary search; the P tokens before them by
another, inside what was left; and so on. Running counts at every few places turn an interval into counts of the next
token by two look-ups and a little rest. Nothing but the rows of V that are asked for grows with the vocabulary.

At a training position the own occurrence is taken out of every interval *before* it is decided which context is the
longest with others; it is there exactly where the interval holds its place.

Shapes: L tokens of the text, V vocabulary, N contexts of C tokens, J lengths of context; B windows of T.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from avatarl.action_space import top_ids
from avatarl.ngram_counts import Stream, checked_text
from avatarl.ngram_index import look_up
from checks import ConfigError, require

COUNT_ENTRIES = 2**26  # running counts kept: 256 MB of int32 at most
LEAST_STRIDE = 32  # places between them at least: then the rest is about as much work as the two rows of V
CHUNK_ENTRIES = 2**23  # counts that are made at a time
NO_TOKEN = -1


@dataclass(frozen=True)
class SuffixStatistics:
    """Every place of a text, sorted by its context (DESIGN section 8, Statistics).

    Place i is where text[i] stands, after the context text[:i]; its rank is its number in the order of the contexts
    read backwards. Place 0, after nothing, has rank 0.
    """

    text: Tensor  # (L,) int32
    ranks: Tensor  # (L,) int32, by place
    following: Tensor  # (L,) int32, the token at each place, by rank
    keys: tuple[Tensor, ...]  # (L,) int64 each, by rank: the last P tokens of the context, the P before them, …
    running: Tensor  # (⌈L / stride⌉ + 1, V) int32: counts of what stands at ranks below stride · row
    stride: int
    widest: tuple[int, ...]  # the longest interval of contexts of 0, P, 2P, … tokens
    max_context: int

    @staticmethod
    def build(tokens: Stream, vocab_size: int, max_context: int = 32) -> "SuffixStatistics":
        """Sort a text (L,) of ids in [0, vocab_size), whose contexts of up to `max_context` tokens will be asked for.

        A character takes 20 bytes, and 8 more for every P tokens of context. Raises ConfigError for an unusable
        text, one with one distinct token, or where pydivsufsort is not installed.
        """
        require(max_context >= 1, "longest context of the suffix array", max_context, "use 1 or more tokens")
        ids = checked_text(tokens, vocab_size, 0.5, least=2)
        ranked, shared = _sorted_contexts(ids)
        following = ids[ranked].astype(np.int32)
        ranks: np.ndarray = np.empty(len(ids), np.int32)
        ranks[ranked] = np.arange(len(ids))
        stride = max(LEAST_STRIDE, -(-len(ids) * vocab_size // COUNT_ENTRIES))
        row = np.arange(len(ids)) // stride
        blocks = np.bincount(row * vocab_size + following, minlength=(row[-1] + 1) * vocab_size)
        blocks = blocks.reshape(-1, vocab_size).cumsum(0, dtype=np.int32)
        running = np.concatenate([np.zeros((1, vocab_size), np.int32), blocks])
        width = tokens_per_key(vocab_size)
        depths = range(0, max_context, width)
        packed = _packed(ids, vocab_size)
        keys = [packed[np.maximum(ranked - depth, 0)] for depth in depths]  # before place 0 stands nothing: key 0
        return SuffixStatistics(
            text=torch.from_numpy(ids.astype(np.int32)),
            ranks=torch.from_numpy(ranks),
            following=torch.from_numpy(following),
            keys=tuple(map(torch.from_numpy, keys)),
            running=torch.from_numpy(running),
            stride=stride,
            widest=tuple(_widest(shared, depth) for depth in depths),
            max_context=max_context,
        )

    @property
    def vocab_size(self) -> int:
        return self.running.shape[1]

    def to(self, device: torch.device | str) -> "SuffixStatistics":
        """The same on `device`."""
        text, ranks, following, running = (x.to(device) for x in (self.text, self.ranks, self.following, self.running))
        keys = tuple(key.to(device) for key in self.keys)
        return SuffixStatistics(text, ranks, following, keys, running, self.stride, self.widest, self.max_context)

    def intervals(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """First rank and end of the places after the last 0, 1, … tokens of contexts (N, C): (N, J) int64 each.

        J = min(C, max_context) + 1. What the text lacks has an empty interval, and so has every longer context;
        NO_TOKEN, to the left of a context that is shorter than C, never occurs.
        """
        width, bits = tokens_per_key(self.vocab_size), self.vocab_size.bit_length()
        context = context[:, max(0, context.shape[1] - self.max_context) :].flip(1)  # the last token first
        low = context.new_zeros(len(context), 1)
        high = torch.full_like(low, len(self.text))
        lows, highs = [low], [high]
        for keys, widest, part in zip(self.keys, self.widest, context.split(width, 1), strict=False):
            shift = bits * torch.arange(width - 1, width - 1 - part.shape[1], -1, device=part.device)
            start = ((part + 1) << shift).cumsum(1)  # (N, c): the least key with these 1, 2, … c tokens
            bounds = torch.stack((start, start + (1 << shift)))  # (2, N, c)
            low, high = _search(keys, bounds, lows[-1][:, -1:], highs[-1][:, -1:], widest).unbind(0)
            lows.append(torch.where(part >= 0, low, high))  # no key holds a token before the text's first
            highs.append(high)
        return torch.cat(lows, 1), torch.cat(highs, 1)

    def own(self, low: Tensor, high: Tensor, places: Tensor) -> Tensor:
        """Whether intervals (N, J) hold the occurrences at `places` (N,); −1 is nowhere: (N, J) bool."""
        rank = torch.where(places < 0, NO_TOKEN, look_up(self.ranks, places.clamp_min(0)).long())[:, None]
        return (low <= rank) & (rank < high)

    def counts(self, low: Tensor, high: Tensor) -> Tensor:
        """How often each token stands at ranks low … high − 1: (N,) int64 each → (N, V) int32."""
        first = (low + self.stride - 1) // self.stride  # the first row that counts from low on, or later
        last = high // self.stride
        whole = first < last
        rows = [self.running.index_select(0, torch.where(whole, at, 0)) for at in (last, first)]
        counts = rows[0] - rows[1]
        head_end = torch.where(whole, first * self.stride, torch.minimum(high, low + self.stride))
        tail = torch.where(whole, last * self.stride, head_end)
        step = torch.arange(self.stride, device=low.device)
        for start, end in ((low, head_end), (tail, high)):
            rank = start[:, None] + step  # (N, stride)
            inside = rank < end[:, None]
            token = look_up(self.following, rank.clamp_max(len(self.text) - 1)).long()
            counts.scatter_add_(1, token, inside.int())
        return counts

    def longest(self, context: Tensor, places: Tensor | None = None, min_count: int = 1) -> tuple[Tensor, Tensor]:
        """What follows the longest suffix of each context that occurs at least `min_count` times.

        context (N, C) int64 → counts (N, V) int32, length of that suffix (N,) int64. `places` (N,) int64 are those
        whose occurrence is left out, −1 for none. Where not even the empty context has `min_count` places left, it
        is taken all the same.
        """
        low, high = self.intervals(context)
        own = self.own(low, high, places) if places is not None else torch.zeros_like(low, dtype=torch.bool)
        enough = (high - low - own.long()) >= min_count  # falls with the length
        length = (enough.sum(1) - 1).clamp_min(0)
        at = length[:, None]
        counts = self.counts(low.gather(1, at)[:, 0], high.gather(1, at)[:, 0])
        if places is not None:
            self.leave_out(counts, places, own.gather(1, at)[:, 0])
        return counts, length

    def leave_out(self, counts: Tensor, places: Tensor, own: Tensor) -> None:
        """Take the tokens at `places` (N,) out of counts (N, V), in place, where they are the interval's `own` (N,)."""
        gold = look_up(self.text, places.clamp_min(0)).long()
        counts.scatter_add_(1, gold[:, None], -own[:, None].to(counts.dtype))

    def probs(self, context: Tensor, places: Tensor | None = None, min_count: int = 1) -> Tensor:
        """The counts of `longest` as shares: (N, C) → (N, V) float32; zeros where nothing is left to count."""
        counts, _ = self.longest(context, places, min_count)
        return counts / counts.sum(1, keepdim=True).clamp_min(1)


def tokens_per_key(vocab_size: int) -> int:
    """P: how many tokens, or none of them (0), fit into 62 bits."""
    return 62 // vocab_size.bit_length()


def _packed(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """The P tokens before each place (L,), the last one in the highest bits; 0 for what stands before the text."""
    width, bits = tokens_per_key(vocab_size), vocab_size.bit_length()
    packed: np.ndarray = np.zeros(len(ids), np.int64)
    for back in range(1, min(width, len(ids) - 1) + 1):
        packed[back:] += (ids[:-back] + 1) << bits * (width - back)
    return packed


def _search(keys: Tensor, bounds: Tensor, low: Tensor, high: Tensor, widest: int) -> Tensor:
    """The first rank in each [low, high) (N, 1) with at least a key of bounds (2, N, c): (2, N, c).

    Within each interval, of at most `widest`, the keys (L,) rise.
    """
    if widest == len(keys):
        return torch.searchsorted(keys, bounds)
    low, high = (x.expand(bounds.shape) for x in (low, high))
    for _ in range(widest.bit_length()):
        middle = (low + high) >> 1
        right = (look_up(keys, middle.clamp_max(len(keys) - 1)) < bounds) & (low < high)
        low, high = torch.where(right, middle + 1, low), torch.where(right, high, middle)
    return low


def _sorted_contexts(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places (L,) by their contexts read backwards, and how many tokens each shares with the next (L,), 0 at the end.

    The suffixes of the reversed text are those contexts; its last token follows none.
    """
    try:
        from pydivsufsort import divsufsort, kasai
    except ImportError:
        raise ConfigError(
            "the suffix array: pydivsufsort is not installed; run `.venv/bin/pip install pydivsufsort`"
        ) from None
    smallest = np.uint8 if ids.max() < 256 else np.uint16 if ids.max() < 65536 else np.uint32
    backwards = np.ascontiguousarray(ids[:-1][::-1].astype(smallest))
    if len(backwards) == 1:
        return np.arange(2), np.zeros(2, np.int64)
    order = divsufsort(backwards)
    shared = kasai(backwards, order)
    ranked = np.concatenate([[0], len(backwards) - order.astype(np.int64)])  # place 0 shares nothing with anyone
    return ranked, np.concatenate([[0], shared])


def _widest(shared: np.ndarray, length: int) -> int:
    """The size of the largest interval of contexts of `length` tokens, from what neighbours share (L,)."""
    ends = np.flatnonzero(shared < length)  # an interval ends where the next context shares less
    return int(np.diff(ends, prepend=-1).max()) if length else len(shared)


class SuffixCritic:
    """A critic (DESIGN section 3) that blends all contexts that the text holds, the longest speaking first.

    With c the counts after a context of n tokens, C their sum, U how many are above 0 and λ the `backoff`,

        p_n(w) = (c(w) + λ · U · p_{n−1}(w)) / (C + λ · U),     p_{−1} = 1/V,     p_n = p_{n−1} where C = 0:

    Witten and Bell's (1991) estimate for λ = 1, which trusts a context the more, the fewer different tokens followed
    it. That believes long contexts far too soon: the default λ is the one with the best leave-one-out likelihood on
    tinyshakespeare (compared in tests/avatarl/test_suffixes.py). Contexts of up to `max_context` tokens, of the
    window alone. Raises ConfigError for an unusable text or setting.
    """

    def __init__(
        self,
        corpus: Stream,
        vocab_size: int,
        *,
        leave_one_out: bool = True,
        max_context: int = 8,
        backoff: float = 12.0,
        device: torch.device | str = "cpu",
    ) -> None:
        require(backoff > 0, "backoff of the suffix critic", backoff, "use a number above 0; 1 is Witten and Bell's")
        self.statistics = SuffixStatistics.build(corpus, vocab_size, max_context).to(device)
        self.leave_one_out, self.backoff, self.vocab_size = leave_one_out, backoff, vocab_size

    @property
    def reach(self) -> int:
        """The longest context that is used, in tokens."""
        return self.statistics.max_context

    def after(self, context: Tensor) -> "SuffixOpinion":
        """What follows each of contexts (N, C), nothing left out."""
        low, high = self.statistics.intervals(context)
        return SuffixOpinion(self, low, high, torch.full_like(low[:, 0], NO_TOKEN))

    def opinion(self, tokens: Tensor, positions: Tensor | None = None) -> "SuffixOpinion":
        """What follows each of tokens (B, T), N = B·T in row-major order; contexts stay inside the window.

        positions (B,) is the offset of tokens[:, 0] in the corpus, so that gold at (b, t) is
        corpus[positions[b] + t + 1], whose occurrence is left out. None: nothing is left out.
        """
        context = contexts_of(tokens, self.statistics.max_context)
        low, high = self.statistics.intervals(context)
        places = torch.full_like(low[:, 0], NO_TOKEN)
        if positions is not None and self.leave_one_out:
            after = positions[:, None] + torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
            places = torch.where(after < len(self.statistics.text), after, NO_TOKEN).flatten()
        return SuffixOpinion(self, low, high, places)


def contexts_of(tokens: Tensor, longest: int) -> Tensor:
    """The up to `longest` tokens that end at each of tokens (B, T), NO_TOKEN before the first: (B·T, C)."""
    width = min(longest, tokens.shape[1])
    before = tokens.new_full((len(tokens), width - 1), NO_TOKEN)
    return torch.cat((before, tokens), 1).unfold(1, width, 1).flatten(0, 1)


class SuffixOpinion:
    """What the suffix critic thinks at N positions (a CriticOpinion); log-probabilities in nats, float32."""

    def __init__(self, critic: SuffixCritic, low: Tensor, high: Tensor, places: Tensor) -> None:
        self._critic, self._low, self._high, self._places = critic, low, high, places  # (N, J) twice, (N,)

    def rows(self, start: int, stop: int) -> "SuffixOpinion":
        """The opinion at positions start … stop − 1."""
        here = slice(start, stop)
        return SuffixOpinion(self._critic, self._low[here], self._high[here], self._places[here])

    def evidence(self) -> Tensor:
        """How often the longest context that was seen was seen, less the own occurrence: (N,) int64."""
        own = self._critic.statistics.own(self._low, self._high, self._places)
        often = self._high - self._low - own.long()  # (N, J), falling with the length
        longest = (often > 0).sum(1, keepdim=True).clamp_min(1) - 1
        return often.gather(1, longest)[:, 0]

    def top_ids(self, k: int) -> Tensor:
        """The k likeliest tokens, best first, ties to the lowest id: (N, k) int64."""
        return top_ids(self.full(), k)

    def log_probs(self, ids: Tensor) -> Tensor:
        """Log-probabilities over the full vocabulary of ids (N, K), as (N, K)."""
        return self.full().gather(-1, ids)

    def full(self) -> Tensor:
        """All log-probabilities: (N, V)."""
        return self._log_probs

    @cached_property
    def _log_probs(self) -> Tensor:
        size = max(1, CHUNK_ENTRIES // self._critic.vocab_size)
        parts = [self.rows(i, i + size)._blend() for i in range(0, len(self._low), size)]
        return torch.cat(parts).log_()

    def _blend(self) -> Tensor:
        """p of every token, the shortest context first: (N, V)."""
        statistics, backoff = self._critic.statistics, self._critic.backoff
        own = statistics.own(self._low, self._high, self._places)
        p = torch.full((len(self._low), statistics.vocab_size), 1 / statistics.vocab_size, device=self._low.device)
        for j in range(self._low.shape[1]):
            counts = statistics.counts(self._low[:, j], self._high[:, j])
            statistics.leave_out(counts, self._places, own[:, j])
            spread = backoff * (counts > 0).sum(1, keepdim=True)
            total = counts.sum(1, keepdim=True)
            p = torch.where(total > 0, (counts + spread * p) / (total + spread), p)
        return p
