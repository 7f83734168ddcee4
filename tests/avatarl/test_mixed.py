"""The mixed critic against counting by hand, against itself, and against other counts on real text."""

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avatarl import mixed
from avatarl.mixed import MixedCritic, held_out
from avatarl.mixed_contexts import KEY_BITS, NOTHING, Contexts
from avatarl.mixed_counts import ContextCounts
from avatarl.suffixes import SuffixCritic
from config import ConfigError
from tests.avatarl.mixed_oracle import Oracle, looked_at
from tests.avatarl.test_ngram import cases

V = 5
STRINGS = ["a", "A", "b", " ", "\n"]
PIECES = ["th", "er", " a", "\n", "e"]
CORPUS = np.random.default_rng(0).integers(0, V, 300)
CORPUS[150:200] = CORPUS[20:70]  # something to remember


def quick(corpus: object, vocab_size: int, context: int, strings: list[str], seed: int = 0) -> MixedCritic:
    """A critic whose network was drawn instead of fitted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixed, "fit", lambda *_: None)
        critic = MixedCritic(np.array(corpus), vocab_size, context=context, strings=strings)
    draw = torch.Generator().manual_seed(seed)
    for parameter in critic.weigher.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype) / 3
    return critic


@pytest.fixture(scope="module")
def critic() -> MixedCritic:
    """A critic of a small corpus, with a network that was fitted."""
    return MixedCritic(CORPUS, V, context=3, strings=STRINGS)


@settings(deadline=None, max_examples=40)
@given(case=cases(), known=st.booleans(), spelled=st.sampled_from(["", "letters", "pieces"]), seed=st.integers(0, 99))
def test_opinion_is_the_formula(case, known, spelled, seed):
    """Catches a wrong count, fallback or left-out token, and a context cut at the window's first token."""
    corpus, vocab_size, context, tokens, positions = case
    context = max(context, 1)
    if len(corpus) < context + 2:
        return
    letters = [*STRINGS, "'", "C", "c", "-", "B", "d", "e"]
    pieces = [*PIECES, " be", "", "in", " ", ", ", "\ufffd", "g"]
    strings = {"letters": letters, "pieces": pieces}.get(spelled, [])[: vocab_size if vocab_size <= 12 else 0]
    critic = quick(corpus, vocab_size, context, strings, seed)
    found = critic.opinion(tokens, positions if known else None).full()
    oracle, expected = Oracle(critic, list(corpus), strings), []
    for place, window in zip(positions.tolist(), tokens.tolist(), strict=True):
        for t in range(len(window)):
            history = ([*corpus[:place]] if known else []) + window[: t + 1]
            expected.append(oracle.log_probs(history, place + t + 1 if known else None))
    torch.testing.assert_close(found, torch.stack(expected), atol=2e-4, rtol=1e-4)


def test_after_is_what_stands_alone(critic):
    """Catches a writer that is told of other contexts than the judge, or less than its reach."""
    oracle, context = Oracle(critic, CORPUS.tolist(), STRINGS), torch.tensor(CORPUS[100 : 100 + critic.reach])
    torch.testing.assert_close(critic.after(context[None]).full()[0], oracle.log_probs(context.tolist()))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_keys_tell_apart_what_contexts_look_at(data):
    """Catches two contexts that share a key, one context with two, and what lies beyond reach but is looked at."""
    letters, pieces = ["a", "A", "b", "'", " ", ".", "\n"], ["th", "er", "e", " a", "s", "in", "\n"]
    strings = data.draw(st.sampled_from([letters, pieces, []]))
    contexts = Contexts(7, 3, strings)
    length = data.draw(st.sampled_from([3, 12, 80, 150]))
    stream = torch.tensor([data.draw(st.lists(st.integers(0, 6), min_size=length, max_size=length)) for _ in range(2)])
    first = torch.tensor([0, data.draw(st.integers(0, 2))])
    keys = contexts.keys(stream, first)
    assert torch.equal(contexts.keys(stream, first, 2), keys[:, -2:])
    seen: dict[tuple[int, object], int] = {}
    for b, text in enumerate(stream.tolist()):
        for t in range(int(first[b]), length):
            views = looked_at(text[int(first[b]) : t + 1], 3, strings, contexts.reach)
            for j, (view, key) in enumerate(zip(views, keys[b, t].tolist(), strict=True)):
                assert (view is None) == (key == NOTHING)
                assert view is None or seen.setdefault((j, view), key) == key
    assert len(set(seen.values())) == len(seen) and all(0 <= key < 2**KEY_BITS for key in seen.values())


def test_kinds_of_context_are_those_of_the_vocabulary():
    """Catches letters and lines in a vocabulary of pieces, and a fallback that is longer than what falls back."""
    tokens = ("last 1", "last 2", "gap")
    assert Contexts(3, 2).names == tokens
    assert Contexts(3, 2, ["a", " b", "th"]).names == (*tokens, "word", "word, 1 before")
    for longest, (strings, further) in product(range(1, 8), ((STRINGS, 6), (PIECES, 3))):
        contexts = Contexts(V, longest, strings)
        assert len(contexts.names) == len(contexts.fallbacks) == longest + further
        assert all(shorter < j for j, shorter in enumerate(contexts.fallbacks))
        assert max(contexts.fallbacks) < longest


def test_leaving_out_is_an_option():
    """Catches a switch that is ignored: with its own occurrence a critic repeats gold."""
    tokens, positions = torch.tensor(CORPUS[40:60])[None], torch.tensor([40])
    gold = torch.tensor(CORPUS[41:61])[:, None]
    ce = {}
    for keep in (True, False):
        critic = quick(CORPUS, V, 3, STRINGS)
        critic.leave_one_out = keep
        for parameter in critic.weigher.parameters():
            parameter.data.zero_()
        critic.weigher.outer.bias[2] = 1.0  # the last three tokens alone speak
        ce[keep] = -critic.opinion(tokens, positions).log_probs(gold).mean()
    assert ce[False] < ce[True] - 0.1


@pytest.mark.parametrize(
    ("strings", "parts"), [([], 3), (STRINGS, 4), (PIECES, 3)], ids=["tokens", "characters", "pieces"]
)
def test_the_network_learns_from_what_the_rest_says(strings, parts, monkeypatch):
    """Catches counts of the held-out stretch itself, whose long contexts would then always be right."""
    monkeypatch.setattr(mixed, "FIT_PART", len(CORPUS) // parts - 1)
    critic = quick(CORPUS, V, 2, strings)
    keys = critic.contexts.keys(torch.from_numpy(CORPUS)[None, :-1])[0]
    _, entry_of = ContextCounts.build(keys, torch.from_numpy(CORPUS[1:]))
    log_p, known, gold = held_out(critic, keys, entry_of)
    oracle, expected = Oracle(critic, CORPUS.tolist(), strings), []
    length = len(CORPUS) - 1
    for part in range(parts):
        start, stop = (i * length // parts for i in (part, part + 1))
        places = range(start + 1, stop + 1)  # of the tokens to foretell
        for place in places:
            own_log_p, own_known = oracle.experts(oracle.views[place - 1], places)
            expected.append([CORPUS[place], *own_known.tolist(), *own_log_p.flatten().tolist()])
    found = torch.cat((gold[:, None], known, log_p.flatten(1)), 1).tolist()
    assert len(found) == len(expected)
    torch.testing.assert_close(torch.tensor(ordered(found)), torch.tensor(ordered(expected)), atol=6e-3, rtol=2e-3)


def test_a_longer_text_has_more_parts():
    """Catches parts of a small text so short that the rest is too much like them, and ever more of them."""
    part = mixed.FIT_PART
    assert [mixed.parts_of(n) for n in (5, 4 * part - 1, 4 * part, 5 * part, 99 * part)] == [3, 3, 4, 5, 6]


def ordered(rows: list[list[float]]) -> list[list[float]]:
    """Rows in an order that rounding does not change."""
    return sorted(rows, key=lambda row: [round(x, 1) for x in row])


def test_a_table_counts_every_place():
    """Catches an entry that counts for another context, places whose context cannot be told, and stale sums."""
    top = 2**KEY_BITS - 1
    keys = torch.tensor([[7, 9, 7, NOTHING, 7, 9], [top, top, top, 21, top, top]]).T
    following = torch.tensor([0, 1, 2, 1, 0, 1])
    table, entry_of = ContextCounts.build(keys, following)
    rows = table.find(torch.tensor([[7, top], [9, 21], [NOTHING, 8]]))
    expected = [[[2, 0, 1], [2, 2, 1]], [[0, 2, 0], [0, 1, 0]], [[0, 0, 0], [0, 0, 0]]]
    assert table.after(rows, 3).tolist() == expected
    assert table.totals[rows].tolist() == [[3, 5], [2, 1], [0, 0]]
    assert table.kinds[rows].tolist() == [[2, 3], [1, 1], [0, 0]]
    gone = torch.zeros(len(table.counts))
    gone[entry_of[2, 0]] = 1  # where 7 is followed by 2, once
    less = table.without(gone)
    assert less.after(rows, 3).tolist() == [[[2, 0, 0], [2, 2, 1]], *expected[1:]]
    assert less.totals[rows].tolist() == [[2, 5], [2, 1], [0, 0]]
    assert less.kinds[rows].tolist() == [[1, 3], [1, 1], [0, 0]]
    assert entry_of[3, 0] == -1 and (entry_of >= 0).sum() == 11
    for i, j in np.ndindex(tuple(entry_of.shape)):
        if entry_of[i, j] >= 0:
            assert table.tokens[entry_of[i, j]] == following[i]


def test_parts_of_a_batch_are_one(monkeypatch, critic):
    """Catches a chunk that is dropped, repeated, or judged without what is left out of it."""
    tokens, positions = torch.tensor(CORPUS[40:60]).view(2, 10), torch.tensor([40, 50])
    whole = critic.opinion(tokens, positions).full()
    monkeypatch.setattr(mixed, "CHUNK_ENTRIES", 3 * V * len(critic.contexts.names))
    torch.testing.assert_close(critic.opinion(tokens, positions).full(), whole)


def test_remembering_changes_nothing(critic):
    """Catches memory of another position, and opinions that differ between the first time and the second."""
    remembering = MixedCritic(CORPUS, V, context=3, strings=STRINGS, remember=True)
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
    again = MixedCritic(CORPUS, V, context=3, strings=STRINGS)
    for one, other in zip(again.weigher.parameters(), critic.weigher.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_network_is_kept_for_the_next_run(tmp_path, monkeypatch, critic):
    """Catches a network that is fitted again at every start, another text's taken over, and one that stays as made."""
    fitted, fit = list[int](), mixed.fit

    def counted(made_for: MixedCritic, *how: torch.Tensor) -> None:
        fitted.append(1)
        fit(made_for, *how)

    monkeypatch.setattr(mixed, "fit", counted)

    def made(text: np.ndarray = CORPUS, strings: Sequence[str] = STRINGS) -> MixedCritic:
        return MixedCritic(text, V, context=3, strings=strings, folder=tmp_path / "cache")

    for again in (made(), made()):
        for one, other in zip(again.weigher.parameters(), critic.weigher.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert len(fitted) == 1
    made(CORPUS[:-1]), made(strings=[]), made(strings=STRINGS[::-1])
    assert len(fitted) == 4 == len(list((tmp_path / "cache").iterdir()))


def test_it_judges_new_text_better_than_a_suffix_array(shakespeare):
    """Catches a network that was not fitted, or to the wrong token, and words and lines that say nothing."""
    characters = sorted(set(shakespeare))
    ids = np.array([characters.index(c) for c in shakespeare[:128_000]])
    train, new, vocab_size = ids[:120_000], ids[120_000:], len(characters)
    tokens, gold = torch.tensor(new[:-1])[None], torch.tensor(new[1:])[:, None]
    with_words, without = (MixedCritic(train, vocab_size, strings=strings) for strings in (characters, []))
    counts = SuffixCritic(train, vocab_size)
    ours, plain, suffix = (-c.opinion(tokens).log_probs(gold).mean() for c in (with_words, without, counts))
    assert ours < plain - 0.02 and plain < suffix - 0.02


def test_bad_settings_are_refused():
    """Catches a vocabulary that would need gigabytes, and a text without a single context."""
    with pytest.raises(ConfigError, match=r"critic.kind = 'mixed': .*50,257 tokens.*--critic.kind suffix"):
        MixedCritic(CORPUS, 50_257)
    with pytest.raises(ConfigError, match="too few tokens"):
        MixedCritic(CORPUS[:4], V, context=3)
    with pytest.raises(ConfigError, match=r"strings of a vocabulary = 2: name what each of the 5 tokens"):
        MixedCritic(CORPUS, V, strings=["a", "b"])
    with pytest.raises(ConfigError, match=r"critic.mixed-context = 0"):
        MixedCritic(CORPUS, V, context=0)


def test_a_long_run_of_one_token_is_no_nan():
    """Catches probabilities that sink to 0, whose logarithm poisons the network."""
    critic = MixedCritic(np.zeros(20_000, np.int64), 2, context=16)
    assert critic.opinion(torch.zeros(1, 30, dtype=torch.int64)).full().isfinite().all()


def test_an_opinion_does_not_depend_on_its_neighbours(critic):
    """Catches sums whose order changes with the batch: a resumed or divided run would hear something else."""
    tokens, positions = torch.tensor(CORPUS[40:240]).view(20, 10), torch.arange(40, 240, 10)
    whole = critic.opinion(tokens, positions).full().view(20, 10, V)
    for rows in (1, 2, 3, 7):
        part = critic.opinion(tokens[:rows, :3], positions[:rows]).full().view(rows, 3, V)
        assert torch.equal(part, whole[:rows, :3])


def test_a_text_of_one_token_is_certain():
    """Catches a division by zero where nothing can follow but one token."""
    opinion = MixedCritic(np.zeros(30, np.int64), 1, context=2).opinion(torch.zeros(1, 5, dtype=torch.int64))
    assert opinion.full().abs().max() < 1e-6 and not math.isnan(opinion.full().sum())
