"""Per-position trust: the critic has less weight where training text shows that it is too sure (DESIGN section 3).

    trust = fit_trust(critic, tokens, vocab_size, block_size)              # a number for every bucket
    w_r, w_c = trust.shares(opinion, log_p_best, w_r, w_c)                  # (N, 1) each, their sum as before

Positions fall into buckets by what the critic knows about itself there: how often it has seen the context that it
speaks from, where it counts contexts, else the probability of its favourite. A bucket's trust t is the exponent in
[0, 1] whose softmax(t · log p_c) predicts the bucket's text best: 1 where no flattening helps, less where the critic
bets more than it knows, 0 where it knows nothing. The consensus then takes w_c · t from the critic and gives
w_c · (1 − t) to reality. An exponent per bucket is how products of experts are weighed (Klakow, 1998).

The text is the critic's own training text. Statistics leave each position's occurrence out, which is kinder than new
text; a frozen model cannot, so the better it remembers, the more it is trusted (cross-fitting helps).
Shapes: N positions, V vocabulary, T the window.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from avatarl.critics import Critic, CriticOpinion
from data.batches import window_count

BUCKETS = 16  # of evidence: seen 1, 2, 3–4, 5–8, … times; of confidence: sixteenths
EXPONENTS = 21  # tried, evenly from 0 to 1
FIT_ENTRIES = 2**29  # log-probabilities that the fit looks at, times EXPONENTS exponentials
FIT_POSITIONS = 2**15
ASKED = 2**11  # positions that the critic is asked about at a time
CHUNK_ENTRIES = 2**22
FEWEST = 100  # positions that a bucket needs for a trust of its own; with fewer it has that of all together


@runtime_checkable
class Counted(Protocol):
    """An opinion that knows how often it has seen what it speaks from."""

    def evidence(self) -> Tensor:
        """How often the longest context that was seen was seen: (N,), 1 or more."""


def bucket_of(opinion: CriticOpinion, log_p_best: Tensor) -> Tensor:
    """The bucket (N,) of every position, in [0, BUCKETS); log_p_best (N,) is the log-probability of the favourite."""
    if isinstance(opinion, Counted):
        found = opinion.evidence().clamp_min(1).log2().ceil()
    else:
        found = (log_p_best.exp() * BUCKETS).floor()
    return found.clamp(0, BUCKETS - 1).long()


@dataclass(frozen=True)
class Trust:
    """The trust of every bucket: (BUCKETS,) float32, in [0, 1]."""

    table: Tensor

    def at(self, opinion: CriticOpinion, log_p_best: Tensor) -> Tensor:
        """Trust at N positions: (N, 1)."""
        return self.table[bucket_of(opinion, log_p_best)][:, None]

    def shares(
        self, opinion: CriticOpinion, log_p_best: Tensor, reality_weight: float | Tensor, critic_weight: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Reality's and the critic's weight at N positions, (N, 1) each: what the critic loses, reality gets."""
        trust = self.at(opinion, log_p_best)
        return reality_weight + critic_weight * (1 - trust), critic_weight * trust


@torch.no_grad()
def fit_trust(
    critic: Critic, tokens: np.ndarray, vocab_size: int, block_size: int, device: torch.device | str = "cpu"
) -> Trust:
    """The trust of every bucket on windows of the critic's training text (L,), the same for the same arguments.

    Windows start at multiples of T, where a cached critic has an answer.
    """
    limit = max(block_size, min(FIT_POSITIONS, FIT_ENTRIES // (vocab_size * EXPONENTS)))
    windows = window_count(len(tokens), block_size)
    draw = torch.Generator().manual_seed(0)
    starts = block_size * torch.randperm(windows, generator=draw)[: max(1, limit // block_size)]
    stream = torch.from_numpy(np.stack([tokens[s : s + block_size + 1] for s in starts.tolist()]).astype(np.int64))
    exponents = torch.linspace(0, 1, EXPONENTS, device=device)
    losses = torch.zeros(BUCKETS, EXPONENTS, device=device)
    count = torch.zeros(BUCKETS, device=device)
    together = max(1, ASKED // block_size)
    for rows, at in zip(stream.to(device).split(together), starts.to(device).split(together), strict=True):
        opinion, gold = critic.opinion(rows[:, :-1], at), rows[:, 1:].flatten()
        for start in range(0, len(gold), size := max(1, CHUNK_ENTRIES // vocab_size)):
            stop = min(start + size, len(gold))
            bucket, found = losses_of(opinion.rows(start, stop), gold[start:stop], vocab_size, exponents)
            losses.index_add_(0, bucket, found)
            count += bucket.bincount(minlength=BUCKETS)
    losses = torch.where(count[:, None] < FEWEST, losses.sum(0), losses)
    return Trust(exponents[losses.argmin(-1)])


def losses_of(opinion: CriticOpinion, gold: Tensor, vocab_size: int, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Bucket (n,) and −log softmax(t · log p_c)[gold] for every exponent t (n, EXPONENTS) of n positions."""
    every = torch.arange(vocab_size, device=gold.device).expand(len(gold), -1)
    log_p = opinion.log_probs(every).float()  # (n, V)
    bucket = bucket_of(opinion, log_p.amax(-1))
    partition = torch.stack([(t * log_p).logsumexp(-1) for t in exponents], -1)  # (n, EXPONENTS)
    return bucket, partition - exponents * log_p.gather(-1, gold[:, None])
