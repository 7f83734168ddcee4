"""The fused loss: the same number and gradients as reinforce_loss, without ever holding (N, V)."""

import weakref

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from avatarl.critics import DenseOpinion
from avatarl.loss import LossSettings, fused_avatarl_loss, judge, reinforce_loss
from tests.avatarl.builders import SPARSIFY, WEIGHTING, Case, method, random_case

N, V, D = 7, 11, 5
CHUNKS = [1, 3, N, N + 5]


def weights(dtype: torch.dtype = torch.float64, n: int = N) -> tuple[Tensor, Tensor]:
    """Hidden states (N, D) and unembedding (V, D)."""
    draws = torch.Generator().manual_seed(3)
    hidden, unembedding = (torch.randn(rows, D, generator=draws, dtype=torch.float64) for rows in (n, V))
    return hidden.to(dtype).requires_grad_(), unembedding.to(dtype).requires_grad_()


def plain(hidden: Tensor, unembedding: Tensor, case: Case, m) -> Tensor:
    """reinforce_loss with autograd through whole logits."""
    logits = hidden @ unembedding.T
    actions, _, r = judge(logits.detach(), DenseOpinion(case.critic), case.gold, m)
    return reinforce_loss(logits, actions, r, entropy_coef=m.entropy_coef, policy_weighting=m.policy_weighting)


def fused(hidden: Tensor, unembedding: Tensor, case: Case, m, chunk_size: int = 3) -> Tensor:
    """The fused loss alone."""
    opinion = DenseOpinion(case.critic)
    loss, metrics = fused_avatarl_loss(
        hidden, unembedding, opinion, case.gold, settings=m, chunk_size=chunk_size, measure=False
    )
    assert metrics == {}
    return loss


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("sparsify", SPARSIFY)
@pytest.mark.parametrize("weighting", WEIGHTING)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
def test_equals_the_definition(dtype, tolerance, weighting, sparsify, beta, chunk_size):
    """Catches a hand-written gradient, a chunk boundary or a mean that differs from plain autograd."""
    case = random_case(N, V, dtype=dtype)
    m = method(policy_weighting=weighting, sparsify=sparsify, entropy_coef=beta)
    inputs = weights(dtype)
    one, other = plain(*inputs, case, m), fused(*inputs, case, m, chunk_size)
    assert other.dtype == dtype
    torch.testing.assert_close(other, one, rtol=tolerance, atol=0)
    for wanted, found in zip(gradients(one, *inputs), gradients(other, *inputs), strict=True):
        assert (found - wanted).abs().max() < tolerance * wanted.abs().max()


@pytest.mark.parametrize("weighting", WEIGHTING)
@pytest.mark.parametrize("sparsify", SPARSIFY)
def test_finite_differences(weighting, sparsify):
    """Catches any wrong gradient without our own definition's help, away from ties and thresholds.

    The loss jumps where the action set changes; the seeds leave more room than the step of 1e-6.
    """
    case = random_case(N, V)
    m = method(policy_weighting=weighting, sparsify=sparsify, entropy_coef=0.2)
    assert gradcheck(lambda h, u: fused(h, u, case, m), weights(), fast_mode=True)


def test_upstream_factor():
    """Catches a backward pass that forgets what multiplies the loss: gradient accumulation divides it."""
    case, m, inputs = random_case(N, V), method(), weights()
    once = gradients(fused(*inputs, case, m), *inputs)
    scaled = gradients(-2.5 * fused(*inputs, case, m), *inputs)
    for one, other in zip(once, scaled, strict=True):
        torch.testing.assert_close(-2.5 * one, other)


def test_backward_twice():
    """Catches a gradient that the first backward pass gave away, or scaled in place, and the second still uses."""
    case, m, inputs = random_case(N, V), method(), weights()
    loss = fused(*inputs, case, m)
    first = torch.autograd.grad(3 * loss, inputs, retain_graph=True)
    copies = [g.clone() for g in first]
    second = gradients(loss, *inputs)
    for one, kept, other in zip(first, copies, second, strict=True):
        torch.testing.assert_close(one, kept)
        torch.testing.assert_close(one, 3 * other)


def test_micro_batches_accumulate():
    """Catches a mean over chunks: two half-weighted halves must give the gradients of the whole."""
    case, m = random_case(8, V), method()
    hidden, unembedding = weights(n=8)
    whole = gradients(fused(hidden, unembedding, case, m), hidden, unembedding)
    for part in (slice(4), slice(4, 8)):
        (fused(hidden[part], unembedding, Case(*(t[part] for t in case)), m) / 2).backward()
    torch.testing.assert_close(hidden.grad, whole[0])
    torch.testing.assert_close(unembedding.grad, whole[1])


def test_hidden_states_out_of_order_in_memory():
    """Catches a view on memory that is not laid out row by row."""
    case, m = random_case(N, V), method()
    hidden, unembedding = weights()
    turned = hidden.detach().T.contiguous().T.requires_grad_()
    sliced = torch.stack((hidden.detach(), hidden.detach()), dim=-1)[..., 1].requires_grad_()
    wanted = gradients(fused(hidden, unembedding, case, m), hidden, unembedding)
    for other in (turned, sliced):
        assert not other.is_contiguous()
        found = gradients(fused(other, unembedding, case, m), other, unembedding)
        for one, two in zip(wanted, found, strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_side_frozen(frozen):
    """Catches a gradient that is made, or expected, where nobody asked for one."""
    case, m, inputs = random_case(N, V), method(), weights()
    wanted = gradients(fused(*inputs, case, m), *inputs)[1 - frozen]
    inputs[frozen].requires_grad_(False)
    fused(*inputs, case, m).backward()
    assert inputs[frozen].grad is None
    torch.testing.assert_close(inputs[1 - frozen].grad, wanted)


def test_without_gradients():
    """Catches a loss that cannot be evaluated under no_grad."""
    case, m, inputs = random_case(N, V), method(), weights()
    with torch.no_grad():
        loss = fused(*inputs, case, m)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(*inputs, case, m).detach())


def test_no_positions():
    """Catches 0 / 0 on a process that got no positions."""
    case, m = random_case(0, V), method()
    hidden, unembedding = weights(n=0)
    loss, metrics = fused_avatarl_loss(
        hidden, unembedding, DenseOpinion(case.critic), case.gold, settings=m, chunk_size=3
    )
    by_hidden, by_unembedding = gradients(loss, hidden, unembedding)
    assert loss.item() == 0 and metrics == {}
    assert by_hidden.shape == (0, D) and not by_unembedding.any()


@pytest.mark.parametrize("chunk_size", [3, N])
def test_bfloat16(chunk_size):
    """Catches a loss computed at bfloat16's 8 bits: only the matrix products may be.

    Bounds: the value to 1e-5, as the logits are the same; the gradients to 2 % in norm, for each is rounded
    to 2^-9 before its product, after it, and once more for every chunk that is added.
    """
    case, m = random_case(N, V, dtype=torch.float32), method(entropy_coef=0.3)
    hidden, unembedding = weights(torch.bfloat16)
    loss = fused(hidden, unembedding, case, m, chunk_size)
    logits = torch.cat([h @ unembedding.T for h in hidden.split(chunk_size)]).detach().float().requires_grad_()
    wanted = plain(logits, torch.eye(V), case, m)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-5, atol=0)
    (by_logits,) = gradients(wanted, logits)
    exact = by_logits @ unembedding.detach().float(), by_logits.T @ hidden.detach().float()
    for found, right in zip(gradients(loss, hidden, unembedding), exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.float() - right).norm() < 0.02 * right.norm()


def test_a_critic_in_double_precision():
    """Catches a critic's float64 that spills into a float32 student."""
    case, m, inputs = random_case(N, V), method(), weights(torch.float32)
    loss = fused(*inputs, case, m)
    assert {loss.dtype, *(g.dtype for g in gradients(loss, *inputs))} == {torch.float32}
    torch.testing.assert_close(loss, plain(*inputs, case.to(torch.float32), m))


class Watch(TorchDispatchMode):
    """Remembers the most elements that any operation returned, and which results of some size still live."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.largest = size, 0
        self.results: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                if tensor.numel() >= self.size:
                    self.results.append(weakref.ref(tensor))
        return out

    def alive(self) -> int:
        return sum(result() is not None for result in self.results)


@pytest.mark.parametrize("measure", [False, True])
def test_memory_is_that_of_a_chunk(measure):
    """Catches a tensor of size (N, V), whole or as a pile of chunks, also one kept for the backward pass."""
    n, vocab, width, chunk = 64, 96, 4, 8
    case, m = random_case(n, vocab, dtype=torch.float32), method()
    draws = torch.Generator().manual_seed(3)
    hidden = torch.randn(n, width, generator=draws).requires_grad_()
    unembedding = torch.randn(vocab, width, generator=draws).requires_grad_()
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Watch(chunk * vocab) as watch:
        loss, _ = fused_avatarl_loss(
            hidden,
            unembedding,
            DenseOpinion(case.critic),
            case.gold,
            settings=m,
            chunk_size=chunk,
            measure=measure,
        )
        assert watch.results and not watch.alive()
        loss.backward()
    assert watch.largest == chunk * vocab
    assert sorted(kept) == [(n,), (n, width), (vocab, width)]


def test_settings_may_be_the_config_or_scheduled_tensors():
    """Catches a loss that takes only one of the two, or a 0-d weight that counts differently."""
    case, m, inputs = random_case(N, V, dtype=torch.float32), method(), weights(torch.float32)
    scheduled = LossSettings(
        top_k=m.top_k,
        reality_weight=torch.tensor(m.reality_weight),
        critic_weight=torch.tensor(m.critic_weight),
        epsilon=torch.tensor(m.epsilon),
        sparsify=m.sparsify,
        normalize=m.normalize,
        reward_scale=m.reward_scale,
        reward_cap=m.reward_cap,
        entropy_coef=torch.tensor(m.entropy_coef),
        policy_weighting=m.policy_weighting,
        active_k=torch.tensor(2.0),
    )
    narrow = method(top_k=2)
    one, other = fused(*inputs, case, narrow), fused(*inputs, case, scheduled)
    torch.testing.assert_close(one, other)
    for a, b in zip(gradients(one, *inputs), gradients(other, *inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("weighting", WEIGHTING)
def test_skipping_the_entropy_changes_nothing_at_beta_zero(weighting):
    """Catches a short cut that is not one."""
    case, inputs = random_case(N, V), weights()
    m = method(entropy_coef=0.0, policy_weighting=weighting)
    fields = {name: getattr(m, name) for name in LossSettings._fields if hasattr(m, name)}
    short = LossSettings(**fields, use_entropy=False)
    one, other = fused(*inputs, case, m), fused(*inputs, case, short)
    torch.testing.assert_close(one, other)
    for a, b in zip(gradients(one, *inputs), gradients(other, *inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("chunk_size", "changes", "message"),
    [
        (0, {}, "chunk_size = 0: use at least one position"),
        (3, {"top_k": V + 1}, "use k <= 11"),
        (3, {"policy_weighting": "exact"}, "policy_weighting = 'exact': use reinforce or expected"),
    ],
)
def test_bad_use_is_refused(chunk_size, changes, message):
    """Catches an endless loop, an index error, or a misspelt weighting taken for the other one."""
    case, m = random_case(N, V), method()
    fields = {name: getattr(m, name) for name in LossSettings._fields if hasattr(m, name)}
    with pytest.raises(ValueError, match=message):
        fused(*weights(), case, LossSettings(**(fields | changes)), chunk_size)
