"""What an evaluation reports, against the definitions computed slowly, and against models that cheat."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from config import RunConfig
from data.batches import validation_windows
from training.calibration import Calibration
from training.evaluation import Tally, evaluate
from training.hardware import Hardware, choose

V = 7


@pytest.fixture(scope="module")
def hardware() -> Hardware:
    return choose(RunConfig(device="cpu", dtype="float32", threads=1))


class Table(nn.Module):
    """A model whose logits are a row of a table: of the token it reads, or of any number of columns before it."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table
        self.modes: list[bool] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.table[tokens]


def slow(tokens: np.ndarray, table: Tensor, bins: int, byte_count: int) -> dict[str, float]:
    """The metrics by their definitions, one token after the other."""
    nll, hits = 0.0, 0
    groups: dict[int, list[tuple[float, float]]] = {}
    for here, after in zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True):
        row = table[here].double().tolist()
        total = math.fsum(math.exp(z) for z in row)
        p = [math.exp(z) / total for z in row]
        nll -= math.log(p[after])
        best = max(range(len(p)), key=p.__getitem__)
        hits += best == after
        groups.setdefault(min(int(p[best] * bins), bins - 1), []).append((p[best], float(best == after)))
    count = len(tokens) - 1
    gaps = (abs(sum(c for c, _ in g) / len(g) - sum(h for _, h in g) / len(g)) * len(g) for g in groups.values())
    return {
        "val/ce": nll / count,
        "val/ppl": math.exp(nll / count),
        "val/bpb": nll / math.log(2) / byte_count,
        "val/accuracy": hits / count,
        "val/ece": sum(gaps) / count,
    }


def random_case(length: int, seed: int = 0) -> tuple[np.ndarray, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    table = 3 * torch.randn(V, V, generator=generator)
    return torch.randint(V, (length,), generator=generator).numpy().astype(np.uint16), table


@settings(max_examples=15, deadline=None)
@given(length=st.integers(2, 60), block=st.integers(1, 9), batch=st.integers(1, 5), seed=st.integers(0, 99))
def test_metrics_equal_their_definitions(length, block, batch, seed):
    """Catches padding that counts, a last window that is dropped, means of means, and bins of another width."""
    hardware = choose(RunConfig(device="cpu", dtype="float32", threads=1))
    tokens, table = random_case(length, seed)
    tally = evaluate(Table(table), validation_windows(tokens, block, batch), hardware, bins=15)  # type: ignore[arg-type]
    assert tally.metrics(3 * length) == pytest.approx(slow(tokens, table, 15, 3 * length), rel=1e-5, abs=1e-6)


def test_ranks_add_up_to_the_whole(hardware):
    """Catches shares that overlap or miss tokens: the sums of three ranks are those of one."""
    tokens, table = random_case(100)
    whole = evaluate(Table(table), validation_windows(tokens, 8, 4), hardware, bins=15)  # type: ignore[arg-type]
    parts = [
        evaluate(Table(table), validation_windows(tokens, 8, 4, rank, 3), hardware, bins=15)  # type: ignore[arg-type]
        for rank in range(3)
    ]
    assert float(sum(part.nll for part in parts)) == pytest.approx(float(whole.nll))
    assert torch.allclose(torch.stack([part.bins for part in parts]).sum(0), whole.bins)


def test_a_copier_does_not_look_good(hardware):
    """Catches logits that are read one position late, against which copying the input is perfect."""
    tokens = np.arange(60, dtype=np.uint16) % V  # no token follows itself
    copier, knower = 20 * torch.eye(V), 20 * torch.eye(V).roll(1, dims=1)

    def measured(table: Tensor) -> dict[str, float]:
        windows = validation_windows(tokens, 8, 4)
        return evaluate(Table(table), windows, hardware, bins=15).metrics(60)  # type: ignore[arg-type]

    assert measured(copier)["val/accuracy"] == 0 and measured(copier)["val/ce"] > 10
    assert measured(copier)["val/ece"] > 0.99  # certain and wrong
    assert measured(knower)["val/accuracy"] == 1 and measured(knower)["val/ce"] < 1e-6


def test_a_sure_model_falls_into_the_last_bin():
    """Catches confidence 1 that falls outside the bins, and half precision that is summed as it is."""
    tally = Tally.zero(15)
    logits = torch.full((3, V), -1e4, dtype=torch.bfloat16)
    logits[:, 2] = 1e4
    tally.add(logits, torch.tensor([2, 2, -1]))
    assert tally.bins[:, -1].tolist() == [2.0, 2.0, 2.0] and tally.bins.sum() == 6
    assert tally.metrics(2)["val/ece"] == 0 and tally.metrics(2)["val/ce"] == 0


def test_a_hopeless_model_has_a_finite_record():
    """Catches perplexity that overflows into an exception at the first evaluation of a diverged run."""
    tally = Tally.zero(15)
    tally.add(torch.tensor([[0.0, 5000.0]]), torch.tensor([0]))
    assert tally.metrics(1)["val/ce"] == pytest.approx(5000) and math.isfinite(tally.metrics(1)["val/ppl"])


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_comes_back(hardware, training):
    """Catches an evaluation under dropout, and one that switches the rest of training to evaluation mode."""
    tokens, table = random_case(30)
    model = Table(table).train(training)
    evaluate(model, validation_windows(tokens, 8, 4), hardware, bins=15)  # type: ignore[arg-type]
    assert not any(model.modes) and model.training is training


def test_no_gradients_are_kept(hardware):
    """Catches an evaluation that holds every window's activations."""
    tokens, table = random_case(30)
    table.requires_grad_(True)

    def windows() -> Iterator[tuple[Tensor, Tensor]]:
        for pair in validation_windows(tokens, 8, 4):
            assert not torch.is_grad_enabled()
            yield pair

    tally = evaluate(Table(table), windows(), hardware, bins=15)  # type: ignore[arg-type]
    assert not tally.nll.requires_grad and torch.is_grad_enabled()


def test_logits_that_are_not_numbers_are_told_not_fatal():
    """Catches an evaluation that dies of an index before the run can say that its losses are not finite."""
    tally, calibration = Tally.zero(15), Calibration.zero(2, 15)
    logits = torch.randn(4, V)
    logits[1] = math.nan
    tally.add(logits, torch.tensor([0, 1, 2, 3]))
    calibration.add(logits, torch.tensor([0, 1, 2, 3]))
    found = tally.metrics(4)
    assert math.isnan(found["val/ce"]) and math.isnan(found["val/ece"]) and 0 <= found["val/accuracy"] <= 1
    assert math.isnan(calibration.top_k_error())
