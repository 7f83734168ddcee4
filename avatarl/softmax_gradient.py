"""The loss of logits and its gradient in closed form, a cache-sized tile of positions at a time.

With π = softmax(z) over the full vocabulary, R = Σ_a r(a) and H the entropy, a position's loss and gradient are

    reinforce:  −Σ r log π     R π − r
    expected:   −Σ π r         π (Σ_a π_a r_a − r)
    entropy:    −β H           β π (log π + H)

One softmax serves both, and nothing of size (N, V) is made but the gradient. On a CPU the passes over a tile
find it in the cache; on a GPU with a compiler, torch.compile fuses them into one reduction and one write.
Shapes: n positions, V vocabulary, K actions.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from avatarl.action_space import TILE_ELEMENTS, ActionSet
from avatarl.reward import Weight


class Terms(NamedTuple):
    """What of the settings the loss itself needs."""

    entropy_coef: Weight
    policy_weighting: Literal["reinforce", "expected"]
    use_entropy: bool = True

    @staticmethod
    def of(settings: Any) -> "Terms":
        """From LossSettings or a MethodConfig."""
        return Terms(settings.entropy_coef, settings.policy_weighting, getattr(settings, "use_entropy", True))


def exact(dtype: torch.dtype) -> torch.dtype:
    """The type that logits of `dtype` are computed in: float32, or float64 as it is."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The type that matrix products with `tensor` run in: autocast's where that is on, else its own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """`gradient` times a 0-d factor, in place; on a CPU nothing is done for a factor of 1."""
    if factor.device.type == "cpu" and float(factor) == 1.0:
        return gradient
    return gradient.mul_(factor.to(gradient.dtype))


def log_partition(logits: Tensor) -> Tensor:
    """log Σ_j exp z_j of logits (n, V), in float32 or better: (n, 1).

    On a CPU by tiles and through softmax, which is several times as fast there as torch.logsumexp.
    """
    dtype = exact(logits.dtype)
    if logits.device.type != "cpu":
        return logits.to(dtype).logsumexp(-1, keepdim=True)
    out = logits.new_empty((len(logits), 1), dtype=dtype)
    for part in tiles(logits):
        z = logits[part].to(dtype)
        out[part] = log_partition_from(z, z.softmax(-1))
    return out


def log_partition_from(logits: Tensor, pi: Tensor) -> Tensor:
    """The same from π = softmax(logits): at its largest logit, π is exp(z − log Σ exp z)."""
    return logits.amax(-1, keepdim=True) - pi.amax(-1, keepdim=True).log()


def tiles(logits: Tensor) -> list[slice]:
    """Rows to take at a time: a cache-sized tile on a CPU, all of them elsewhere."""
    n = len(logits)
    size = n if logits.device.type != "cpu" else max(1, TILE_ELEMENTS // max(1, logits.shape[1]))
    return [slice(start, min(start + size, n)) for start in range(0, n, max(1, size))]


def gradient_of_logits(
    logits: Tensor, actions: ActionSet, rewards: Tensor, terms: Terms, out: Tensor | None, scale: float
) -> Tensor:
    """`scale` times the loss summed over positions, 0-d; its gradient by the logits (n, V) goes to `out`.

    `out` may be the logits themselves, and None where no gradient is wanted. Actions and rewards (n, K).
    Raises ValueError for an unknown policy weighting.
    """
    if terms.policy_weighting not in ("reinforce", "expected"):
        raise ValueError(f"policy_weighting = {terms.policy_weighting!r}: use reinforce or expected")
    rewards = rewards * actions.valid
    of_tile = _compiled() if logits.is_cuda and has_triton() else _tile
    total = torch.zeros((), dtype=exact(logits.dtype), device=logits.device)
    for part in tiles(logits):
        loss, gradient = of_tile(logits[part], actions.ids[part], rewards[part], terms, out is not None, scale)
        total += loss
        if out is not None:
            out[part] = gradient  # type: ignore[assignment]
    return total


def _tile(
    logits: Tensor, ids: Tensor, rewards: Tensor, terms: Terms, wanted: bool, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Loss summed over n positions and, where `wanted`, its gradient (n, V), both times `scale`."""
    z = logits.to(exact(logits.dtype))
    rewards = rewards.to(z.dtype)
    pi = z.softmax(-1)  # (n, V)
    log_z = log_partition_from(z, pi)  # (n, 1)
    log_pi_a = z.gather(-1, ids) - log_z  # (n, K)
    if terms.policy_weighting == "expected":
        rewards = rewards * log_pi_a.exp()
        gain = rewards.sum(-1, keepdim=True)  # (n, 1)
        pull = gain
    else:
        gain, pull = (rewards * log_pi_a).sum(-1, keepdim=True), rewards.sum(-1, keepdim=True)
    loss = -gain.sum()
    if terms.use_entropy:
        weighted = (z - log_z).mul_(pi)  # (n, V): π log π
        entropy = -weighted.sum(-1, keepdim=True)  # (n, 1)
        loss = loss - terms.entropy_coef * entropy.sum()
        pull = pull + terms.entropy_coef * entropy
    if not wanted:
        return loss * scale, None
    gradient = pi.mul_(pull * scale)
    if terms.use_entropy:
        gradient.add_(weighted.mul_(terms.entropy_coef * scale))
    return loss * scale, gradient.scatter_add_(-1, ids, rewards * -scale)


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The tile's work as fused GPU kernels."""
    return torch.compile(_tile)
