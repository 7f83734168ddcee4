"""The mixed critic against counting by hand, against itself, and against the plain n-gram on real text."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avatarl import mixed, mixed_counts
from avatarl.mixed import Gates, MixedCritic, buckets
from avatarl.mixed_counts import CountTable
from avatarl.ngram import NgramCritic
from config import ConfigError
from tests.avatarl.test_ngram import cases

V = 5
CORPUS = np.random.default_rng(0).integers(0, V, 300)
CORPUS[150:200] = CORPUS[20:70]  # something to remember


@pytest.fixture(scope="module")
def critic() -> MixedCritic:
    """A critic of a small corpus, with gates that were fitted."""
    return MixedCritic(CORPUS, V, context=3)


def interpolated(critic, corpus, history, left_out):
    """[p_0, p_1, …] (V floats each) after `history`, by counting; `left_out`: index of an occurrence to skip."""
    p, found = [1 / critic.vocab_size] * critic.vocab_size, []
    for n in range(critic.context + 1):
        if n <= len(history):
            context = history[len(history) - n :]
            counts = Counter(corpus[i] for i in range(n, len(corpus)) if corpus[i - n : i] == context and i != left_out)
            discount = [critic.table.discounts[n][min(counts[w], 3)].item() for w in range(critic.vocab_size)]
            total = sum(counts.values())
            if total:
                held = sum(discount)
                p = [(max(counts[w] - discount[w], 0) + held * p[w]) / total for w in range(critic.vocab_size)]
            found.append((p, total, len(counts)))
        else:
            found.append((p, 0, 0))
    return found


def by_hand(critic, corpus, history, left_out):
    """log p (V,) after `history` from the formula of mixed.py."""
    score = critic.gates.bias.clone()
    for n, (p, total, kinds) in enumerate(interpolated(critic, corpus, history, left_out)):
        slot = int(buckets(torch.tensor([float(total)]), torch.tensor([float(kinds)])))
        score += critic.gates.weights[critic.context - n][slot] * torch.tensor(p).clamp_min(mixed.SMALLEST).log()
    return score.log_softmax(-1)


@pytest.mark.parametrize("dense_elements", [0, mixed_counts.DENSE_ELEMENTS])
@settings(deadline=None, max_examples=25)
@given(case=cases(), known=st.booleans(), seed=st.integers(0, 99))
def test_opinion_is_the_formula(dense_elements, case, known, seed):
    """Catches a wrong count, discount, bucket or left-out token, and a context cut at the window's first token."""
    corpus, vocab_size, context, tokens, positions = case
    context = max(context, 1)
    if len(corpus) < context + 2:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixed_counts, "DENSE_ELEMENTS", dense_elements)
        patch.setattr(MixedCritic, "_fit", lambda self: None)
        critic = MixedCritic(np.array(corpus), vocab_size, context=context)
        draw = torch.Generator().manual_seed(seed)
        weights = torch.rand(context + 1, mixed.TOTALS * mixed.KINDS, generator=draw)
        critic.gates = Gates(weights, torch.randn(vocab_size, generator=draw))
        found = critic.opinion(tokens, positions if known else None).full()
    expected = []
    for place, window in zip(positions.tolist(), tokens.tolist(), strict=True):
        for t in range(len(window)):
            history = ([*corpus[:place]] if known else []) + window[: t + 1]
            left_out = place + t + 1 if known else None
            expected.append(by_hand(critic, corpus, history, left_out))
    torch.testing.assert_close(found, torch.stack(expected), atol=2e-4, rtol=1e-4)


def test_leaving_out_is_an_option():
    """Catches a switch that is ignored: with its own occurrence a critic repeats gold."""
    critics = {keep: MixedCritic(CORPUS, V, context=3, leave_one_out=keep) for keep in (True, False)}
    tokens, positions = torch.tensor(CORPUS[40:60])[None], torch.tensor([40])
    gold = torch.tensor(CORPUS[41:61])[:, None]
    ce = {}
    for keep, critic in critics.items():
        critic.gates = Gates(torch.zeros_like(critic.gates.weights), torch.zeros(V))
        critic.gates.weights[0] = 1.0  # the longest context alone speaks
        ce[keep] = -critic.opinion(tokens, positions).log_probs(gold).mean()
    assert ce[False] < ce[True] - 0.1


def test_remembering_changes_nothing(critic):
    """Catches memory of another position, and opinions that differ between the first time and the second."""
    remembering = MixedCritic(CORPUS, V, context=3, remember=True)
    positions = torch.tensor([0, 7, 130, 280])
    tokens = torch.stack([torch.tensor(CORPUS[p : p + 12]) for p in positions])
    fresh = critic.opinion(tokens, positions).full()
    for _ in range(2):
        torch.testing.assert_close(remembering.opinion(tokens, positions).full(), fresh, atol=4e-3, rtol=1e-3)
    other = critic.opinion(tokens, None).full()
    torch.testing.assert_close(remembering.opinion(tokens, None).full(), other)


def test_a_long_text_is_not_remembered(monkeypatch):
    """Catches a table that outgrows the machine."""
    monkeypatch.setattr(mixed, "MEMORY_BYTES", 2 * V * len(CORPUS) - 1)
    assert MixedCritic(CORPUS, V, context=1, remember=True)._memory is None


def test_building_twice_gives_one_critic(critic):
    """Catches a fit that draws from the global generator, so that a resumed run meets another judge."""
    torch.manual_seed(5)
    again = MixedCritic(CORPUS, V, context=3)
    torch.testing.assert_close(again.gates.weights, critic.gates.weights, rtol=0, atol=0)
    torch.testing.assert_close(again.gates.bias, critic.gates.bias, rtol=0, atol=0)


def test_discounts_are_chen_and_goodmans():
    """Catches an estimate from the wrong counts of counts."""
    y = 8 / (8 + 2 * 4)
    expected = np.array([0, 1 - 2 * y * 4 / 8, 2 - 3 * y * 3 / 4, 3 - 4 * y * 2 / 3])
    counts = np.array([1] * 8 + [2] * 4 + [3] * 3 + [4] * 2)
    np.testing.assert_allclose(mixed_counts.discounts_of(counts), expected)
    np.testing.assert_allclose(mixed_counts.discounts_of(np.array([1, 1, 2])), np.array([0, 0.5, 1, 1.5]))


def test_every_count_is_in_the_table():
    """Catches a context or a count that is lost between the levels."""
    table = CountTable.build(CORPUS, V, 2)
    rows = torch.full((1,), mixed_counts.ROOT)
    for token in CORPUS[10:12]:
        rows = table.step(rows, torch.tensor([token]))
    pair = CORPUS[10:12].tolist()
    text = CORPUS.tolist()
    for token in range(V):
        count = sum(text[i : i + 3] == [*pair, token] for i in range(len(text)))
        assert table.count_of(rows, torch.tensor([token])).item() == count
    assert table.totals[rows].item() == sum(text[i : i + 2] == pair for i in range(len(text) - 1))


def test_it_judges_new_text_better_than_interpolation(shakespeare):
    """Catches gates that were not fitted, or to the wrong token."""
    characters = sorted(set(shakespeare))
    ids = np.array([characters.index(c) for c in shakespeare[:64_000]])
    train, held_out, vocab_size = ids[:60_000], ids[60_000:], len(characters)
    tokens, gold = torch.tensor(held_out[:-1])[None], torch.tensor(held_out[1:])[:, None]
    mixed_ce = -MixedCritic(train, vocab_size).opinion(tokens).log_probs(gold).mean()
    plain = [-NgramCritic(train, vocab_size, context=n).opinion(tokens).log_probs(gold).mean() for n in (3, 4, 5)]
    assert mixed_ce < min(plain) - 0.05


def test_bad_settings_are_refused():
    """Catches a vocabulary that would need gigabytes, and a text without a single context."""
    with pytest.raises(ConfigError, match=r"critic.kind = 'mixed': .*50,257 tokens.*--critic.kind ngram"):
        MixedCritic(CORPUS, 50_257)
    with pytest.raises(ConfigError, match="too few tokens"):
        MixedCritic(CORPUS[:4], V, context=3)
    with pytest.raises(ConfigError, match=r"critic.mixed-context = 0"):
        MixedCritic(CORPUS, V, context=0)


def test_a_text_of_one_token_is_certain():
    """Catches a division by zero where nothing can follow but one token."""
    opinion = MixedCritic(np.zeros(30, np.int64), 1, context=2).opinion(torch.zeros(1, 5, dtype=torch.int64))
    assert opinion.full().abs().max() < 1e-6 and not math.isnan(opinion.full().sum())
