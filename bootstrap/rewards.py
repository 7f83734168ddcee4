"""What a character is worth: the terms of the reward, each over all V actions of every decision at once.

Exploration that is exhaustive needs every action's reward, and samples take theirs from the same numbers. All terms
lie in [0, 1]; their weighted sum is the reward (DESIGN section 8, Reward terms). Nothing here is learned, and nothing
loops over positions, samples or actions.

Shapes: B rows of L tokens, N decisions, V vocabulary, M contexts, H horizon, G samples.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bootstrap.ngrams import NgramTables, row_offsets


def exact_match(gold: Tensor, vocab_size: int) -> Tensor:
    """The hard signal: 1 for the token that came next. (…) int64 → (…, V) float32."""
    return F.one_hot(gold, vocab_size).float()


def credit_table(tables: NgramTables, shares: Sequence[float], kind: Literal["relative", "raw"]) -> NgramTables:
    """What n-grams would give an action, Σ_n share_n · c_n(a), laid out as the tables are: looked up in one gather.

    Order n looks at the last n − 1 tokens; shares of the orders 1, 2, … are normalised, and where fewer tokens can be
    seen, the longest order that they allow stands for those above it. relative: c_n = p_n(a) / max_b p_n(b), so that
    the likeliest action has full credit in a flat distribution as in a peaked one; raw: c_n = p_n(a).
    """
    vocab_size, longest = tables.vocab_size, len(shares) - 1
    offsets, total = row_offsets(vocab_size, longest), sum(shares)
    credit = tables.table.new_empty(offsets[-1], vocab_size)
    below = tables.table.new_zeros(1, vocab_size)  # Σ over shorter contexts, for every context of the length before
    for n, share in enumerate(shares):
        own = tables.table[offsets[n] : offsets[n + 1]]  # (V^n, V)
        own = own / own.amax(-1, keepdim=True) if kind == "relative" else own
        by_suffix = (len(own) // len(below), *below.shape)  # the first token of a context apart from its suffix
        summed = (own * (share / total)).view(by_suffix).add_(below).view_as(own)
        torch.add(summed, own, alpha=sum(shares[n + 1 :]) / total, out=credit[offsets[n] : offsets[n + 1]])
        below = summed
    return NgramTables(credit, tables.reference, longest)


def confidence_bonus(gold: Tensor, pi: Tensor) -> Tensor:
    """π(gold) for gold, nothing for any other action: only who is right is paid for being sure. pi (…, V) → (…, V)."""
    return exact_match(gold, pi.shape[-1]).to(pi.dtype) * pi


class FullOpinion(Protocol):
    """What a critic thinks at N positions, of the whole vocabulary."""

    def full(self) -> Tensor:
        """All log-probabilities: (N, V)."""


class FullCritic(Protocol):
    """A critic that can be asked about the whole vocabulary at once: statistics are, models are not."""

    def opinion(self, tokens: Tensor, positions: Tensor | None) -> FullOpinion:
        """Judge tokens (B, L); positions (B,) is where they stand in the training stream, or None."""


@torch.no_grad()
def soft_signal(critic: FullCritic, tokens: Tensor, positions: Tensor | None) -> Tensor:
    """The probability of every action by statistics of the text, own occurrences left out: (B, L) → (B, L, V)."""
    return critic.opinion(tokens, positions).full().exp().view(*tokens.shape, -1)


def returns_to_go(rewards: Tensor, discount: float) -> Tensor:
    """What each character of a sample brings, later ones counted by discount^distance: (M, G, H) → (M, G, H)."""
    horizon = rewards.shape[-1]
    if horizon == 1:
        return rewards
    place = torch.arange(horizon, device=rewards.device)
    distance = place - place[:, None]  # (H, H): from a row's character to a column's
    factor = torch.where(distance >= 0, discount ** distance.clamp_min(0).to(rewards.dtype), 0.0)
    return rewards @ factor.to(rewards.dtype).T
