"""The attention of kernels.py against PyTorch's own, forward and backward, on a CPU."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.table import Table
from benchmarks.timing import Arm, Conditions, measure, settle
from benchmarks.trainers import Shape
from kernels import blocked_attention

SHAPES = (Shape(4, 128, 4, 64, 12), Shape(3, 128, 2, 128, 16), Shape(6, 384, 6, 256, 8))
EXACT = "PyTorch, float32"
HALF = torch.bfloat16


def tables(conditions: Conditions, shapes: Sequence[Shape] = SHAPES) -> Iterator[Table]:
    """For each shape: one layer's attention."""
    if conditions.device.type != "cpu":
        yield Table("Kernels for CPUs", notes=["skipped: a GPU uses PyTorch's or flash-attn's"])
        return
    settle(conditions)
    for shape in shapes:
        yield attention(shape, conditions, 1 / len(shapes))


def arm(name: str, call: Callable[..., Tensor], parts: list[Tensor], gradient: Tensor) -> Arm:
    """Forward and backward of call(*parts); ratios are to PyTorch's float32."""

    def run() -> None:
        call(*parts).backward(gradient)
        for part in parts:
            part.grad = None

    return Arm(name, run, [] if name == EXACT else [EXACT])


def leaves(count: int, size: tuple[int, ...], seed: int) -> dict[torch.dtype, list[Tensor]]:
    """`count` random tensors in float32 and the same in bfloat16, and as many gradients' worth of room."""
    draw = torch.Generator().manual_seed(seed)
    values = [torch.randn(size, generator=draw) for _ in range(count)]
    return {d: [v.to(d, copy=True).requires_grad_() for v in values] for d in (torch.float32, HALF)}


def attention(shape: Shape, conditions: Conditions, share: float) -> Table:
    """Causal attention of one layer: (B, H, T, C)."""
    size = (shape.batch, shape.heads, shape.block, shape.width // shape.heads)
    parts = leaves(3, size, conditions.seed)
    gradient = {d: torch.ones(size, dtype=d) for d in parts}

    def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def cast(*half: Tensor) -> Tensor:
        return own(*(t.float() for t in half)).to(HALF)

    full = torch.float32
    arms = [
        arm(EXACT, own, parts[full], gradient[full]),
        arm("PyTorch, bfloat16", own, parts[HALF], gradient[HALF]),
        arm("PyTorch, bfloat16 cast to float32", cast, parts[HALF], gradient[HALF]),
        arm("blocked, float32", blocked_attention, parts[full], gradient[full]),
        arm("blocked, bfloat16", blocked_attention, parts[HALF], gradient[HALF]),
    ]
    table = measure(
        f"Attention of one layer, {size} (batch, heads, positions, head width)", arms, conditions, share=share
    )
    table.facts = {"shape": vars(shape)}
    return table
