"""Models to operate on: small, random and sharp enough that an operation shows."""

from typing import Any

import torch
from torch import Tensor

from config import ModelConfig
from model import GPT

VOCAB, WIDTH, BLOCK = 13, 16, 12


def patient(n_layer: int = 3, **options) -> Any:
    """A GPT of three blocks, width 16, in evaluation mode; the same for the same options. Any: tests reach inside."""
    torch.manual_seed(0)
    config = ModelConfig(**{"n_layer": n_layer, "n_head": 2, "n_embd": WIDTH, "block_size": BLOCK} | options)
    model = GPT(config, VOCAB)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def bits(model: torch.nn.Module) -> list[Tensor]:
    """Every parameter, copied, as integers: −0 is not 0, and NaN equals itself."""
    return [p.detach().clone().view(torch.int32) for p in model.parameters()]


def unchanged(model: torch.nn.Module, before: list[Tensor]) -> bool:
    """Whether no bit of any parameter differs from `bits` before."""
    return all(torch.equal(a, b) for a, b in zip(bits(model), before, strict=True))


def random_actions(count: int, layers: int, rank: int, seed: int = 0) -> Tensor:
    """Actions (M, L, r) within the limit, the first of them zero."""
    draw = torch.Generator().manual_seed(seed)
    actions = 0.1 * (2 * torch.rand(count, layers, rank, generator=draw) - 1)
    actions[0] = 0
    return actions
