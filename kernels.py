"""Two operations that PyTorch does slowly on a CPU, done with the ones that it does fast.

GELU's tanh costs five times a sigmoid there, and flash attention for CPUs reaches a third of the speed of the
matrix products that it consists of. `python bench.py --parts kernels` times both against PyTorch's own.
Neither supports double backward.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# tanh-GELU is x · sigmoid(x · (SLOPE + CUBIC x²)), since ½ (1 + tanh u) = sigmoid(2u).
SLOPE = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * SLOPE
GELU_CHUNK = 2**17  # elements whose float32 intermediates stay in the cache
QUERY_BLOCK = 64  # queries that share one product with all keys up to the last of them
LONGEST_BLOCKED = 512  # beyond it the kept probabilities, T² / 2 a head, outweigh the speed


class FastGelu(torch.autograd.Function):
    """tanh-GELU of x of any shape; the derivative is made on the way and kept in place of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        flat = x.reshape(-1)
        out = torch.empty_like(flat)
        slope = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        constant = torch.tensor(SLOPE)
        for start in range(0, flat.numel(), GELU_CHUNK):
            part = slice(start, start + GELU_CHUNK)
            x32 = flat[part].float()
            inner = torch.add(constant, x32 * x32, alpha=CUBIC)
            gate = (inner * x32).sigmoid_()
            y = x32 * gate
            out[part] = y
            if slope is not None:
                # y' = gate + y (1 − gate) (SLOPE + 3 CUBIC x²), and that bracket is 3 inner − 2 SLOPE
                rest = torch.addcmul(y, y, gate, value=-1)
                slope[part] = gate.addcmul_(rest, inner.sub_(2 / 3 * SLOPE), value=3)
        ctx.save_for_backward(slope)
        return out.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return grad * slope.view(grad.shape)


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


def plain_gelu(x: Tensor) -> Tensor:
    """tanh-GELU of x by PyTorch."""
    return F.gelu(x, approximate="tanh")


def fast_gelu(x: Tensor) -> Tensor:
    """tanh-GELU of x, of any shape, in float32 or less, for CPUs."""
    return FastGelu.apply(x)


def blocked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q, k, v (B, H, T, C): (B, H, T, C), without dropout. Meant for T up to LONGEST_BLOCKED."""
    with torch.autocast(q.device.type, enabled=False):
        return BlockedAttention.apply(q, k, v)
