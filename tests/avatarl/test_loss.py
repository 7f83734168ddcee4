"""The two losses: value against the oracle, gradients against closed forms and finite differences."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from avatarl.action_space import ActionSet
from avatarl.loss import group_loss, reinforce_loss
from tests.avatarl import oracle
from tests.avatarl.builders import (
    WEIGHTING,
    Case,
    action_set_of,
    method,
    oracle_gradient,
    oracle_loss,
    random_case,
    rewards_of,
)

weightings = pytest.mark.parametrize("weighting", WEIGHTING)


def loss_of(logits: Tensor, case: Case, m) -> Tensor:
    """reinforce_loss of `logits` with the actions and rewards of `case`."""
    actions, r = rewards_of(case, m)
    return reinforce_loss(logits, actions, r, entropy_coef=m.entropy_coef, policy_weighting=m.policy_weighting)


@weightings
@pytest.mark.parametrize("beta", [0.0, 0.01, 0.7])
def test_value_and_gradient_are_the_oracles(weighting, beta):
    """Catches a wrong sign, weight or mean, and a gradient that differs from the closed form."""
    case, m = random_case(), method(policy_weighting=weighting, entropy_coef=beta)
    logits = case.logits.clone().requires_grad_()
    loss = loss_of(logits, case, m)
    loss.backward()
    assert loss.item() == pytest.approx(oracle_loss(case, m), rel=1e-12)
    torch.testing.assert_close(logits.grad, oracle_gradient(case, m), rtol=1e-10, atol=1e-14)


def test_closed_form():
    """Catches a loss that is not the reward-weighted soft target it is said to be: (R π − r) / N."""
    case, m = random_case(), method(entropy_coef=0.0)
    actions, r = rewards_of(case, m)
    logits = case.logits.clone().requires_grad_()
    loss_of(logits, case, m).backward()
    target = torch.zeros_like(case.logits).scatter_add_(-1, actions.ids, r)  # (N, V)
    wanted = (target.sum(-1, keepdim=True) * case.logits.softmax(-1) - target) / len(case.gold)
    torch.testing.assert_close(logits.grad, wanted)


@weightings
def test_finite_differences(weighting):
    """Catches a detached factor: the gradient must be that of the number, rewards held constant."""
    case, m = random_case(3, 6), method(policy_weighting=weighting, entropy_coef=0.3)
    assert gradcheck(lambda logits: loss_of(logits, case, m), case.logits.clone().requires_grad_())


@weightings
def test_loss_is_a_mean_over_decisions(weighting):
    """Catches a division by |A| or by K: two halves must average to the whole, also at another K."""
    case, m = random_case(8), method(policy_weighting=weighting)
    halves = [Case(*(t[part] for t in case)) for part in (slice(4), slice(4, 8))]
    parts = [loss_of(half.logits, half, m) for half in halves]
    torch.testing.assert_close(loss_of(case.logits, case, m), (parts[0] + parts[1]) / 2)
    actions, r = rewards_of(case, m)
    padded = ActionSet(*(torch.cat((t, torch.zeros_like(t)), dim=-1) for t in actions))
    wide = reinforce_loss(
        case.logits,
        padded,
        torch.cat((r, torch.ones_like(r)), dim=-1),  # what stands in invalid slots must not matter
        entropy_coef=m.entropy_coef,
        policy_weighting=weighting,
    )
    torch.testing.assert_close(wide, loss_of(case.logits, case, m))


@weightings
def test_half_precision_logits_are_computed_in_float32(weighting):
    """Catches a log-softmax at 8 bits of mantissa."""
    case, m = random_case(dtype=torch.float32), method(policy_weighting=weighting)
    half = case.logits.bfloat16()
    loss = loss_of(half, case, m)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, loss_of(half.float(), case, m))


def test_rewards_are_constants():
    """Catches a gradient that flows into the rewards, hence into whoever made them."""
    case, m = random_case(), method()
    actions, r = rewards_of(case, m)
    r.requires_grad_()
    log_pi = case.logits.clone().requires_grad_().log_softmax(-1).gather(-1, actions.ids)
    group_loss(log_pi, log_pi.detach(), r, actions.valid, clip_ratio=0.2).backward()
    logits = case.logits.clone().requires_grad_()
    reinforce_loss(logits, actions, r, entropy_coef=0.0, policy_weighting="reinforce").backward()
    assert r.grad is None and logits.grad is not None and logits.grad.any()


def test_unknown_weighting_is_refused():
    """Catches a misspelt weighting that silently means the other one."""
    case = random_case()
    actions, r = rewards_of(case, method())
    with pytest.raises(ValueError, match="policy_weighting = 'exact': use reinforce or expected"):
        reinforce_loss(case.logits, actions, r, entropy_coef=0.0, policy_weighting="exact")  # type: ignore[arg-type]


def group_of(logits: Tensor, old_logits: Tensor, case: Case, clip: float = 0.2) -> Tensor:
    """group_loss of `logits`, with actions and rewards judged at the case's own logits."""
    actions, r = rewards_of(case, method())
    now, old = (z.log_softmax(-1).gather(-1, actions.ids) for z in (logits, old_logits))
    return group_loss(now, old, r, actions.valid, clip_ratio=clip)


def moved(case: Case, distance: float = 0.5) -> Tensor:
    """The case's logits after a change large enough to clip some ratios at 1 ± 0.2 and to leave others."""
    return case.logits + distance * torch.randn(
        case.logits.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    )


def test_group_value_is_the_oracles():
    """Catches advantages over K slots, a sample's standard deviation, a wrong min or a missing π_old."""
    case, m = random_case(), method()
    new = moved(case)
    wanted = [
        oracle.group_loss(now, z, oracle.judge(z, c, g, m).rewards, 0.2)
        for now, (z, c, g) in zip(new.tolist(), case.rows(), strict=True)
    ]
    assert group_of(new, case.logits, case).item() == pytest.approx(sum(wanted) / len(wanted), rel=1e-12)


def test_group_gradient_at_ratio_one():
    """Catches a clip or a ratio that spoils the first epoch: there ∂L/∂log π(a) = −π_old(a) Â(a) / N."""
    case, m = random_case(), method()
    actions, r = rewards_of(case, m)
    old = case.logits.log_softmax(-1).gather(-1, actions.ids)
    now = old.clone().requires_grad_()
    group_loss(now, old, r, actions.valid, clip_ratio=0.2).backward()
    wanted = torch.zeros_like(old)
    for n, (z, c, g) in enumerate(case.rows()):
        advantage = oracle.advantages(oracle.judge(z, c, g, m).rewards)
        for i, token in enumerate(actions.ids[n].tolist()):
            if actions.valid[n, i]:
                wanted[n, i] = -old[n, i].exp() * advantage[token] / len(case.gold)
    torch.testing.assert_close(now.grad, wanted, rtol=1e-10, atol=1e-14)


def test_group_finite_differences():
    """Catches a gradient lost in the clip or leaking from invalid slots, away from the kinks."""
    case = random_case(3, 6)
    assert gradcheck(lambda logits: group_of(logits, case.logits, case), moved(case, 0.3).requires_grad_())


def test_group_at_a_lone_action():
    """Catches 0 / 0 in the deviation: where gold is the only action there is nothing to prefer."""
    actions = ActionSet(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[True, False, False]] * 2))
    log_pi = torch.tensor([[-0.5, -0.5, -0.5]] * 2, requires_grad=True)
    loss = group_loss(log_pi, log_pi.detach() - 1.0, torch.ones(2, 3), actions.valid, clip_ratio=0.2)
    loss.backward()
    assert loss.item() == 0 and log_pi.grad is not None and not log_pi.grad.any()


@pytest.mark.parametrize(("shift", "good_moves", "bad_moves"), [(0.5, False, True), (-0.5, True, False)])
def test_the_clip_clips(shift, good_moves, bad_moves):
    """Catches a clip on the wrong side: what went far enough stops, what went the wrong way is pulled back."""
    old = torch.tensor([[0.5, 0.5]]).log()
    now = (old + shift).requires_grad_()
    r = torch.tensor([[1.0, 0.0]])
    group_loss(now, old, r, torch.ones(1, 2, dtype=torch.bool), clip_ratio=0.2).backward()
    assert now.grad is not None and (now.grad[0] != 0).tolist() == [good_moves, bad_moves]


def test_group_ignores_the_level_of_rewards():
    """Catches advantages that are not centred within A, or not scaled."""
    case = random_case()
    actions, r = rewards_of(case, method())
    now, old = (z.log_softmax(-1).gather(-1, actions.ids) for z in (moved(case), case.logits))
    one, other = (group_loss(now, old, x, actions.valid, clip_ratio=0.2) for x in (1000 * r, 1000 * (5 * r + 3)))
    torch.testing.assert_close(one, other)


def test_action_sets_hold_no_gradient():
    """Catches a graph kept alive through the top-k of the student's logits."""
    case = random_case()
    logits = case.logits.clone().requires_grad_()
    actions = action_set_of(Case(logits, case.critic, case.gold), 3)
    assert not actions.ids.requires_grad and not actions.valid.requires_grad
