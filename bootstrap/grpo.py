"""GRPO for one-step decisions: group advantages, the clipped ratio, KL to a reference, entropy held in a band.

All of it per decision, so that a mean over decisions is the same however a batch is split. Advantages are normalised
inside a context's group (DESIGN section 8; GRPO: Shao et al., 2024; the clip: Schulman et al., 2017). Left out of
GRPO as commonly written: the sampled estimate of the KL. The vocabulary is small, and the sum over it is exact.

Shapes: N contexts, G actions of a group, V vocabulary.
"""

from typing import Literal

import torch
from torch import Tensor

from avatarl.reward import Weight

SPREAD_FLOOR = 1e-6  # added to a group's standard deviation: equal rewards give advantages of 0


def group_advantages(rewards: Tensor) -> Tensor:
    """(r − mean) / (standard deviation + 1e-6) inside each group, the population's: (…, G) → (…, G).

    Raises ValueError for groups of one, which have nothing to be compared with.
    """
    if rewards.shape[-1] < 2:
        raise ValueError("a group of one has no spread to normalise over; use at least 2 samples")
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True).sqrt() + SPREAD_FLOOR)


def clipped_gain(now: Tensor, old: Tensor, advantages: Tensor, clip_ratio: float) -> Tensor:
    """min(ρ Â, clip(ρ, 1 ± c) Â) with ρ = exp(now − old), both log-probabilities of the same actions: elementwise."""
    ratio = (now - old).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * advantages)


def exhaustive_gain(log_pi: Tensor, rewards: Tensor, weighting: Literal["reinforce", "expected"]) -> Tensor:
    """Of all actions at once: Σ_a r log π (weights free of π), or Σ_a π r (the policy's expected reward).

    log π and rewards (…, V), rewards constant: (…).
    """
    return (rewards * (log_pi if weighting == "reinforce" else log_pi.exp())).sum(-1)


def kl_to(log_pi: Tensor, log_reference: Tensor) -> Tensor:
    """KL(π ‖ reference) in nats, summed over the vocabulary: (…, V) both → (…)."""
    return (log_pi.exp() * (log_pi - log_reference)).sum(-1)


def entropy_of(log_pi: Tensor) -> Tensor:
    """H[π] in nats: (…, V) → (…)."""
    return -(log_pi.exp() * log_pi).sum(-1)


def outside_band(entropy: Tensor, low: float, high: float, bonus: Weight, penalty: Weight) -> Tensor:
    """What a decision's entropy (…) costs outside [low, high]; 0 inside, and above where `high` is 0.

    Below, bonus · (low − H): more entropy is rewarded until the edge. Above, penalty · (H − high).
    """
    cost = bonus * (low - entropy).clamp_min(0)
    return cost + penalty * (entropy - high).clamp_min(0) if high else cost
