"""On a CPU, forward and backward: the attention of kernels.py against PyTorch's own, and the model's activations."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.table import Table
from benchmarks.timing import Arm, Conditions, measure, settle
from benchmarks.trainers import Shape
from kernels import blocked_attention
from model import ACTIVATIONS

SHAPES = (Shape(4, 128, 4, 64, 12), Shape(3, 128, 2, 128, 16), Shape(6, 384, 6, 256, 8))
EXACT = "PyTorch, float32"
HALF = torch.bfloat16


def tables(conditions: Conditions, shapes: Sequence[Shape] = SHAPES) -> Iterator[Table]:
    """For each shape: one layer's attention, and its activation."""
    if conditions.device.type != "cpu":
        yield Table("Kernels for CPUs", notes=["skipped: a GPU uses PyTorch's or flash-attn's"])
        return
    settle(conditions)
    for shape in shapes:
        yield attention(shape, conditions, 0.7 / len(shapes))
        yield activations(shape, conditions, 0.3 / len(shapes))


def arm(name: str, call: Callable[..., Tensor], parts: list[Tensor], gradient: Tensor, base: str = EXACT) -> Arm:
    """Forward and backward of call(*parts); ratios are to the arm `base`."""

    def run() -> None:
        call(*parts).backward(gradient)
        for part in parts:
            part.grad = None

    return Arm(name, run, [] if name == base else [base])


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


def activations(shape: Shape, conditions: Conditions, share: float) -> Table:
    """What stands between the two linear layers of a block: (B · T, 4 D), each choice of model.activation."""
    size = (shape.batch * shape.block, 4 * shape.width)
    (values,) = leaves(1, size, conditions.seed)[torch.float32]
    gradient = torch.ones(size)
    arms = [arm(name, call, [values], gradient, base="gelu") for name, call in ACTIVATIONS.items()]
    table = measure(f"Activation of one layer, {size}, float32", arms, conditions, share=share)
    table.facts = {"shape": vars(shape)}
    return table
