"""Our attention for CPUs against PyTorch's own: values, gradients, and what a model with them computes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from config import ModelConfig
from kernels import blocked_attention
from model import GPT


def values_and_gradients(function, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients of a fixed random projection of it."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)


def reference_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def queries_keys_values(batch: int, heads: int, length: int, width: int) -> list[Tensor]:
    draws = torch.Generator().manual_seed(length)
    return [torch.randn(batch, length, heads, width, generator=draws).transpose(1, 2) for _ in range(3)]


@settings(deadline=None, max_examples=25)
@given(batch=st.integers(1, 3), heads=st.integers(1, 3), length=st.integers(1, 200), width=st.sampled_from([2, 8, 32]))
def test_attention_equals_pytorchs(batch, heads, length, width):
    """Catches a wrong mask, scale or block boundary, forwards or backwards, at any length."""
    inputs = queries_keys_values(batch, heads, length, width)
    ours, theirs = (values_and_gradients(f, *inputs) for f in (blocked_attention, reference_attention))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [64, 65, 150])
def test_no_query_sees_a_later_key(length):
    """Catches a block whose queries see the keys of its end."""
    q, k, v = queries_keys_values(1, 1, length, 4)
    changed = v.clone()
    changed[..., -1, :] += 100
    before, after = blocked_attention(q, k, v), blocked_attention(q, k, changed)
    assert torch.equal(before[..., :-1, :], after[..., :-1, :])
    assert not torch.equal(before[..., -1, :], after[..., -1, :])


def test_bfloat16_attention():
    """Catches intermediate results that lose more than bfloat16's own rounding: within 2 % of float64 in norm."""
    inputs = queries_keys_values(2, 2, 100, 16)
    exact = values_and_gradients(reference_attention, *(t.double() for t in inputs))
    ours = values_and_gradients(blocked_attention, *(t.bfloat16() for t in inputs))
    for one, other in zip(ours, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("options", [{}, {"position": "rope", "qk_norm": True, "bias": False}], ids=str)
def test_a_model_with_them_is_the_same_model(options):
    """Catches a kernel wired to other tensors than PyTorch's: logits and gradients agree."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=80, **options), 17)
    tokens = torch.randint(17, (3, 80))
    found = []
    for backend in ("sdpa", "blocked"):
        model.use_attention(backend)
        logits = model(tokens)
        found.append((logits.detach(), *torch.autograd.grad(logits.square().mean(), list(model.parameters()))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_dropout_and_long_contexts_leave_the_blocks(monkeypatch):
    """Catches dropout that is silently ignored, and probabilities of a long context that fill the memory."""

    def refuse(*tensors: Tensor) -> Tensor:
        raise AssertionError("blocked attention was used")

    monkeypatch.setattr("model.blocked_attention", refuse)
    for length, dropout in ((8, 0.5), (kernels.LONGEST_BLOCKED + 1, 0.0)):
        model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=length, dropout=dropout), 5)
        model.use_attention("blocked")
        model(torch.zeros(1, length, dtype=torch.long))
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=8), 5)
    model.use_attention("blocked")
    with pytest.raises(AssertionError, match="was used"):
        model(torch.zeros(1, 8, dtype=torch.long))
