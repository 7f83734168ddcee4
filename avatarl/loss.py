"""REINFORCE over the action set, and its fused form that never holds all logits (DESIGN section 3, steps 5–7).

`reinforce_loss` is the definition: plain autograd over (N, V) logits. `fused_avatarl_loss` gives the same
number and the same gradients from hidden states and the unembedding, in chunks of positions, by the closed
form: without the entropy term ∂L/∂z_j = (R π_j − r_j) / N with R = Σ_a r(a).

Left out of REINFORCE as commonly written: returns, baselines and a value network. A decision lasts one step
and every action of the set is scored at once, so there is nothing to bootstrap and no sampling variance.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from avatarl.action_space import ActionSet, build_action_set
from avatarl.metrics import MetricSums
from avatarl.reward import Weight, consensus
from avatarl.reward import rewards as reward_of


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
    vocabulary, in float32 or better.
    """
    logits = student_logits if student_logits.dtype == torch.float64 else student_logits.float()
    log_pi = logits.log_softmax(-1)  # (N, V)
    log_pi_a = log_pi.gather(-1, actions.ids)  # (N, K)
    if policy_weighting == "expected":
        log_pi_a = log_pi_a.exp()
    elif policy_weighting != "reinforce":
        raise ValueError(f"policy_weighting = {policy_weighting!r}: use reinforce or expected")
    gain = (rewards.detach() * actions.valid * log_pi_a).sum(-1)  # (N,)
    entropy = -(log_pi.exp() * log_pi).sum(-1)  # (N,)
    return -gain.mean() - entropy_coef * entropy.mean()


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


def judge(student_logits, opinion, gold: Tensor, settings) -> tuple[ActionSet, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """Action set, critic's log-probabilities on it (N, K) and rewards (N, K) at N positions: steps 1 to 4."""
    s = settings
    actions = build_action_set(student_logits, opinion.top_ids(s.top_k), gold, s.top_k, getattr(s, "active_k", None))
    critic = opinion.log_probs(actions.ids)
    p_ref = consensus(
        actions,
        critic,
        reality_weight=s.reality_weight,
        critic_weight=s.critic_weight,
        epsilon=s.epsilon,
    )
    reward = reward_of(
        p_ref,
        actions.valid,
        sparsify=s.sparsify,
        normalize=s.normalize,
        reward_scale=s.reward_scale,
        reward_cap=s.reward_cap,
    )
    return actions, critic, reward


def _gradient_of_logits(logits: Tensor, actions: ActionSet, rewards: Tensor, settings) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """Sum of the loss over n positions, and its gradient by the logits (n, V), from the closed form.

    reinforce: R π − r;  expected: π (Σ_a π_a r_a − r);  entropy: β π (log π + H).
    """
    log_z = logits.logsumexp(-1, keepdim=True)  # (n, 1)
    log_pi = logits - log_z  # (n, V)
    pi = log_pi.exp()  # (n, V)
    log_pi_a = log_pi.gather(-1, actions.ids)  # (n, K)
    rewards = rewards * actions.valid
    if settings.policy_weighting == "reinforce":
        gain = (rewards * log_pi_a).sum(-1)
        scale, pull = rewards.sum(-1, keepdim=True), rewards
    elif settings.policy_weighting == "expected":
        pull = rewards * log_pi_a.exp()
        gain = pull.sum(-1)
        scale = gain.unsqueeze(-1)
    else:
        raise ValueError(f"policy_weighting = {settings.policy_weighting!r}: use reinforce or expected")
    loss = -gain.sum()
    if getattr(settings, "use_entropy", True):
        weighted = log_pi.mul_(pi)  # (n, V): π log π
        entropy = -weighted.sum(-1, keepdim=True)  # (n, 1)
        loss = loss - settings.entropy_coef * entropy.sum()
        gradient = pi.mul_(scale + settings.entropy_coef * entropy).add_(settings.entropy_coef * weighted)
    else:
        gradient = pi.mul_(scale)
    return loss, gradient.scatter_add_(-1, actions.ids, -pull.to(gradient.dtype))


class _FusedLoss(torch.autograd.Function):
    """Loss and both gradients in one pass over chunks; backward only scales what forward found."""

    @staticmethod
    def forward(ctx, hidden, unembedding, opinion, gold, settings, chunk_size, sums):  # type: ignore[no-untyped-def]
        n = hidden.shape[0]
        needs = ctx.needs_input_grad
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=exact, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs[0] else None
        grad_unembedding = torch.zeros_like(unembedding) if needs[1] else None
        for start in range(0, n, chunk_size):
            stop = min(start + chunk_size, n)
            h = hidden[start:stop]  # (n, D)
            logits = (h @ unembedding.T).to(exact)  # (n, V)
            part = opinion if stop - start == n else opinion.rows(start, stop)
            actions, critic, reward = judge(logits, part, gold[start:stop], settings)
            if sums is not None:
                sums.add(logits, actions, critic, reward, settings)
            loss, gradient = _gradient_of_logits(logits, actions, reward, settings)
            total += loss
            gradient = gradient.div_(n)
            if grad_hidden is not None:
                grad_hidden[start:stop] = gradient.to(h.dtype) @ unembedding.to(h.dtype)
            if grad_unembedding is not None:
                grad_unembedding += gradient.to(h.dtype).T @ h
        ctx.save_for_backward(grad_hidden, grad_unembedding)
        return total / max(n, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        by_hidden, by_unembedding = (None if g is None else g * grad_output.to(g.dtype) for g in ctx.saved_tensors)
        return by_hidden, by_unembedding, None, None, None, None, None


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
