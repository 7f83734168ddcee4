"""Consensus and rewards against the oracle, and what must hold whatever the numbers."""

import itertools
import math
from typing import Any, cast

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from avatarl.action_space import ActionSet
from avatarl.critics import DenseOpinion
from avatarl.loss import judge
from avatarl.objective import AvataRL
from avatarl.reward import consensus, reality_log_probs, rewards
from tests.avatarl import oracle
from tests.avatarl.builders import (
    MEANS,
    NORMALIZE,
    SPARSIFY,
    Case,
    consensus_of,
    maps,
    method,
    random_case,
    rewards_of,
    tied_cases,
    tiny_gpt,
)

QUICK = settings(deadline=None, max_examples=60)
PUBLISHED: dict[str, Any] = {"sparsify": "above_mean", "normalize": "cap", "reward_scale": 100.0, "reward_cap": 1.5}


def blend(critic: list[float], gold: int = 0, mean: Any = "geometric", **weights: float) -> torch.Tensor:
    """Consensus over all tokens of a small vocabulary, from critic probabilities; gold first."""
    ids = [gold, *(a for a in range(len(critic)) if a != gold)]
    actions = ActionSet(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))
    log_p_c = torch.tensor([critic], dtype=torch.float64).log().gather(-1, actions.ids)
    settings_of = {"reality_weight": 0.7, "critic_weight": 0.3, "epsilon": 0.1} | weights
    return consensus(actions, log_p_c, mean=mean, **settings_of)[0]


@pytest.mark.parametrize("mean", MEANS)
@given(tied_cases(), st.sampled_from([(0.7, 0.3), (0.3, 0.7), (1.5, 0.0), (0.0, 2.0)]), st.floats(0.01, 0.99))
@QUICK
def test_consensus_is_the_oracles(mean, drawn, weights, epsilon):
    """Catches wrong experts, exponents, shares or normalisation, also where a single action is left."""
    case, k = drawn
    m = method(top_k=k, mean=mean, reality_weight=weights[0], critic_weight=weights[1], epsilon=epsilon)
    actions, p_ref = consensus_of(case, m)
    torch.testing.assert_close(p_ref.sum(-1), torch.ones(len(p_ref)))
    assert not p_ref[~actions.valid].any()
    for found, (z, c, g) in zip(maps(actions, p_ref), case.rows(), strict=True):
        assert found == pytest.approx(oracle.judge(z, c, g, m).p_ref, rel=1e-5)


@pytest.mark.parametrize("mean", MEANS)
def test_consensus_keeps_double_precision(mean):
    """Catches a constant that is rounded to float32 on the way: the gradient checks need all digits."""
    case, m = random_case(), method(mean=mean)
    actions, p_ref = consensus_of(case, m)
    assert p_ref.dtype == torch.float64
    for found, (z, c, g) in zip(maps(actions, p_ref), case.rows(), strict=True):
        assert found == pytest.approx(oracle.judge(z, c, g, m).p_ref, rel=1e-13)


@pytest.mark.parametrize("mean", MEANS)
def test_scheduled_weights_are_tensors(mean):
    """Catches a weight that works as a number only: schedules hand over 0-d tensors."""
    case, m = random_case(dtype=torch.float32), method(mean=mean)
    actions, plain = consensus_of(case, m)
    names = ("reality_weight", "critic_weight", "epsilon")
    weights = {name: torch.tensor(getattr(m, name)) for name in names}
    scheduled = consensus(actions, case.critic.gather(-1, actions.ids), mean=mean, **weights)
    assert scheduled.dtype == torch.float32
    torch.testing.assert_close(scheduled, plain)


def test_reality_of_the_published_settings():
    """Catches ε divided by |A|: with 33 actions each other one has 0.3125 %; gold alone has all."""
    valid = torch.ones(1, 33, dtype=torch.bool)
    p_r = reality_log_probs(valid, 0.1).exp()[0]
    torch.testing.assert_close(p_r[0], torch.tensor(0.9))
    torch.testing.assert_close(p_r[1:], torch.full((32,), 0.003125))
    assert reality_log_probs(valid[:, :1], 0.1).item() == 0


def test_the_write_ups_example():
    """Catches a formula bent to the write-up's picture (82 / 15 / 2 / 0.1 %), which does not follow from it.

    The critic's 60 / 30 / 8 / 2 % over four actions is what its published result implies.
    """
    p_ref = blend([0.60, 0.30, 0.08, 0.02])
    assert [round(100 * p, 1) for p in p_ref.tolist()] == [85.4, 6.9, 4.6, 3.1]


@given(st.integers(0, 10**6), st.floats(0.01, 5), st.floats(0.01, 5))
@QUICK
def test_an_arithmetic_mean_is_fair(seed, reality, critic):
    """Catches a linear pool that is none: if the critic is right, its mean over gold must be the critic itself.

    The geometric mean is not fair.
    """
    p = random_case(1, 6, seed).critic.exp()[0]

    def taught(mean: str, **weights: float) -> torch.Tensor:
        found = torch.zeros_like(p)
        for gold in range(6):
            order = torch.tensor([gold, *(a for a in range(6) if a != gold)])
            found[order] += p[gold] * blend(p.tolist(), gold, mean, **weights)
        return found

    mixed = taught("arithmetic", reality_weight=reality, critic_weight=critic, epsilon=1e-12)
    torch.testing.assert_close(mixed, p, rtol=1e-6, atol=1e-7)
    assert (taught("geometric") - p).abs().max() > 1e-3  # by the published weights


def test_gold_keeps_realitys_share_of_an_arithmetic_mean():
    """Catches a share of reality's that the critic's certainty can shrink, and weights that have to sum to 1."""
    p_ref = blend([1e-9, 0.999, 0.001], mean="arithmetic", reality_weight=1.4, critic_weight=0.6, epsilon=0.1)
    assert p_ref.tolist() == pytest.approx([0.63, 0.3 * 0.999 + 0.035, 0.3 * 0.001 + 0.035])
    without = blend([0.2, 0.5, 0.3], mean="arithmetic", reality_weight=0.0, critic_weight=0.0, epsilon=0.1)
    assert without.tolist() == pytest.approx([0.55, 0.275, 0.175])  # half each


def test_weights_of_zero():
    """Catches 0 · log of something infinite, and an expert that still speaks with weight 0."""
    critic = [0.0, 0.5, 0.3, 0.2]
    reality = torch.tensor([0.9, *[0.1 / 3] * 3], dtype=torch.float64)
    torch.testing.assert_close(blend(critic, reality_weight=1.0, critic_weight=0.0), reality)
    floored = torch.tensor([1e-9, *critic[1:]], dtype=torch.float64)
    torch.testing.assert_close(blend(critic, reality_weight=0.0, critic_weight=1.0), floored / floored.sum())
    torch.testing.assert_close(
        blend(critic, reality_weight=0.0, critic_weight=0.0), torch.full((4,), 0.25, dtype=torch.float64)
    )


def test_critic_floor():
    """Catches a missing floor: what a critic calls impossible counts as 1e-9, no less."""
    torch.testing.assert_close(blend([0.0, 0.7, 0.3]), blend([1e-9, 0.7, 0.3]))
    torch.testing.assert_close(blend([1e-30, 0.7, 0.3]), blend([1e-9, 0.7, 0.3]))
    assert not torch.equal(blend([1e-8, 0.7, 0.3]), blend([1e-9, 0.7, 0.3]))


def test_a_confident_critic_outvotes_gold():
    """Catches a gold that is always kept: DESIGN says that it may lose its reward."""
    p_ref = blend([1e-9, 0.999, 0.001])[None]
    r = rewards(p_ref, torch.ones(1, 3, dtype=torch.bool), **PUBLISHED)[0]
    assert r[0] == 0 and r[1] == pytest.approx(1.5)


@pytest.mark.parametrize(("mean", "sparsify", "normalize"), list(itertools.product(MEANS, SPARSIFY, NORMALIZE)))
@given(tied_cases(), st.sampled_from([1.0, 100.0]), st.sampled_from([0.5, 1.5]), st.sampled_from([0.3, 2.0]))
@QUICK
def test_rewards_are_the_oracles(mean, sparsify, normalize, drawn, scale, cap, weight):
    """Catches a wrong threshold, scale or cap; positions that tie with their mean are left to the next test."""
    case, k = drawn
    m = method(
        top_k=k,
        mean=mean,
        sparsify=sparsify,
        normalize=normalize,
        reward_scale=scale,
        reward_cap=cap,
        critic_weight=weight,
    )
    judged = [oracle.judge(z, c, g, m) for z, c, g in case.rows()]
    assume(all(len(j.actions) == 1 or oracle.margin(j.p_ref) > 1e-5 for j in judged))
    actions, r = rewards_of(case, m)
    assert not r[~actions.valid].any()
    for found, one in zip(maps(actions, r), judged, strict=True):
        assert found == pytest.approx(one.rewards, rel=1e-5, abs=0)
    if normalize == "sum":
        torch.testing.assert_close(r.sum(-1), torch.ones(len(r)))
    else:
        assert r.max() <= cap * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", range(1, 68))
def test_uniform_consensus_rewards_gold_alone(count, dtype):
    """Catches rounding at the threshold: 1/|A| must never count as above the mean 1/|A|."""
    actions = ActionSet(torch.arange(70)[None], (torch.arange(70) < count)[None])
    log_p_c = torch.full((1, 70), -2.5, dtype=dtype)
    p_ref = consensus(actions, log_p_c, reality_weight=0.0, critic_weight=0.3, epsilon=0.1)
    r = rewards(p_ref, actions.valid, **PUBLISHED)[0]
    assert r[0] > 0 and not r[1:].any()
    # Uniform only up to rounding: with ε = (|A| − 1) / |A| reality itself has no favourite.
    epsilon = max(count - 1, 0.5) / count
    p_ref = consensus(actions, log_p_c, reality_weight=1.0, critic_weight=0.3, epsilon=epsilon)
    r = rewards(p_ref, actions.valid, **PUBLISHED)[0]
    assert r[0] > 0 and not r[1:].any()


def test_an_action_at_the_mean_gets_nothing():
    """Catches >= instead of >, and a mean over all K slots instead of over the valid ones."""
    p_ref = torch.tensor([[0.5, 0.25, 0.125, 0.125, 0.0]])
    valid = torch.tensor([[True, True, True, True, False]])
    r = rewards(p_ref, valid, **(PUBLISHED | {"normalize": "sum"}))
    assert r.tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]]


@given(st.integers(0, 10**6), st.integers(1, 32), st.sampled_from([0.1, 1.0, 4.0]))
@QUICK
def test_published_settings_always_reach_the_cap(seed, k, spread):
    """Catches a cap that does not bind for |A| <= 66: the reward is then 1.5 · p_ref / max p_ref."""
    logits, critic, gold = random_case(3, 80, seed, torch.float32)
    case = Case(logits, (spread * critic).log_softmax(-1), gold)
    actions, p_ref = consensus_of(case, method(top_k=k, reality_weight=0.7, critic_weight=0.3))
    r = rewards(p_ref, actions.valid, **PUBLISHED)
    assert r.amax(-1).tolist() == pytest.approx([1.5] * 3, rel=1e-6)
    kept = r > 0
    scaled = 1.5 * p_ref / p_ref.masked_fill(~kept, 0).amax(-1, keepdim=True)
    torch.testing.assert_close(r, scaled * kept)


def test_the_cap_never_lifts():
    """Catches a cap that rescales small rewards up to it: 80 equal actions have 1.25 each."""
    r = rewards(torch.full((1, 80), 1 / 80), torch.ones(1, 80, dtype=torch.bool), **(PUBLISHED | {"sparsify": "none"}))
    torch.testing.assert_close(r, torch.full((1, 80), 1.25))


@pytest.mark.parametrize(("normalize", "reward"), [("cap", 1.5), ("sum", 1.0)])
@pytest.mark.parametrize("sparsify", SPARSIFY)
def test_gold_alone(sparsify, normalize, reward):
    """Catches ε / (|A| − 1) at |A| = 1: a vocabulary of one token is certain and fully rewarded."""
    case = Case(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
    m = method(top_k=1, sparsify=sparsify, normalize=normalize)
    actions, p_ref = consensus_of(case, m)
    assert maps(actions, p_ref) == [{0: 1.0}, {0: 1.0}]
    _, r = rewards_of(case, m)
    assert r[:, 0].tolist() == pytest.approx([reward] * 2) and not r[:, 1:].any()


@given(st.permutations(range(11)), st.sampled_from(SPARSIFY), st.sampled_from(NORMALIZE))
@QUICK
def test_names_of_tokens_do_not_matter(order, sparsify, normalize):
    """Catches a reward that depends on a token's id or on its column: renamed tokens keep their rewards."""
    case, m = random_case(), method(sparsify=sparsify, normalize=normalize)
    old_of = torch.tensor(order)  # new id → old id
    new_of = old_of.argsort()
    renamed = Case(case.logits[:, old_of], case.critic[:, old_of], new_of[case.gold])
    before, after = (maps(*rewards_of(c, m)) for c in (case, renamed))
    for one, other in zip(before, after, strict=True):
        assert other == pytest.approx({int(new_of[token]): value for token, value in one.items()})


@pytest.mark.parametrize(("name", "value"), [("sparsify", "top"), ("normalize", "max")])
def test_unknown_switches_are_refused(name, value):
    """Catches a misspelt switch that silently means the other setting."""
    with pytest.raises(ValueError, match=rf"{name} = '{value}': use"):
        rewards(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), **(PUBLISHED | {name: value}))


def test_an_unknown_mean_is_refused():
    """Catches a misspelt mean that silently means the geometric one."""
    with pytest.raises(ValueError, match="mean = 'harmonic': use"):
        blend([0.5, 0.5], mean="harmonic")


def test_the_mean_reaches_the_loss():
    """Catches a flag that is parsed and forgotten between the configuration and the judgement."""
    case, m = random_case(dtype=torch.float32), method(mean="arithmetic", normalize="sum")
    own: Any = AvataRL(tiny_gpt(), m, steps=1, seed=0, critic=cast(Any, object()))
    _, _, told = judge(case.logits, DenseOpinion(case.critic), case.gold, own.settings(0))
    torch.testing.assert_close(told, rewards_of(case, m)[1])
    assert not torch.allclose(told, rewards_of(case, method(normalize="sum"))[1])


def test_floor_is_the_designs():
    """Catches a floor in the wrong base or place."""
    far = blend([1e-12, 1.0], reality_weight=0.0, critic_weight=1.0)
    assert math.isclose(far[0] / far[1], 1e-9, rel_tol=1e-9)
