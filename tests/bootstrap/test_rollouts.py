"""Rollouts: both forms of context, the acting policy, and samples of several characters, against slow ways."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from bootstrap.rollouts import (
    Acting,
    acting_log_probs,
    acting_scores,
    continue_contexts,
    draw,
    log_policy,
    log_policy_of,
    read,
    sample,
    starts,
    temperatures,
    uniform_draws,
    windows_read,
)
from tests.bootstrap.builders import TABLES, V, corpus_batch, log_pi_case, policy, rows_of

POSITIONS = {
    "learned": {},
    "rope": {"position": "rope", "qk_norm": True},
    "short": {"short_conv": 2},
    "n-grams": {"ngram_embed": 3, "ngram_rows": 16},
}


def acting(low: float = 1.0, high: float = 1.0, samples: int = 4, guidance: float = 0.0) -> Acting:
    """An acting policy in float64."""
    return Acting(temperatures(low, high, samples, "cpu").double(), torch.tensor(guidance, dtype=torch.float64))


def bigram(tokens: Tensor) -> Tensor:
    """The reference after tokens (N,): (N, V) float64."""
    return TABLES.log_reference(tokens[:, None]).double()


@pytest.mark.parametrize("options", POSITIONS.values(), ids=POSITIONS.keys())
def test_windows_and_sequences_agree_where_contexts_do(options):
    """Catches a window that starts a token late, reads another place's output, or shifts the positions."""
    model, tokens = policy(**options), corpus_batch(rows=1, length=20).tokens
    windows = read(model, tokens)  # (1, 20, D), a context of 8
    assert windows.shape == (1, 20, 8)
    for t in range(20):
        context = tokens[:, max(0, t - 7) : t + 1]
        torch.testing.assert_close(windows[:, t], model.hidden(context)[:, -1])
    torch.testing.assert_close(read(model, tokens[:, :8]), windows[:, :8])
    assert torch.equal(read(model, tokens[:, :8]), model.hidden(tokens[:, :8])), "a row that fits is one pass"


def test_windows_give_the_same_gradients():
    """Catches windows through which nothing is learned, and decisions that are counted twice."""
    tokens, gradients = corpus_batch(rows=2, length=11).tokens, []
    for windowed in (True, False):
        model = policy()
        if windowed:
            hidden = read(model, tokens)
        else:
            parts = [model.hidden(tokens[:, max(0, t - 7) : t + 1])[:, -1:] for t in range(11)]
            hidden = torch.cat(parts, 1)
        log_policy(model, hidden)[..., 0].sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_another_model_is_read_without_its_dropout_or_gradients():
    """Catches an opponent that plays under a mask, or that learns, and one that is left in another mode."""
    model, tokens = policy(dropout=0.5), corpus_batch().tokens
    found = log_policy_of(model, tokens)
    assert model.training and not found.requires_grad
    model.eval()
    torch.testing.assert_close(found, model(tokens).log_softmax(-1))


def test_what_windows_cost():
    """Catches a forecast that forgets the windows."""
    assert [windows_read(n, 8) for n in (5, 8, 9, 64)] == [5, 8, 16, 57 * 8]


@pytest.mark.parametrize("guidance", [0.0, 0.3, 1.0])
def test_the_acting_policy_is_its_formula(guidance):
    """Catches a guidance that sharpens as it mixes, a temperature that multiplies, and one for all samples."""
    log_pi, reference = log_pi_case(5), bigram(torch.arange(5))
    how = acting(0.5, 2.0, 4, guidance)
    found = acting_scores(log_pi[:, None], reference[:, None], how).softmax(-1)
    for g, temperature in enumerate([0.5, 1.0, 1.5, 2.0]):
        pi, q = log_pi.exp() ** (1 / temperature), reference.exp()
        weights = pi ** (1 - guidance) * q**guidance
        torch.testing.assert_close(found[:, g], weights / weights.sum(-1, keepdim=True))


@pytest.mark.parametrize("rows", [1, 4])
def test_log_probabilities_of_the_acting_policy(rows):
    """Catches the log-probability of a policy that never acted, and a gradient that forgets the normalisation."""
    log_pi = torch.stack([log_pi_case(5, g) for g in range(rows)], 1)  # (N, 1 or G, V)
    reference = bigram(torch.arange(5))[:, None].expand(-1, rows, -1)
    actions = torch.randint(V, (5, 4), generator=torch.Generator().manual_seed(1))
    how = acting(0.6, 1.4, 4, 0.3)
    wanted = acting_scores(log_pi, reference, how).log_softmax(-1).gather(-1, actions[..., None])[..., 0]
    torch.testing.assert_close(acting_log_probs(log_pi, reference, actions, how), wanted)
    assert gradcheck(lambda z: acting_log_probs(z.log_softmax(-1), reference, actions, how), log_pi.requires_grad_())


def test_draws_follow_the_distribution():
    """Catches an inverse that is off by one: equidistant draws must give every action its share."""
    p = torch.tensor([0.1, 0.0, 0.6, 0.3, 0.0])
    uniform = (torch.arange(1000) + 0.5) / 1000
    actions = draw(p.expand(1000, -1), uniform)
    assert torch.bincount(actions, minlength=5).tolist() == [100, 0, 600, 300, 0]
    assert draw(p[None], torch.tensor([1 - 2**-24])).item() == 3, "an action without mass is never drawn"
    assert 0 <= draw(torch.full((1, 5), math.nan), torch.tensor([0.5])).item() < 5, "a bad step is skipped, not fatal"


def test_samples_have_their_own_temperatures():
    """Catches draws or temperatures that are given to the wrong sample of a group.

    20,000 draws of each: a share is off by 0.015 with a chance of about 2 in 100,000.
    """
    log_pi = torch.tensor([0.7, 0.2, 0.1]).log().expand(20_000, 1, 3)
    how = Acting(torch.tensor([0.25, 1.0, 4.0]), torch.tensor(0.0))
    uniform = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0))
    actions = sample(log_pi, None, how, uniform)
    for g, temperature in enumerate(how.temperatures):
        wanted = (log_pi[0, 0] / temperature).softmax(-1)
        shares = torch.bincount(actions[:, g], minlength=3) / 20_000
        torch.testing.assert_close(shares, wanted, rtol=0, atol=0.015)


def test_draws_depend_on_the_row_alone():
    """Catches draws that change with the split of a batch among processes, or repeat from step to step."""
    batch = corpus_batch()
    whole = uniform_draws(7, 3, batch, 4)
    assert whole.shape == (3, 8, 4) and len(whole.unique()) == whole.numel()
    part = rows_of(batch, slice(1, None))
    torch.testing.assert_close(uniform_draws(7, 3, part, 4), whole[1:], rtol=0, atol=0)
    assert not torch.equal(uniform_draws(7, 4, batch, 4), whole)


@pytest.mark.parametrize(("length", "horizon"), [(8, 3), (8, 8), (12, 3), (20, 1)])
def test_where_samples_start(length, horizon):
    """Catches a context that already holds what is to be predicted, and gold one place off."""
    batch = corpus_batch(rows=2, length=length)
    start = starts(batch, 8, horizon, 4, seed=0, step=0)
    count = 1 if length <= 8 else length - (8 + horizon - 1) + 1
    assert start.context == (length - horizon + 1 if length <= 8 else 8)
    assert start.draws.shape == (2 * count, 4, horizon)
    for i in range(2 * count):
        b, s = divmod(i, count)
        end = s + start.context + horizon - 1
        assert torch.equal(start.tokens[i], batch.tokens[b, s:end])
        assert torch.equal(start.targets[i], batch.targets[b, s:end])
        assert start.positions is not None and start.positions[i] == batch.positions[b] + s  # type: ignore[index]


@pytest.mark.parametrize("length", [8, 11], ids=["sequence", "windows"])
@pytest.mark.parametrize("options", POSITIONS.values(), ids=POSITIONS.keys())
def test_continuations_are_drawn_one_character_after_the_other(length, options):
    """Catches a cache that is out of step, a context that slides wrongly, samples that read each other's characters.

    The slow way: one sample at a time, its context read anew for every character.
    """
    model, how = policy(**options), acting(0.7, 1.3, 3, 0.2)
    start = starts(corpus_batch(rows=2, length=length), 8, 3, 3, seed=1, step=2)
    start = start._replace(draws=start.draws.double())
    went = continue_contexts(model, start, how, bigram)
    for m in range(len(start.tokens)):
        for g in range(3):
            text = start.tokens[m, : start.context].tolist()
            for h in range(3):
                pi = model(torch.tensor([text[-8:]]))[0, -1].softmax(-1)
                weights = pi ** (0.8 / float(how.temperatures[g])) * bigram(torch.tensor(text[-1:]))[0].exp() ** 0.2
                mu = (weights / weights.sum()).tolist()
                picked, left = 0, float(start.draws[m, g, h])
                while left >= mu[picked]:
                    left, picked = left - mu[picked], picked + 1
                assert int(went.actions[m, g, h]) == picked
                assert float(went.log_probs[m, g, h]) == pytest.approx(math.log(mu[picked]), abs=1e-6)
                text.append(picked)
            assert went.rows[m * 3 + g].tolist() == text[:-1]
