"""Steps that are not finite: no optimiser moves, and every one is counted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from config import OptimConfig
from training.finite import BadSteps, share_of, step_where
from training.optim import build_optimizers


class Layers(nn.Module):
    """One parameter for each of the two optimisers of "muon", and a vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 6)])

    def learn(self, factor: float) -> None:
        self.zero_grad()
        (factor * self.blocks[0](self.wte.weight)).square().sum().backward()


def everything(module: nn.Module, optimizers: list) -> list[Tensor]:
    """Copies of all weights and of all that the optimisers remember."""
    states = [t for o in optimizers for s in o.state.values() for t in s.values() if isinstance(t, Tensor)]
    return [t.detach().clone() for t in (*module.parameters(), *states)]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_flag_on_the_device_stops_weights_and_state(name):
    """Catches an optimiser that learns from NaN where only the GPU knows that it is one, or forgets afterwards."""
    module, settings = Layers(), OptimConfig(name=name)
    optimizers = build_optimizers(module, settings)
    module.learn(1.0)
    step_where(torch.tensor(True), optimizers)
    before = everything(module, optimizers)
    module.learn(float("nan"))
    for optimizer in optimizers:
        optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
        optimizer.step()
    after = everything(module, optimizers)
    assert len(before) > len(list(module.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_flag_that_is_not_set_changes_nothing(name):
    """Catches a guarded step that is not the plain one."""
    found = []
    for flagged in (False, True):
        module = Layers()
        optimizers = build_optimizers(module, OptimConfig(name=name))
        for _ in range(3):
            module.learn(1.0)
            for optimizer in optimizers:
                if flagged:
                    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
                optimizer.step()
        found.append(everything(module, optimizers))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_on_a_cpu_the_host_decides():
    """Catches a bad step that is taken, or a good one that is not."""
    module = Layers()
    optimizers = build_optimizers(module, OptimConfig())
    before = everything(module, [])
    module.learn(1.0)
    step_where(torch.tensor(False), optimizers)
    assert all(map(torch.equal, before, everything(module, [])))
    step_where(torch.tensor(True), optimizers)
    assert not any(map(torch.equal, before, everything(module, [])))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_loss_spoils_every_gradient(bad):
    """Catches a loss that is not finite though its gradients are: no other process would hear of it."""
    module = Layers()
    loss = module.blocks[0](module.wte.weight).sum() + bad
    share_of(loss, 3).backward()
    assert all(p.grad is not None and p.grad.isnan().all() for p in module.parameters())


@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 7))
def test_a_good_loss_is_divided_and_nothing_else(value, parts):
    """Catches a gradient of another size or of other bits than that of loss / parts."""
    found: list[torch.Tensor] = []
    for divide in (share_of, lambda loss, count: loss / count):
        x = torch.tensor(value, requires_grad=True)
        found += torch.autograd.grad(divide(x * 3, parts), x)
    assert torch.equal(*found)


def test_counts():
    """Catches a row that ends unseen between two readings, or a resumed run that starts its row anew."""
    steps = BadSteps(torch.device("cpu"), in_a_row=2, total=5)
    for finite in (False, True, False, False):
        steps.count(torch.tensor(finite))
    assert steps.read() == (2, 3, 8)
    steps.count(torch.tensor(True))
    assert steps.read() == (0, 2, 8)
    assert steps.read() == (0, 0, 8)
