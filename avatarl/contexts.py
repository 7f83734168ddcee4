"""Student-picked contexts: the policy reads what it would have written (DESIGN section 3, step 8).

Draws come from a counter-based hash of (seed, step, sequence, position) instead of a generator: the same on
any device, for any split of a batch among processes, and after a resume.
"""

import torch
from torch import Tensor

from avatarl.action_space import ActionSet

_MIX_1, _MIX_2 = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # splitmix64's multipliers as signed integers


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele, Lea, Flood, 2014) on int64, whose products wrap."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def keyed_uniform(seed: int, step: int, indices: Tensor, length: int, stream: int) -> Tensor:
    """Uniform draws in [0, 1) for sequences with global `indices` (B,): (B, length) float32.

    `stream` separates draws for different purposes at the same place.
    """
    start = torch.full_like(indices, seed)
    for part in (step, stream):
        start = _mix(start + 0x1E3779B97F4A7C15 + part)
    place = torch.arange(length, device=indices.device)  # (T,)
    bits = _mix(_mix(start + indices).unsqueeze(-1) + place)  # (B, T)
    return ((bits >> 40) & 0xFFFFFF).float() / float(1 << 24)


def sample_actions(log_pi_a: Tensor, actions: ActionSet, uniform: Tensor) -> Tensor:
    """One token per position from π restricted to A, by inverting its distribution: (N,) int64.

    log_pi_a (N, K) log-probabilities of actions.ids; uniform (N,) in [0, 1).
    """
    weights = log_pi_a.float().exp() * actions.valid
    ladder = weights.cumsum(-1)  # (N, K)
    column = (ladder <= (uniform * ladder[:, -1]).unsqueeze(-1)).sum(-1, keepdim=True)
    # Rounding can point past the last valid column: fall back on gold.
    column = torch.where(column < weights.shape[1], column, 0)
    column = torch.where(actions.valid.gather(-1, column), column, 0)
    return actions.ids.gather(-1, column).squeeze(-1)


def replace_context(tokens: Tensor, picks: Tensor, replaced: Tensor) -> Tensor:
    """Tokens (B, T) where `replaced` (B, T) puts the pick made one position earlier; the first token stays."""
    shifted = torch.cat((tokens[:, :1], picks[:, :-1]), dim=1)  # (B, T): the pick that predicts each token
    return torch.where(replaced, shifted, tokens)
