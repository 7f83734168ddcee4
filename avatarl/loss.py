"""REINFORCE over the action set, and its fused form that never holds all logits (DESIGN section 3, steps 5–7).

`reinforce_loss` is the definition: plain autograd over (N, V) logits. `fused_avatarl_loss` gives the same
number and the same gradients from hidden states and the unembedding, in chunks of positions. Both take the
gradient from the closed form of softmax_gradient.py.

Left out of REINFORCE as commonly written: returns, baselines and a value network. A decision lasts one step
and every action of the set is scored at once, so there is nothing to bootstrap and no sampling variance.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from avatarl.action_space import ActionSet, build_action_set, unproposed
from avatarl.metrics import MetricSums
from avatarl.reward import Weight, consensus, gold_alone
from avatarl.reward import rewards as reward_of
from avatarl.softmax_gradient import Terms, exact, gradient_of_logits, product_dtype, scaled
from avatarl.trust import Trust

PRODUCT_ROWS = 4096  # of the unembedding's gradient at a time: their product is still in a CPU's cache when added


class LossSettings(NamedTuple):
    """What the loss needs of MethodConfig, with the scheduled values of the present step (numbers or 0-d)."""

    top_k: int
    reality_weight: Weight
    critic_weight: Weight
    epsilon: Weight
    sparsify: Literal["above_mean", "none"]
    normalize: Literal["cap", "sum"]
    reward_scale: float
    reward_cap: float
    entropy_coef: Weight
    policy_weighting: Literal["reinforce", "expected"]
    active_k: Tensor | None = None
    use_entropy: bool = True
    """False where β is 0 throughout the run: the entropy's gradient is then skipped."""
    proposals: Literal["both", "critic"] = "both"
    unproposed: Literal["consensus", "gold"] = "consensus"
    mean: Literal["geometric", "arithmetic"] = "geometric"
    trust: Trust | None = None
    """How far the critic is believed, position by position; None: everywhere alike."""


def reinforce_loss(
    student_logits: Tensor,
    actions: ActionSet,
    rewards: Tensor,
    *,
    entropy_coef: Weight,
    policy_weighting: Literal["reinforce", "expected"],
) -> Tensor:
    """−mean_N Σ_A r log π − β mean_N H[π], or with "expected" −mean_N Σ_A π r − β mean_N H[π]: a scalar.

    student_logits (N, V); actions and rewards (N, K), rewards constant. log π and H are over the full
    vocabulary, in float32 or better. The gradient is the closed form; there is no second derivative.
    """
    use_entropy = isinstance(entropy_coef, Tensor) or entropy_coef != 0
    terms = Terms(entropy_coef, policy_weighting, use_entropy)
    return _LossOfLogits.apply(student_logits, actions, rewards.detach(), terms)


def group_loss(
    log_probs: Tensor, old_log_probs: Tensor, rewards: Tensor, valid: Tensor, *, clip_ratio: float
) -> Tensor:
    """GRPO over the action set: −mean_N Σ_A π_old min(ρ Â, clip(ρ, 1 ± c) Â), ρ = π / π_old. A scalar.

    All (N, K), rewards constant. Advantages Â = (r − mean_A r) / (std_A r + 1e-6), with the population's
    standard deviation, so that a lone action has Â = 0. DESIGN section 3, step 7; the clip is PPO's (Schulman
    et al., 2017).
    """
    rewards, count = rewards.detach(), valid.sum(-1, keepdim=True)  # (N, K), (N, 1)
    mean = (rewards * valid).sum(-1, keepdim=True) / count
    centred = (rewards - mean) * valid  # (N, K)
    advantage = centred / (centred.square().sum(-1, keepdim=True).div(count).sqrt() + 1e-6)
    old = old_log_probs.detach().masked_fill(~valid, float("-inf"))
    ratio = (log_probs - old_log_probs.detach()).masked_fill(~valid, 0.0).exp()  # (N, K)
    clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    return -(old.exp() * torch.minimum(ratio * advantage, clipped * advantage)).sum(-1).mean()


def agree(student_logits, opinion, gold: Tensor, settings) -> tuple[ActionSet, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """Action set, critic's log-probabilities on it (N, K) and consensus (N, K) at N positions: steps 1 to 3."""
    s = settings
    actions = build_action_set(
        student_logits,
        opinion.top_ids(s.top_k),
        gold,
        s.top_k,
        getattr(s, "active_k", None),
        student_proposes=getattr(s, "proposals", "both") == "both",
    )
    critic = opinion.log_probs(actions.ids)
    reality_weight, critic_weight = s.reality_weight, s.critic_weight
    if (trust := getattr(s, "trust", None)) is not None:
        favourite = critic[:, 1 + s.top_k]  # the first of the critic's columns, whether or not it is a duplicate
        reality_weight, critic_weight = trust.shares(opinion, favourite, reality_weight, critic_weight)
    p_ref = consensus(
        actions,
        critic,
        reality_weight=reality_weight,
        critic_weight=critic_weight,
        epsilon=s.epsilon,
        mean=getattr(s, "mean", "geometric"),
    )
    if getattr(s, "unproposed", "consensus") == "gold":
        student = getattr(s, "proposals", "both") == "both"
        where = unproposed(actions, s.top_k, getattr(s, "active_k", None), student_proposes=student)
        p_ref = gold_alone(p_ref, where)
    return actions, critic, p_ref


def judge(student_logits, opinion, gold: Tensor, settings) -> tuple[ActionSet, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """Action set, critic's log-probabilities on it (N, K) and rewards (N, K) at N positions: steps 1 to 4."""
    actions, critic, p_ref = agree(student_logits, opinion, gold, settings)
    return actions, critic, paid(p_ref, actions, settings)


def paid(p_ref: Tensor, actions: ActionSet, settings) -> Tensor:  # type: ignore[no-untyped-def]
    """Step 4: the rewards (N, K) that a consensus (N, K) becomes."""
    return reward_of(
        p_ref,
        actions.valid,
        sparsify=settings.sparsify,
        normalize=settings.normalize,
        reward_scale=settings.reward_scale,
        reward_cap=settings.reward_cap,
    )


class _LossOfLogits(torch.autograd.Function):
    """The loss of given logits; forward leaves the gradient behind, so that softmax runs once."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, actions: ActionSet, rewards: Tensor, terms: Terms) -> Tensor:
        n = len(logits)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        loss = gradient_of_logits(logits, actions, rewards, terms, out=gradient, scale=1 / max(n, 1))
        ctx.save_for_backward(logits, *actions, rewards)
        ctx.gradient, ctx.terms = gradient, terms
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None  # handed over, not copied
        if gradient is None:  # a second backward pass over a retained graph
            logits, ids, valid, rewards = ctx.saved_tensors
            gradient = torch.empty_like(logits)
            gradient_of_logits(logits, ActionSet(ids, valid), rewards, ctx.terms, gradient, 1 / max(len(logits), 1))
        return scaled(gradient, grad_output), None, None, None


class _FusedLoss(torch.autograd.Function):
    """Loss and both gradients in one pass over chunks; backward only scales what forward found."""

    @staticmethod
    def forward(ctx: Any, hidden, unembedding, opinion, gold, settings, chunk_size, sums):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(hidden, unembedding, gold)
        ctx.rest = opinion, settings, chunk_size
        loss, *ctx.gradients = fused_pass(
            hidden, unembedding, opinion, gold, settings, chunk_size, sums, ctx.needs_input_grad[:2]
        )
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # handed over, not copied
        if gradients is None:  # a second backward pass over a retained graph
            hidden, unembedding, gold = ctx.saved_tensors
            opinion, settings, chunk_size = ctx.rest
            wanted = ctx.needs_input_grad[:2]
            _, *gradients = fused_pass(hidden, unembedding, opinion, gold, settings, chunk_size, None, wanted)
        by_hidden, by_unembedding = (None if g is None else scaled(g, grad_output) for g in gradients)
        return by_hidden, by_unembedding, None, None, None, None, None


@torch.no_grad()
def fused_pass(hidden, unembedding, opinion, gold, settings, chunk_size, sums, wanted):  # type: ignore[no-untyped-def]
    """The mean loss, and its gradients by hidden (N, D) and unembedding (V, D) where `wanted`, else None.

    Products run in autocast's type where that is on. Adds the chunks' metrics to `sums` unless it is None.
    """
    n, kind = len(hidden), hidden.device.type
    size = -(-n // max(1, -(-n // chunk_size)))  # equal chunks: no small one at the end
    dtype = product_dtype(hidden)
    total = torch.zeros((), dtype=exact(dtype), device=hidden.device)
    by_hidden = torch.empty_like(hidden) if wanted[0] else None
    by_unembedding = torch.zeros_like(unembedding) if wanted[1] else None
    terms, head = Terms.of(settings), unembedding.to(dtype)
    with torch.autocast(kind, enabled=False):
        for start in range(0, n, max(1, size)):
            part = slice(start, min(start + size, n))
            h = hidden[part].to(dtype)
            logits = h @ head.T  # (n, V)
            of_chunk = opinion.rows(start, part.stop)  # what it remembers of its logits goes with the chunk
            actions, critic, reward = judge(logits, of_chunk, gold[part], settings)
            if sums is not None:
                sums.add(logits.to(total.dtype), actions, critic, reward, settings)
            out = logits if any(wanted) else None  # the gradient takes the place of what it is the gradient of
            total += gradient_of_logits(logits, actions, reward, terms, out=out, scale=1 / n)
            if by_hidden is not None:
                by_hidden[part] = logits @ head
            if by_unembedding is not None:
                add_product(by_unembedding, logits.T, h)
    return total, by_hidden, by_unembedding


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (V, D) += left (V, n) @ right (n, D), whose type may be a shorter one than total's."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    rows = len(total) if total.is_cuda else PRODUCT_ROWS
    for start in range(0, len(total), rows):
        part = slice(start, start + rows)
        total[part] += left[part] @ right


def fused_avatarl_loss(  # type: ignore[no-untyped-def]
    hidden: Tensor,
    unembedding: Tensor,
    opinion,
    gold: Tensor,
    *,
    settings,
    chunk_size: int,
    measure: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`reinforce_loss` of hidden (N, D) and unembedding (V, D), `chunk_size` positions at a time.

    opinion: the critic's CriticOpinion at the N positions; gold (N,) int64; settings: LossSettings, or a
    MethodConfig as it stands. No tensor of size (N, V) outlives its chunk, and none is kept for the backward
    pass. Returns the loss and, with `measure`, the metrics `train/…` of DESIGN section 6 as 0-d tensors.
    Raises ValueError for a chunk size below 1 or k above V.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size}: use at least one position")
    sums = MetricSums() if measure else None
    loss = _FusedLoss.apply(hidden, unembedding, opinion, gold, settings, chunk_size, sums)
    return loss, sums.means() if sums else {}
