"""The operation: it is the formula, zero is nothing, and the singular vectors are those of the weight as it is."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checks import ConfigError
from surgery import operation
from surgery.operation import LIMIT, Operator, decompose, fingerprint
from surgery.theater import SurgicalTheater
from tests.surgery.patients import WIDTH, bits, patient, random_actions, unchanged

LAYERS = [0, 2]


@pytest.fixture
def model():
    return patient()


@pytest.fixture
def decompositions(monkeypatch):
    """A list that grows with every decomposition."""
    made: list[int] = []

    def counted(weight, rank):
        made.append(rank)
        return decompose(weight, rank)

    monkeypatch.setattr(operation, "decompose", counted)
    return made


def dense(weight: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """The definition: a full decomposition in float64 with the first r values scaled."""
    u, s, v = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    s = s.clone()
    s[: len(row)] *= 1 + row.double()
    return u @ s.diag() @ v


@given(
    rank=st.integers(1, WIDTH),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    zeros=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_it_is_the_formula(rank, seed, scale, zeros):
    """Catches singular values in the wrong order, vectors of the wrong side, a factor a instead of 1 + a."""
    model = patient(n_layer=2)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(scale)
            if zeros:
                block.attn.qkv.weight[:, WIDTH // 2 :] = 0  # half of the singular values are 0
    operator = Operator(model, [1, 0], rank)
    action = random_actions(2, 2, rank, seed)[1]
    wanted = [dense(p.weight, row) for p, row in zip(operator.projections, action, strict=True)]
    before = [p.weight.detach().clone() for p in operator.projections]
    operator.apply(action)
    for p, old, new in zip(operator.projections, before, wanted, strict=True):
        size = old.abs().max()
        assert ((p.weight - new).abs().max() / size).item() < 1e-5
        assert not torch.equal(p.weight, old)


def test_the_vectors_are_exact_for_the_shape_of_gpt_2():
    """Catches a decomposition that is fast because it is approximate."""
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(480, 160)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    found = decompose(weight, 6)
    assert torch.allclose(found.values.double(), s[:6], rtol=1e-6)
    sign = (found.right.double() * v[:6]).sum(-1).sign()
    assert torch.allclose(found.right.double(), sign[:, None] * v[:6], atol=1e-5)
    assert torch.allclose(found.left.double(), sign * u[:, :6] * s[:6], atol=1e-5)


def test_the_zero_action_is_nothing(model):
    """Catches an addition of zeros, which turns −0 into 0, and operations on the layers beside the one meant."""
    operator = Operator(model, LAYERS, 3)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[::2] = -0.0
    before = bits(model)
    operator.apply(torch.zeros(2, 3))
    assert unchanged(model, before)
    action = torch.zeros(2, 3)
    action[1, 0] = LIMIT
    operator.apply(action)
    changed = [not torch.equal(a, b) for a, b in zip(before, bits(model), strict=True)]
    assert sum(changed) == 1 and not torch.equal(before[changed.index(True)], model.blocks[2].attn.qkv.weight)


def test_rounds_in_a_theatre_share_one_decomposition(model, decompositions):
    """Catches a cache that a theatre's restoring throws away: an evaluation would cost a decomposition."""
    operator, before = Operator(model, LAYERS, 2), bits(model)
    for action in random_actions(5, 2, 2):
        with SurgicalTheater(model, operator.layers) as theatre:
            operator.apply(action)
            theatre.restore()
            operator.apply(action)
    assert unchanged(model, before) and len(decompositions) == len(LAYERS)


def test_a_second_operation_works_on_what_the_first_left(model):
    """Catches singular values of the unoperated weight in an operated one."""
    operator = Operator(model, [1], 1)
    largest = operator.directions()[0].values.item()
    for _ in range(2):
        operator.apply(torch.tensor([[LIMIT]]))
    assert operator.directions()[0].values.item() == pytest.approx(largest * 1.1**2, rel=1e-5)


def test_a_clones_operator_takes_the_vectors_along(model, decompositions):
    """Catches a clone that is decomposed anew, one that is not operated, and an original that is."""
    operator, before = Operator(model, LAYERS, 2), bits(model)
    operator.directions()
    twin = model.clone()
    operator.of(twin).apply(torch.full((2, 2), LIMIT))
    assert unchanged(model, before) and len(decompositions) == len(LAYERS)
    operator.apply(torch.full((2, 2), LIMIT))
    assert unchanged(model, bits(twin))


def step(kind):
    """A change by one step of an optimiser."""

    def change(model):
        weights = [p for p in model.parameters() if p.ndim == 2]
        for p in weights:
            p.grad = torch.ones_like(p)
        kind(weights).step()
        for p in weights:
            p.grad = None

    return change


def load(model):
    """Another model's weights."""
    model.load_state_dict({name: 1.01 * value for name, value in model.state_dict().items()})


def assign(model):
    """Another model's tensors."""
    model.load_state_dict({name: 1.01 * value for name, value in model.state_dict().items()}, assign=True)


def one_bit(model):
    """The last bit of one number, past autograd and its versions."""
    model.blocks[2].attn.qkv.weight.data.view(torch.int32)[5, 7] ^= 1


def rows_swapped(model):
    """The same numbers in another order."""
    weight = model.blocks[2].attn.qkv.weight.data
    weight[[0, 1]] = weight[[1, 0]]


def inference(model):
    """A change under inference mode."""
    with torch.inference_mode():
        model.blocks[2].attn.qkv.weight.mul_(1.5)


CHANGES = {
    "SGD": step(lambda w: torch.optim.SGD(w, lr=0.1)),
    "AdamW, one by one": step(lambda w: torch.optim.AdamW(w, lr=0.1, foreach=False)),
    "AdamW, foreach": step(lambda w: torch.optim.AdamW(w, lr=0.1, foreach=True)),
    "AdamW, fused": step(lambda w: torch.optim.AdamW(w, lr=0.1, fused=True)),
    "Muon": step(lambda w: torch.optim.Muon(w, lr=0.1)),
    "load_state_dict": load,
    "load_state_dict, assign": assign,
    "one bit through .data": one_bit,
    "rows swapped through .data": rows_swapped,
    "inference mode": inference,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changed_weights_have_new_vectors(model, change, decompositions):
    """Catches singular vectors of weights that are gone, by whatever means they went."""
    operator = Operator(model, LAYERS, 2)
    operator.directions()
    change(model)
    made, found = len(decompositions), operator.directions()
    assert len(decompositions) > made
    for p, now in zip(operator.projections, found, strict=True):
        assert torch.equal(now.left, decompose(p.weight, 2).left)
    operator.directions()
    assert len(decompositions) - made <= len(LAYERS)


@given(place=st.tuples(st.integers(0, 3 * WIDTH - 1), st.integers(0, WIDTH - 1)), bit=st.integers(0, 30))
@settings(deadline=None)
def test_a_fingerprint_feels_every_bit(place, bit):
    """Catches a sum in floating point, which loses small changes."""
    weight = patient(n_layer=1).blocks[0].attn.qkv.weight.data
    before = fingerprint(weight)
    assert before.of_same(fingerprint(weight.clone()))
    weight.view(torch.int32)[place] ^= 1 << bit
    assert not before.of_same(fingerprint(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [3, 6])
def test_other_types_and_odd_widths(dtype, width):
    """Catches a view of bits that only fits float32 and even widths."""
    model = patient(n_layer=1, n_embd=width, n_head=1).to(dtype)
    operator = Operator(model, [0], 1)
    weight = model.blocks[0].attn.qkv.weight
    wanted = dense(weight, torch.tensor([LIMIT]))
    with torch.autocast("cpu", torch.bfloat16):
        operator.apply(torch.tensor([[LIMIT]]))
    error = (weight.double() - wanted).abs().max() / wanted.abs().max()
    assert weight.dtype == dtype and error < max(1e-6, 2 * torch.finfo(dtype).eps)  # 1e-6: the action's own float32


@pytest.mark.parametrize(
    ("action", "says"),
    [
        (torch.full((2, 3), 0.1001), "from −0.1 to 0.1"),
        (torch.full((2, 3), float("nan")), "from −0.1 to 0.1"),
        (torch.zeros(3, 2), r"L, r = \(2, 3\)"),
        (torch.zeros(1, 2, 3), r"action \(L, r\)"),
    ],
)
def test_actions_that_cannot_be_are_refused_before_any_change(model, action, says):
    """Catches an action that is clipped unseen, or half applied."""
    operator, before = Operator(model, LAYERS, 3), bits(model)
    with pytest.raises(ConfigError, match=says):
        operator.apply(action)
    assert unchanged(model, before)


def test_the_limit_itself_is_allowed(model):
    """Catches float32's 0.1, which is more than 0.1, being refused; and arrays of an agent's library."""
    operator = Operator(model, LAYERS, 3)
    first = [d.values.clone() for d in operator.directions()]
    operator.apply(np.full((2, 3), LIMIT, dtype=np.float32))
    operator.apply(np.full((2, 3), -LIMIT))
    for before, now in zip(first, operator.directions(), strict=True):  # 1.1 · 0.9 < 1
        assert now.values[0] < before[0]


@pytest.mark.parametrize("rank", [0, WIDTH + 1])
def test_ranks_that_cannot_be_are_refused(model, rank):
    """Catches an action without numbers, and more directions than a weight has."""
    with pytest.raises(ConfigError, match=f"use 1 to {WIDTH}"):
        Operator(model, LAYERS, rank)


def test_a_weight_that_is_not_finite_says_so(model):
    """Catches LAPACK's words for a run that has diverged, and a second answer from a cache."""
    operator, before = Operator(model, LAYERS, 2), bits(model)
    with torch.no_grad():
        model.blocks[2].attn.qkv.weight[0, 0] = float("nan")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not finite"):
            operator.apply(torch.full((2, 2), LIMIT))
    assert torch.equal(before[2], bits(model)[2])  # the healthy layer is not operated either
