"""Muon is torch's Muon, at the precision that the run asks for."""

from typing import Any

import pytest
import torch

from training.muon import Muon, orthogonalize

SETTINGS: dict[str, Any] = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.01}
SHAPES = [(8, 8), (24, 8), (8, 32), (8, 8), (24, 8)]


def trained(make, steps: int = 3) -> list[torch.Tensor]:
    """Matrices of all SHAPES after some steps of the optimiser that `make` builds, on the same gradients."""
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = make(matrices)
    for _ in range(steps):
        for p in matrices:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return [p.detach() for p in matrices]


def test_in_bfloat16_it_is_torchs():
    """Catches a momentum, decay, rate or coefficient that differs from torch.optim.Muon's, or matrices that are
    mixed up when they are stacked."""
    ours = trained(lambda p: Muon(p, dtype=torch.bfloat16, **SETTINGS))
    theirs = trained(lambda p: torch.optim.Muon(p, **SETTINGS))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0)  # products of a stack may round otherwise


def test_without_nesterov_it_is_torchs():
    """Catches a look-ahead that is taken although it was switched off."""
    settings = SETTINGS | {"nesterov": False}
    ours = trained(lambda p: Muon(p, dtype=torch.bfloat16, **settings))
    theirs = trained(lambda p: torch.optim.Muon(p, **settings))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", [(6, 6), (12, 4), (4, 12)])
def test_it_turns_all_singular_values_towards_one(shape):
    """Catches a transposition that is not undone, and singular vectors that are not kept."""
    torch.manual_seed(1)
    x = torch.randn(3, *shape)
    y = orthogonalize(x, 5, torch.float32)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    turned = u.mT @ y @ v.mT
    values = turned.diagonal(dim1=-2, dim2=-1)
    assert y.shape == x.shape and bool(((values > 0.4) & (values < 1.4)).all())
    assert float((turned - torch.diag_embed(values)).abs().max()) < 1e-4


def test_float32_forgets_tiny_differences():
    """Catches orthogonalising a float32 run in bfloat16: gradients that differ in their last digit then give updates
    that differ in their third, and accumulation or more processes would change the curve."""
    torch.manual_seed(2)
    x = torch.randn(16, 32, 32)
    near = x * (1 + 1e-6 * torch.randn_like(x))
    gap = {
        d: float((orthogonalize(x, 5, d) - orthogonalize(near, 5, d)).abs().max())
        for d in (torch.float32, torch.bfloat16)
    }
    assert gap[torch.float32] < 2e-4 < gap[torch.bfloat16]


def test_parameters_without_gradients_stay():
    """Catches decay or momentum on a matrix that took no part in the step."""
    still = torch.nn.Parameter(torch.ones(4, 4))
    Muon([still], dtype=torch.float32, **SETTINGS).step()
    assert torch.equal(still.detach(), torch.ones(4, 4))
