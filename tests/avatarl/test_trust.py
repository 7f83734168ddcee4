"""Trust by position: whom the consensus believes, what is fitted, and how often a context was seen."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avatarl.build import build_objective
from avatarl.critics import DenseOpinion
from avatarl.loss import LossSettings, fused_avatarl_loss, judge, reinforce_loss
from avatarl.ngram import NgramCritic
from avatarl.suffixes import SuffixCritic
from avatarl.trust import BUCKETS, EXPONENTS, Trust, bucket_of, fit_trust
from config import Config, ConfigError, override
from tests.avatarl import oracle
from tests.avatarl.builders import maps, method, random_case, tiny_gpt

V, T = 11, 8


def trusting(trust: Trust | None, **changes: Any) -> LossSettings:
    """The loss's settings with a trust."""
    m = method(**changes)
    return LossSettings(**{name: getattr(m, name) for name in LossSettings._fields if hasattr(m, name)}, trust=trust)


def uneven() -> Trust:
    """Another trust in every bucket."""
    return Trust(torch.linspace(0, 1, BUCKETS, dtype=torch.float64))


@given(st.integers(0, 10**6), st.floats(0, 2), st.floats(0, 2))
@settings(deadline=None, max_examples=40)
def test_rewards_are_the_oracles_with_each_positions_weights(seed, reality, critic):
    """Catches trust of another position, of the student's favourite, or taken from the critic and given to nobody."""
    case, trust = random_case(5, V, seed), uneven()
    given_to = trusting(trust, reality_weight=reality, critic_weight=critic)
    actions, _, rewards = judge(case.logits, DenseOpinion(case.critic), case.gold, given_to)
    for found, (z, log_p, gold) in zip(maps(actions, rewards), case.rows(), strict=True):
        t = math.floor(math.exp(max(log_p)) * BUCKETS) / (BUCKETS - 1)
        m = method(reality_weight=reality + critic * (1 - t), critic_weight=critic * t)
        assert found == pytest.approx(oracle.judge(z, log_p, gold, m).rewards, rel=1e-6)


@pytest.mark.parametrize("sparsify", ["above_mean", "none"])
def test_full_trust_changes_nothing_and_none_leaves_reality(sparsify):
    """Catches weights that no longer sum to what they did."""
    case = random_case(dtype=torch.float32)

    def rewards(trust: float | None, **weights: float) -> Tensor:
        table = None if trust is None else Trust(torch.full((BUCKETS,), trust))
        return judge(case.logits, DenseOpinion(case.critic), case.gold, trusting(table, sparsify=sparsify, **weights))[
            2
        ]

    assert torch.equal(rewards(1.0), rewards(None))
    torch.testing.assert_close(rewards(0.0), rewards(None, reality_weight=1.0, critic_weight=0.0))


@pytest.mark.parametrize("chunk_size", [1, 3, 7])
def test_the_fused_loss_trusts_alike(chunk_size):
    """Catches a chunk that looks up the trust of the first positions of the batch."""
    case, s = random_case(), trusting(uneven(), entropy_coef=0.1)
    draws = torch.Generator().manual_seed(1)
    hidden, head = (torch.randn(n, 5, generator=draws, dtype=torch.float64).requires_grad_() for n in (7, V))
    logits = hidden @ head.T
    actions, _, r = judge(logits.detach(), DenseOpinion(case.critic), case.gold, s)
    plain = reinforce_loss(logits, actions, r, entropy_coef=0.1, policy_weighting="reinforce")
    opinion = DenseOpinion(case.critic)
    fused, _ = fused_avatarl_loss(hidden, head, opinion, case.gold, settings=s, chunk_size=chunk_size)
    torch.testing.assert_close(fused, plain)
    for one, other in zip(*(torch.autograd.grad(x, (hidden, head)) for x in (fused, plain)), strict=True):
        torch.testing.assert_close(one, other)


class Sharpened:
    """A critic that knows the truth after each token, and says p^sharpness, normalised."""

    def __init__(self, truth: Tensor, sharpness: float) -> None:
        self.table = (sharpness * truth.log()).log_softmax(-1)

    def opinion(self, tokens: Tensor, positions: Tensor | None) -> DenseOpinion:
        return DenseOpinion(self.table[tokens.flatten()])


def markov(length: int = 40_000, vocab: int = 6) -> tuple[np.ndarray, Tensor]:
    """A text and what follows each of its tokens: (L,), (V, V)."""
    draw = np.random.default_rng(0)
    truth = draw.dirichlet(np.ones(vocab), vocab)
    bounds, uniform, text = truth.cumsum(-1), draw.random(length), [0]
    for u in uniform:
        text.append(min(int(np.searchsorted(bounds[text[-1]], u)), vocab - 1))
    return np.array(text), torch.tensor(truth, dtype=torch.float32)


@pytest.mark.parametrize(("sharpness", "trust"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.5), (4.0, 0.25)])
def test_trust_is_how_much_the_critic_knows_of_what_it_says(sharpness, trust):
    """Catches a trust above 1, an inverted exponent, and gold read one position late.

    About 32,000 positions: the standard error of the exponent is below 0.02, the grid's half step 0.025.
    """
    text, truth = markov()
    table = fit_trust(Sharpened(truth, sharpness), text, 6, T).table
    best = Sharpened(truth, sharpness).table.amax(-1)
    used = bucket_of(DenseOpinion(best[:, None]), best)
    assert (table[used] - trust).abs().max() < 0.16 and abs(table[used].mean() - trust) < 0.06
    assert table.min() >= 0 and table.max() <= 1


def test_who_knows_nothing_is_not_trusted():
    """Catches a fit that never reaches 0: here gold has nothing to do with what the critic says."""
    text, truth = markov()
    assert fit_trust(Sharpened(truth.roll(1, 0).roll(2, 1), 1.0), text, 6, T).table.mean() < 0.3
    uniform = torch.from_numpy(np.random.default_rng(1).integers(0, 6, 20_000))
    assert fit_trust(Sharpened(truth, 1.0), uniform.numpy(), 6, T).table.max() < 0.1


def test_the_fit_is_a_search_through_the_grid():
    """Catches losses of one bucket counted to another, and a rare bucket that goes by its own noise."""
    text, truth = markov(3000)
    critic = Sharpened(truth, 1.5)
    losses = np.zeros((BUCKETS, EXPONENTS))
    count, grid = np.zeros(BUCKETS), np.linspace(0, 1, EXPONENTS)
    windows = (len(text) - T) // T
    for place in range(windows * T):
        log_p = critic.table[text[place]].double().numpy()
        bucket = min(int(math.exp(log_p.max()) * BUCKETS), BUCKETS - 1)
        count[bucket] += 1
        for i, t in enumerate(grid):
            losses[bucket, i] += math.log(sum(math.exp(t * x) for x in log_p)) - t * log_p[text[place + 1]]
    losses[count < 100] = losses.sum(0)
    torch.testing.assert_close(fit_trust(critic, text, 6, T).table.double(), torch.tensor(grid[losses.argmin(-1)]))


@pytest.mark.parametrize("kind", ["ngram", "suffix"])
def test_evidence_is_a_count(kind):
    """Catches the count of a shorter context, and one that includes the position's own occurrence."""
    text = np.random.default_rng(2).integers(0, 3, 120)
    critic: Any = NgramCritic(text, 3, context=3) if kind == "ngram" else SuffixCritic(text, 3, max_context=3)
    start = 40
    opinion = critic.opinion(torch.from_numpy(text[None, start : start + T]), torch.tensor([start]))
    wanted = []
    for t in range(T):
        for length in range(min(t + 1, 3), -1, -1):  # the longest context that was seen elsewhere
            context = text[start + t + 1 - length : start + t + 1]
            places = [i for i in range(length, len(text)) if np.array_equal(text[i - length : i], context)]
            often = len([i for i in places if i != start + t + 1])
            if often:
                break
        wanted.append(often)
    assert opinion.evidence().tolist() == pytest.approx(wanted)
    assert opinion.rows(2, 5).evidence().tolist() == pytest.approx(wanted[2:5])
    buckets = bucket_of(opinion, torch.zeros(T)).tolist()
    assert buckets == [math.ceil(math.log2(n)) for n in wanted]


def known(**critic: Any) -> Config:
    """A tiny run that trusts by position."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": T}
    return override(Config(), model=shape, method={"top_k": 3, "critic_trust": "known"}, critic=critic)


def test_the_setting_reaches_the_loss():
    """Catches a flag that is parsed and forgotten, and one that changes runs without it."""
    text, config = markov(2000)[0], known(kind="ngram", ngram_context=2)
    for wanted, c in ((True, config), (False, override(config, method={"critic_trust": "constant"}))):
        objective: Any = build_objective(tiny_gpt(6), c, text, [], torch.no_grad)
        assert (objective.settings(0).trust is not None) is wanted


@pytest.mark.parametrize("critic", [{"kind": "self"}, {"kind": "ngram", "leave_one_out": False}])
def test_a_critic_that_cannot_be_known(critic):
    """Catches a table fitted to a critic that changes, or to one that has read gold."""
    with pytest.raises(ConfigError, match=r"method\.critic-trust"):
        known(**critic)


def test_trust_is_an_exponent():
    """Catches a trust that is taken for a share, which is not what was fitted."""
    with pytest.raises(ConfigError, match=r"use --method\.mean geometric"):
        override(known(kind="ngram"), method={"mean": "arithmetic"})
