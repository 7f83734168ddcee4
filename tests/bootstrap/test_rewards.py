"""The reward's terms: against loops over positions and actions, and what they promise."""

import pytest
import torch

from avatarl.ngram import NgramCritic
from bootstrap.rewards import (
    confidence_bonus,
    credit_table,
    exact_match,
    returns_to_go,
    soft_signal,
)
from tests.bootstrap.builders import TABLES, TEXT, V, corpus_batch, log_pi_case


def test_exact_match_is_one_for_gold():
    """Catches a reward one position late, or for every action."""
    gold = torch.tensor([[2, 0], [6, 2]])
    found = exact_match(gold, V)
    assert found.shape == (2, 2, V) and found.sum() == 4
    assert (found.argmax(-1) == gold).all()


@pytest.mark.parametrize("kind", ["relative", "raw"])
@pytest.mark.parametrize("shares", [(0.1, 0.2, 0.3, 0.4), (0.0, 1.0), (2.0,), (0.0, 0.0, 0.5, 0.0)])
def test_partial_credit_is_its_sum(kind, shares):
    """Catches orders that are off by one, shares that are not normalised, and a maximum over the wrong axis."""
    tokens = corpus_batch().tokens
    found = credit_table(TABLES, shares, kind).for_sequence(tokens, len(shares) - 1)
    for b, row in enumerate(tokens.tolist()):
        for t in range(len(row)):
            wanted = torch.zeros(V)
            for length, share in enumerate(shares):
                p = TABLES.probs(torch.tensor([row[: t + 1]]), length)[0]
                wanted += share / sum(shares) * (p / p.max() if kind == "relative" else p)
            torch.testing.assert_close(found[b, t], wanted)


def test_relative_credit_is_whole_for_the_likeliest():
    """Catches a credit that is largest where a distribution is peaked, whatever the action."""
    credit = credit_table(TABLES, (0.0, 1.0), "relative").for_sequence(corpus_batch().tokens, 1)
    torch.testing.assert_close(credit.amax(-1), torch.ones(3, 8))
    assert (credit > 0).all()


def test_confidence_pays_only_who_is_right():
    """Catches a bonus for being sure of something else."""
    pi, gold = log_pi_case().exp(), torch.tensor([0, 1, 2, 3, 6])
    found = confidence_bonus(gold, pi)
    torch.testing.assert_close(found.sum(-1), pi.gather(-1, gold[:, None])[:, 0])
    assert (found > 0).sum() == len(gold)


def test_the_soft_signal_leaves_the_own_occurrence_out():
    """Catches positions that are lost on the way: at a training position the text would merely repeat gold."""
    batch, critic = corpus_batch(), NgramCritic(TEXT, V, context=3)
    own, kept = (soft_signal(critic, batch.tokens, p) for p in (batch.positions, None))
    torch.testing.assert_close(own.sum(-1), torch.ones(3, 8))
    gold = batch.targets[..., None]
    assert (own.gather(-1, gold) <= kept.gather(-1, gold) + 1e-6).all()
    assert (own.gather(-1, gold) < kept.gather(-1, gold)).float().mean() > 0.9


def test_returns_to_go_are_discounted_sums():
    """Catches sums from the start, a discount on the character's own reward, and samples that are mixed."""
    rewards = torch.randn(2, 3, 4, dtype=torch.float64)
    found = returns_to_go(rewards, 0.5)
    for m in range(2):
        for g in range(3):
            for h in range(4):
                wanted = sum(0.5 ** (k - h) * float(rewards[m, g, k]) for k in range(h, 4))
                assert float(found[m, g, h]) == pytest.approx(wanted)
    assert returns_to_go(rewards, 0.0).equal(rewards), "0 ** 0 is 1"
