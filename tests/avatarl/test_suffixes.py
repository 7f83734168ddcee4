"""The suffix array and its critic against counting by hand: every length, own occurrences left out, any vocabulary."""

import sys
from collections.abc import Sequence
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avatarl import suffixes
from avatarl.suffixes import NO_TOKEN, SuffixCritic, SuffixStatistics, contexts_of
from config import ConfigError

SPREAD = 9_362  # ids of a few tokens spread over 65,536: three of them fill a key


@contextmanager
def small(stride: int, per_key: int | None = None):
    """Running counts at every `stride` places, and `per_key` tokens in a key, so that short texts meet every case."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suffixes, "LEAST_STRIDE", stride)
        if per_key:
            patch.setattr(suffixes, "tokens_per_key", lambda vocab_size: per_key)
        yield


def ends(text: Sequence[int], context: Sequence[int], without: int = NO_TOKEN) -> list[int]:
    """Places of `text` that stand after `context`, but for one, by looking at every place."""
    n = len(context)
    return [i for i in range(n, len(text)) if list(text[i - n : i]) == list(context) and i != without]


def longest_by_hand(text: list[int], context: list[int], without: int, min_count: int) -> tuple[list[int], int]:
    """The places after the longest suffix of `context` that has enough of them, and its length."""
    context = context[context.index(NO_TOKEN) + 1 :] if NO_TOKEN in context else context
    for n in reversed(range(len(context) + 1)):
        found = ends(text, context[len(context) - n :], without)
        if len(found) >= min_count or n == 0:
            return found, n
    raise AssertionError


def witten_bell(
    text: list[int], vocab_size: int, backoff: Fraction, context: list[int], without: int
) -> list[Fraction]:
    """The critic's formula in exact fractions."""
    p = [Fraction(1, vocab_size)] * vocab_size
    for n in range(len(context) + 1):
        after = [text[i] for i in ends(text, context[len(context) - n :], without)]
        if after:
            spread = backoff * len(set(after))
            p = [(after.count(w) + spread * p[w]) / (len(after) + spread) for w in range(vocab_size)]
    return p


def found_in(string: str, context: str, without: int) -> list[int]:
    """`ends`, by searching a string that is too long for it; the empty context apart, which is there anyway."""
    found, start = [], string.find(context) if context else len(string)
    while 0 <= start < len(string) - len(context):
        found.append(start + len(context))
        start = string.find(context, start + 1)
    return [place for place in found if place != without]


@st.composite
def cases(draw):
    """(text, contexts (N, C), places (N,)): from the text itself, from elsewhere, and padded at the start."""
    token = st.integers(0, draw(st.integers(1, 6)))
    text = [0, 1, *draw(st.lists(token, max_size=50))]
    width = draw(st.integers(0, 9))
    contexts, places = [], []
    for _ in range(draw(st.integers(1, 5))):
        if draw(st.booleans()):
            place = draw(st.integers(0, len(text) - 1))
            context = ([NO_TOKEN] * width + text[:place])[place : place + width]
        else:
            place = draw(st.sampled_from([NO_TOKEN, 0, len(text) - 1]))
            context = draw(st.lists(token, min_size=width, max_size=width))
        contexts.append(context)
        places.append(place)
    return text, torch.tensor(contexts, dtype=torch.int64).view(len(contexts), width), torch.tensor(places)


@pytest.mark.parametrize(("stride", "per_key"), [(32, None), (1, 1), (3, 2), (5, 4)])
@settings(deadline=None, max_examples=40)
@given(case=cases(), leave_one_out=st.booleans(), min_count=st.integers(1, 3))
def test_longest_match_is_found_by_looking_everywhere(stride, per_key, case, leave_one_out, min_count):
    """Catches a wrong interval or count, and an own occurrence that is taken out after the length was decided."""
    text, context, places = case
    with small(stride, per_key):
        statistics = SuffixStatistics.build(np.array(text), 7, max_context=9)
        counts, lengths = statistics.longest(context, places if leave_one_out else None, min_count)
        probs = statistics.probs(context, places if leave_one_out else None, min_count)
    for n, row in enumerate(context.tolist()):
        without = int(places[n]) if leave_one_out else NO_TOKEN
        found, length = longest_by_hand(text, row, without, min_count)
        assert int(lengths[n]) == length
        assert counts[n].tolist() == np.bincount([text[i] for i in found], minlength=7).tolist()
        torch.testing.assert_close(probs[n], counts[n] / max(1, len(found)))


@settings(deadline=None, max_examples=40)
@given(case=cases())
def test_tokens_beyond_256(case):
    """Catches ids that are cut to bytes, packed keys that run into one another, and tokens 0 and 65,535."""
    text, context, places = case
    wide = torch.where(context < 0, context, context * SPREAD + 9_363 * (context == 6))
    big = [token * SPREAD + 9_363 * (token == 6) for token in text]
    statistics = SuffixStatistics.build(np.array(big), 65_536, max_context=9)
    counts, lengths = statistics.longest(wide, places)
    for n, row in enumerate(context.tolist()):
        found, length = longest_by_hand(text, row, int(places[n]), 1)
        assert int(lengths[n]) == length and int(counts[n].sum()) == len(found)
        assert all(counts[n, big[i]] == sum(text[j] == text[i] for j in found) for i in found)


@pytest.mark.parametrize(("stride", "per_key"), [(32, None), (2, 2)])
@settings(deadline=None, max_examples=30)
@given(case=cases(), leave_one_out=st.booleans(), backoff=st.sampled_from([Fraction(1), Fraction(12)]))
def test_the_critic_is_its_formula(stride, per_key, case, leave_one_out, backoff):
    """Catches a wrong weight, fallback or place, and contexts from before the window."""
    text, _, places = case
    width = min(6, len(text))
    starts = (places.clamp_min(0) % (len(text) - width + 1)).unique()
    tokens = torch.tensor(text).unfold(0, width, 1)[starts].clone()
    tokens[0, 0] = 1 - tokens[0, 0].clamp_max(1)  # not the text's own: then only shorter contexts hold the occurrence
    with small(stride, per_key):
        critic = SuffixCritic(np.array(text), 7, max_context=4, backoff=float(backoff), leave_one_out=leave_one_out)
        found = critic.opinion(tokens, starts).full().exp()
    expected = []
    for start, row in zip(starts.tolist(), tokens.tolist(), strict=True):
        for t in range(width):
            place = start + t + 1 if leave_one_out and start + t + 1 < len(text) else NO_TOKEN
            expected.append(witten_bell(text, 7, backoff, row[max(0, t - 3) : t + 1], place))
    torch.testing.assert_close(found, torch.tensor([[float(x) for x in p] for p in expected]), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.sum(1), torch.ones(len(found)))


def test_an_opinion_is_made_in_parts():
    """Catches rows that are not a slice, chunks in the wrong order, and a top-k that is no ranking."""
    text = np.random.default_rng(0).integers(0, 5, 300)
    critic, tokens = SuffixCritic(text, 5), torch.from_numpy(text).unfold(0, 8, 40)
    positions = torch.arange(0, 293, 40)
    opinion = critic.opinion(tokens, positions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suffixes, "CHUNK_ENTRIES", 35)
        torch.testing.assert_close(critic.opinion(tokens, positions).full(), opinion.full(), rtol=0, atol=0)
    part = opinion.rows(5, 23)
    torch.testing.assert_close(part.full(), opinion.full()[5:23], rtol=0, atol=0)
    ids = part.top_ids(5)
    assert (part.log_probs(ids).diff() <= 0).all() and torch.equal(ids.sort().values, torch.arange(5).expand(18, -1))


def test_real_text(shakespeare):
    """Catches anything that only long texts meet: wide intervals, many running counts, several keys."""
    points = np.frombuffer(shakespeare[:120_000].encode("utf-32-le"), np.uint32)
    text = np.unique(points, return_inverse=True)[1]
    statistics = SuffixStatistics.build(text, int(text.max()) + 1, max_context=24)
    stream, places = torch.from_numpy(text), torch.arange(24, 120_000, 17_011)
    context = stream.unfold(0, 24, 1)[places - 24]
    counts, lengths = statistics.longest(context, places)
    string = "".join(map(chr, text + 256))
    for n, place in enumerate(places.tolist()):
        found = [found_in(string, string[place - m : place], place) for m in range(25)]
        length = max(m for m in range(25) if found[m])
        assert int(lengths[n]) == length
        assert counts[n].tolist() == np.bincount(text[found[length]], minlength=counts.shape[1]).tolist()


def test_the_default_backoff_is_near_the_best(shakespeare):
    """Catches a default that was chosen for another formula: leave-one-out likelihood of tinyshakespeare."""
    points = np.frombuffer(shakespeare.encode("utf-32-le"), np.uint32)
    text = np.unique(points, return_inverse=True)[1][:1_003_854]
    stream, places = torch.from_numpy(text), torch.arange(0, 1_000_000, 19_997)
    tokens, gold = stream.unfold(0, 64, 1)[places], stream.unfold(0, 64, 1)[places + 1].reshape(-1, 1)
    critic = SuffixCritic(text, 65)
    default, ce = critic.backoff, {}
    for backoff in (1.0, default / 2, default, 2 * default):
        critic.backoff = backoff
        ce[backoff] = -critic.opinion(tokens, places).log_probs(gold).view(-1, 64)[:, 10:].mean().item()
    assert min(ce, key=ce.__getitem__) == default and ce[1.0] > ce[default] + 0.2
    assert ce[default] < 1.4454  # absolute discounting's best


def test_bad_input_is_named(monkeypatch):
    """Catches a division by zero where there is nothing to learn, and a traceback where a library is missing."""
    with pytest.raises(ConfigError, match="nothing to learn"):
        SuffixStatistics.build(np.zeros(9, np.int64), 3)
    with pytest.raises(ConfigError, match="0 to 3"):
        SuffixStatistics.build(np.arange(4), 3)
    with pytest.raises(ConfigError, match="use 1 or more"):
        SuffixStatistics.build(np.arange(4), 4, max_context=0)
    with pytest.raises(ConfigError, match="backoff of the suffix critic"):
        SuffixCritic(np.arange(4), 4, backoff=0)
    monkeypatch.setitem(sys.modules, "pydivsufsort", None)
    with pytest.raises(ConfigError, match="pip install pydivsufsort"):
        SuffixStatistics.build(np.arange(4), 4)


def test_contexts_end_at_their_token():
    """Catches contexts that are shifted by one, or that wrap round to the row before."""
    assert contexts_of(torch.tensor([[1, 2, 3], [4, 5, 6]]), 2).tolist() == [
        [-1, 1], [1, 2], [2, 3], [-1, 4], [4, 5], [5, 6],
    ]  # fmt: skip


@pytest.mark.gpu
def test_gpu_agrees():
    """Catches tensors that stay on the CPU, and results that differ between devices."""
    text = torch.from_numpy(np.random.default_rng(4).integers(0, 9, 2000))
    tokens, positions = text.unfold(0, 16, 90), torch.arange(0, 1985, 90)
    found = []
    for device in ("cpu", "cuda"):
        critic = SuffixCritic(text, 9, device=device)
        on_device = tokens.to(device), positions.to(device)
        counts, lengths = critic.statistics.longest(contexts_of(on_device[0], 8))
        found.append([x.cpu() for x in (critic.opinion(*on_device).full(), counts, lengths)])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference)
