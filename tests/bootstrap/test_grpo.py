"""GRPO's parts: advantages, the clipped ratio, KL and the entropy band, against sums by hand and finite differences."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from bootstrap.grpo import clipped_gain, entropy_of, exhaustive_gain, group_advantages, kl_to, outside_band
from tests.bootstrap.builders import V, log_pi_case

rewards = st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=9)


@settings(deadline=None)
@given(rewards)
def test_advantages_sum_to_zero(row):
    """Catches a mean over something else than the group, and a division that spoils it."""
    found = group_advantages(torch.tensor([row, row[::-1]], dtype=torch.float64))
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(-1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-6)


@settings(deadline=None)
@given(rewards)
def test_advantages_are_the_formula(row):
    """Catches a sample's standard deviation in place of the population's, and one of the whole batch."""
    mean, spread = statistics.fmean(row), statistics.pstdev(row)
    wanted = [(r - mean) / (spread + 1e-6) for r in row]
    other = torch.arange(len(row), dtype=torch.float64)  # another group beside it
    found = group_advantages(torch.stack((torch.tensor(row, dtype=torch.float64), other)))
    torch.testing.assert_close(found[0], torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_equal_rewards_teach_nothing():
    """Catches 0 / 0 where all samples of a group brought the same."""
    assert not group_advantages(torch.full((2, 4), 3.0)).any()


def test_a_group_of_one_is_refused():
    """Catches advantages of 0 throughout, which look like training."""
    with pytest.raises(ValueError, match="a group of one has no spread"):
        group_advantages(torch.ones(3, 1))


@pytest.mark.parametrize(("shift", "good_moves", "bad_moves"), [(0.5, False, True), (-0.5, True, False)])
def test_the_clip_stops_what_went_far_enough(shift, good_moves, bad_moves):
    """Catches a clip on the wrong side, or a maximum in place of the minimum."""
    old = torch.zeros(2, dtype=torch.float64)
    now = (old + shift).requires_grad_()
    clipped_gain(now, old, torch.tensor([1.0, -1.0], dtype=torch.float64), 0.2).sum().backward()
    assert now.grad is not None and (now.grad != 0).tolist() == [good_moves, bad_moves]


def test_the_gain_at_ratio_one_is_the_advantage():
    """Catches a ratio of something else than now and old."""
    log_p, advantage = log_pi_case(), torch.linspace(-2, 2, 35, dtype=torch.float64).view(5, V)
    torch.testing.assert_close(clipped_gain(log_p, log_p, advantage, 0.1), advantage)


def of_logits(what):
    """`what` of log π as a function of logits, for finite differences through the normalisation."""
    return lambda logits: what(logits.log_softmax(-1)).sum()


REWARD = torch.linspace(0, 1, 3 * V, dtype=torch.float64).view(3, V).roll(3, -1)
OLD, REFERENCE = log_pi_case(3, 1), log_pi_case(3, 2)
PARTS = {
    "reinforce": lambda log_pi: exhaustive_gain(log_pi, REWARD, "reinforce"),
    "expected": lambda log_pi: exhaustive_gain(log_pi, REWARD, "expected"),
    "group": lambda log_pi: OLD.exp() * clipped_gain(log_pi, OLD, group_advantages(REWARD), 0.2),
    "kl": lambda log_pi: kl_to(log_pi, REFERENCE),
    "entropy": entropy_of,
    "band": lambda log_pi: outside_band(entropy_of(log_pi), 1.2, 1.4, 0.3, 0.7),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS.keys())
def test_finite_differences(part):
    """Catches a detached factor: every part's gradient is that of its number, away from the kinks."""
    assert gradcheck(of_logits(part), log_pi_case(3, 3).requires_grad_())


def test_exhaustive_gains_are_their_sums():
    """Catches a mean over actions, or the two weightings mixed up."""
    log_pi = log_pi_case(3)
    for row, reward, one, other in zip(
        log_pi.tolist(),
        REWARD.tolist(),
        exhaustive_gain(log_pi, REWARD, "reinforce").tolist(),
        exhaustive_gain(log_pi, REWARD, "expected").tolist(),
        strict=True,
    ):
        assert one == pytest.approx(sum(r * z for r, z in zip(reward, row, strict=True)))
        assert other == pytest.approx(sum(r * math.exp(z) for r, z in zip(reward, row, strict=True)))


logits = st.lists(st.floats(-4, 4, width=32), min_size=4, max_size=4)


@settings(deadline=None)
@given(logits, logits)
def test_kl_is_never_negative_and_zero_at_the_reference(one, other):
    """Catches KL the wrong way round at its sign, an estimate in its place, and a reference that is not normalised."""
    p, q = (torch.tensor(row, dtype=torch.float64).log_softmax(-1) for row in (one, other))
    assert kl_to(p, q) >= -1e-12
    assert abs(kl_to(p, p)) < 1e-12
    wanted = sum(a * math.log(a / b) for a, b in zip(p.exp().tolist(), q.exp().tolist(), strict=True))
    assert float(kl_to(p, q)) == pytest.approx(wanted, abs=1e-9)


def test_the_band_costs_nothing_inside():
    """Catches a bonus where there is enough entropy already, and a band whose edges are swapped."""
    entropy = torch.tensor([0.0, 0.4, 0.5, 1.0, 2.0, 2.5], dtype=torch.float64)
    cost = outside_band(entropy, 0.5, 2.0, 10.0, 1.0)
    torch.testing.assert_close(cost, torch.tensor([5.0, 1.0, 0.0, 0.0, 0.0, 0.5], dtype=torch.float64))
    assert outside_band(entropy, 0.5, 0.0, 10.0, 1.0)[-1] == 0, "0 is no upper edge"


def moves(low: float, high: float, log_pi: Tensor) -> Tensor:
    """How the entropies of log π change after a small step against the cost's gradient by the logits."""
    z = log_pi.clone().requires_grad_()
    outside_band(entropy_of(z.log_softmax(-1)), low, high, 1.0, 1.0).sum().backward()
    assert z.grad is not None
    return entropy_of((z - 0.01 * z.grad).detach().log_softmax(-1)) - entropy_of(log_pi)


def test_the_band_pulls_inwards():
    """Catches a penalty below and a bonus above."""
    log_pi = log_pi_case(4)
    assert (moves(1.9, 0.0, log_pi) > 0).all() and (moves(0.0, 0.1, log_pi) < 0).all()
