"""The worth of a text: each term against a count by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avatarl.ngram import NgramCritic
from surgery.judge import TextJudge, distinct_share
from tests.surgery.tasks import TEXT, judge

texts = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@given(texts, st.integers(1, 4))
def test_distinct_share_is_a_set_of_runs(text, n):
    """Catches runs that are counted across texts, a first occurrence that counts as repeated, and off-by-one ends."""
    runs = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
    expected = len(set(runs)) / len(runs) if runs else 1.0
    other = [2 - token for token in text]
    found = distinct_share(torch.tensor([text, other]), n)
    assert found.tolist() == pytest.approx([expected, expected])


def test_likelihood_is_the_mean_over_new_tokens_alone():
    """Catches a likelihood read one position late, one that counts the prompt, and one that ignores it."""
    critic = NgramCritic(TEXT, 13, context=1)
    prompt, text = [3, 4], [5, 6, 7]
    whole = torch.tensor([prompt + text])
    full = critic.opinion(whole, None).full().view(1, 5, 13)
    expected = sum(float(full[0, i - 1, whole[0, i]]) for i in (2, 3, 4)) / 3
    found = judge().likelihood(torch.tensor([prompt]), torch.tensor([text]))
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_likelihood_per_character():
    """Catches judges of long tokens that look worse than those of characters."""
    one = judge()
    long = TextJudge(one.critic, lengths=torch.full((13,), 4))
    prompts, text = torch.tensor([[1, 2]]), torch.tensor([[3, 4, 5]])
    assert float(long.likelihood(prompts, text)) == pytest.approx(float(one.likelihood(prompts, text)) / 4)


def test_the_terms_add_up_with_their_signs():
    """Catches repetition that is rewarded, and a weight that reaches the wrong term."""
    one = TextJudge(judge().critic, diversity_weight=2.0, repetition_weight=3.0)
    varied, dull = [1, 2, 3, 4, 5, 6, 7, 8], [1] * 8
    quality = one.quality(torch.tensor([[1], [1]]), torch.tensor([varied, dull]))
    assert quality.diversity.tolist() == pytest.approx([1.0, 1 / 7])
    assert quality.repetition.tolist() == pytest.approx([0.0, 4 / 5])
    by_hand = quality.likelihood + 2 * quality.diversity - 3 * quality.repetition
    assert torch.equal(quality.total, by_hand) and all(math.isfinite(v) for v in quality.total)
