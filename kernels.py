"""Causal attention for CPUs out of plain matrix products, a block of queries at a time.

It takes about half the time of PyTorch's flash attention for CPUs in bfloat16, where the CPU multiplies that, and three
quarters to nine tenths in float32:
`python bench.py --parts kernels`.
"""

from typing import Any

import torch
from torch import Tensor

QUERY_BLOCK = 64  # queries that share one product with all keys up to the last of them
LONGEST_BLOCKED = 512  # beyond it the kept probabilities, T² / 2 a head, take too much memory


class BlockedAttention(torch.autograd.Function):
    """Causal attention of q, k, v (B, H, T, C), a block of queries at a time over the keys that it may see.

    All products run in q's type; the probabilities of every block are kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape, scale = q.shape, q.shape[-1] ** -0.5
        q, k, v = (t.reshape(-1, *shape[2:]) for t in (q, k, v))  # (B·H, T, C)
        out, kept = torch.empty_like(q), []
        for start in range(0, shape[2], QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, shape[2])
            mask = q.new_full((stop - start, stop), float("-inf")).triu_(start + 1)
            scores = torch.baddbmm(mask, q[:, start:stop], k[:, :stop].mT, alpha=scale)  # (B·H, block, stop)
            probabilities = scores.softmax(-1)
            out[:, start:stop] = torch.bmm(probabilities, v[:, :stop])
            kept.append(probabilities)
        ctx.save_for_backward(q, k, v, *kept)
        return out.view(shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *kept = ctx.saved_tensors
        shape, scale = grad.shape, q.shape[-1] ** -0.5
        grad = grad.reshape(q.shape)
        by_q, by_k, by_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i, p in enumerate(kept):
            start = i * QUERY_BLOCK
            stop = start + p.shape[1]
            by_p = torch.bmm(grad[:, start:stop], v[:, :stop].mT)
            by_scores = torch._softmax_backward_data(by_p, p, -1, p.dtype).mul_(scale)
            by_q[:, start:stop] = torch.bmm(by_scores, k[:, :stop])
            by_k[:, :stop] += torch.bmm(by_scores.mT, q[:, start:stop])
            by_v[:, :stop] += torch.bmm(p.mT, grad[:, start:stop])
        return by_q.view(shape), by_k.view(shape), by_v.view(shape)


def blocked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q, k, v (B, H, T, C): (B, H, T, C), without dropout. Meant for T up to LONGEST_BLOCKED."""
    with torch.autocast(q.device.type, enabled=False):
        return BlockedAttention.apply(q, k, v)
