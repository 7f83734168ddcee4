"""From two experts to one reward for every action (DESIGN section 3, steps 2 to 4).

Reality knows which token came next; the critic knows which tokens were plausible. Their weighted geometric
mean over the action set is the consensus (or, to compare, their arithmetic one), and what remains of it after
sparsifying and normalising is the reward. Rewards are constants for the policy: nothing here is differentiated.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from avatarl.action_space import ActionSet

CRITIC_FLOOR = math.log(1e-9)  # what the critic gives a token at the least, so that no veto is absolute
TINY = 1e-30  # beside weights of 0, so that two experts without a vote have half of it each

Weight = float | Tensor


def log(weight: Weight) -> Weight:
    """Natural logarithm of a plain number or of a 0-d tensor."""
    return weight.log() if isinstance(weight, Tensor) else math.log(weight)


def reality_log_probs(valid: Tensor, epsilon: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """log p_r over A: 1 − ε on gold (column 0), ε shared equally by the rest; (N, K). Alone, gold has it all."""
    others = valid.sum(-1, keepdim=True, dtype=dtype) - 1  # (N, 1)
    rest = log(epsilon) - others.clamp(min=1).log()  # (N, 1)
    gold = (others > 0).to(dtype) * log(1 - epsilon)
    return torch.cat((gold, rest.expand(-1, valid.shape[1] - 1)), dim=-1)  # (N, K)


def consensus(
    actions: ActionSet,
    critic_log_probs: Tensor,
    *,
    reality_weight: Weight,
    critic_weight: Weight,
    epsilon: Weight,
    mean: Literal["geometric", "arithmetic"] = "geometric",
) -> Tensor:
    """Normalised weighted mean of the two experts over A: (N, K), rows sum to 1, 0 where invalid.

    critic_log_probs (N, K) belong to actions.ids and are normalised over the full vocabulary. The weights are
    numbers, 0-d tensors, or (N, 1) where positions differ; ε is a number or a 0-d tensor. geometric: DESIGN section 3,
    steps 2 and 3, a logarithmic opinion pool; arithmetic: a linear one (Stone, 1961), of the critic renormalised over
    A, in which only the weights' ratio counts. Raises ValueError for another mean.
    """
    critic = critic_log_probs if critic_log_probs.dtype == torch.float64 else critic_log_probs.float()
    critic = critic.clamp(min=CRITIC_FLOOR)
    reality = reality_log_probs(actions.valid, epsilon, critic.dtype)  # (N, K)
    hidden = ~actions.valid
    if mean == "geometric":
        return (reality_weight * reality + critic_weight * critic).masked_fill(hidden, float("-inf")).softmax(-1)
    if mean == "arithmetic":
        share = (reality_weight + TINY) / (reality_weight + critic_weight + 2 * TINY)
        plausible = critic.masked_fill(hidden, float("-inf")).softmax(-1)
        return share * reality.exp().masked_fill(hidden, 0.0) + (1 - share) * plausible
    raise ValueError(f"mean = {mean!r}: use geometric or arithmetic")


def gold_alone(p_ref: Tensor, where: Tensor) -> Tensor:
    """The consensus (N, K), but all of it on gold at the positions `where` (N,)."""
    gold = torch.zeros_like(p_ref)
    gold[:, 0] = 1.0
    return torch.where(where[:, None], gold, p_ref)


def rewards(
    p_ref: Tensor,
    valid: Tensor,
    *,
    sparsify: Literal["above_mean", "none"],
    normalize: Literal["cap", "sum"],
    reward_scale: float,
    reward_cap: float,
) -> Tensor:
    """Reward of every action: (N, K), 0 where invalid. DESIGN section 3, step 4.

    above_mean keeps an action only where p_ref > 1/|A|, and gold alone where nothing is. cap multiplies by
    `reward_scale` and shrinks a position whose largest reward exceeds `reward_cap` onto it; sum makes the
    rewards of a position sum to 1. Raises ValueError for an unknown switch.
    """
    kept = p_ref * valid  # (N, K)
    if sparsify == "above_mean":
        # The margin keeps a uniform consensus from passing its own mean by rounding.
        over = p_ref * valid.sum(-1, keepdim=True) > 1 + 8 * torch.finfo(p_ref.dtype).eps  # (N, K)
        over = over & valid
        over[:, 0] |= ~over.any(-1)
        kept = kept * over
    elif sparsify != "none":
        raise ValueError(f"sparsify = {sparsify!r}: use above_mean or none")
    if normalize == "cap":
        kept = kept * reward_scale
        return kept * (reward_cap / kept.amax(-1, keepdim=True)).clamp(max=1.0)
    if normalize == "sum":
        return kept / kept.sum(-1, keepdim=True)
    raise ValueError(f"normalize = {normalize!r}: use cap or sum")
