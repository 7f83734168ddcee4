"""The n-gram critic and ladder against counting by hand and against DESIGN section 3's reference table."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avatarl import ngram
from avatarl.ngram import NgramCritic, leave_one_out_ladder, ngram_ladder
from config import ConfigError

TRAIN_CHARACTERS = 1_003_854  # nine tenths of tinyshakespeare, as in DESIGN's table


def oracle(corpus, vocab_size, context, discount, before, place=None):
    """Next-token distribution after `before`, straight from the formula; corpus[place] is left out."""
    p = [Fraction(1, vocab_size)] * vocab_size
    for n in range(min(context, len(before)) + 1):
        wanted = list(before[len(before) - n :])
        ends = [i for i in range(n, len(corpus)) if corpus[i - n : i] == wanted and i != place]
        counts = Counter(corpus[i] for i in ends)
        if ends:
            spread = discount * len(counts)
            p = [(max(counts[w] - discount, 0) + spread * p[w]) / len(ends) for w in range(vocab_size)]
    return p


@contextmanager
def limits(dense: int, chunk: int) -> Iterator[None]:
    """Store and compute as if only so many table entries or probabilities fitted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram, "DENSE_ENTRIES", dense)
        patch.setattr(ngram, "CHUNK_ENTRIES", chunk)
        yield


LIMITS = {"dense": (2**26, 2**23), "mixed": (40, 2**23), "sparse": (0, 2**23), "sparse, chunked": (0, 9)}


@st.composite
def cases(draw):
    """(corpus, V, context, tokens (B, T), positions (B,)): windows of the corpus, some tokens replaced."""
    vocab_size = draw(st.integers(1, 7))
    token = st.integers(0, vocab_size - 1)
    context = draw(st.integers(0, 4))
    corpus = draw(st.lists(token, min_size=max(context + 1, 2), max_size=40))
    length = draw(st.integers(1, min(6, len(corpus))))
    positions = draw(st.lists(st.integers(0, len(corpus) - length), min_size=1, max_size=3))
    windows = [corpus[p : p + length] for p in positions]
    swaps = draw(st.lists(st.tuples(st.integers(0, len(windows) - 1), st.integers(0, length - 1), token), max_size=3))
    for b, t, new in swaps:
        windows[b][t] = new
    return corpus, vocab_size, context, torch.tensor(windows), torch.tensor(positions)


@pytest.mark.parametrize("storage", LIMITS)
@settings(deadline=None, max_examples=40)
@given(case=cases(), leave_one_out=st.booleans(), discount=st.sampled_from([Fraction(1, 4), Fraction(3, 4)]))
def test_opinion_is_the_formula(storage, case, leave_one_out, discount):
    """Catches a wrong weight, count, context, left-out token or fallback, in every way of storing counts."""
    corpus, vocab_size, context, tokens, positions = case
    with limits(*LIMITS[storage]):
        critic = NgramCritic(np.array(corpus), vocab_size, context=context, discount=float(discount))
        opinion = critic.opinion(tokens, positions if leave_one_out else None)
        p = opinion.full().exp()
        ids = torch.arange(vocab_size).flip(0).repeat(len(p), 1)
        torch.testing.assert_close(opinion.log_probs(ids).exp(), p.flip(-1))
    expected = []
    for b, window in enumerate(tokens.tolist()):
        for t in range(len(window)):
            place = int(positions[b]) + t + 1 if leave_one_out else None
            expected.append(oracle(corpus, vocab_size, context, discount, window[: t + 1], place))
    torch.testing.assert_close(p, torch.tensor([[float(x) for x in row] for row in expected]))
    torch.testing.assert_close(p.sum(-1), torch.ones(len(p)))


@pytest.mark.parametrize("storage", LIMITS)
def test_rows_are_a_slice_and_top_ids_a_ranking(storage):
    """Catches a slice that loses the left-out token, and a top-k that breaks ties by chance."""
    corpus = torch.from_numpy(np.random.default_rng(0).integers(0, 9, 300))
    tokens, positions = corpus.unfold(0, 8, 1)[::37], torch.arange(0, 293, 37)
    with limits(*LIMITS[storage]):
        opinion = NgramCritic(corpus, 13, context=3).opinion(tokens, positions)  # ids 9 … 12 never occur: ties
        full, ids = opinion.full(), opinion.top_ids(13)
        part = opinion.rows(5, 23)
        torch.testing.assert_close(part.full(), full[5:23], rtol=0, atol=0)
        assert torch.equal(part.top_ids(4), ids[5:23, :4])
        torch.testing.assert_close(part.log_probs(ids[5:23]), full[5:23].gather(1, ids[5:23]))
    assert torch.equal(ids.sort(-1).values, torch.arange(13).expand_as(ids))
    assert (full.gather(1, ids).diff() <= 0).all()
    assert (ids[ids >= 9].view(-1, 4) == torch.arange(9, 13)).all()


def test_ties_go_to_the_lowest_id():
    """Catches ties that go to the highest id or to whatever comes first in memory."""
    opinion = NgramCritic(np.array([5, 5, 5, 2, 5, 5]), 7, context=0).opinion(torch.tensor([[5, 2]]))
    assert opinion.top_ids(5).tolist() == [[5, 2, 0, 1, 3]] * 2


def test_a_window_knows_nothing_before_its_start():
    """Catches contexts taken from before the window, which is all that the student sees."""
    corpus = np.random.default_rng(1).integers(0, 4, 500)
    critic, tokens = NgramCritic(corpus, 4, context=3), torch.from_numpy(corpus)
    inner = critic.opinion(tokens[None, 100:110], torch.tensor([100])).full()
    alone = critic.opinion(tokens[None, 98:110], torch.tensor([98])).full()
    torch.testing.assert_close(inner[2:], alone[4:])
    assert not torch.allclose(inner[0], alone[2])


def test_switched_off_leave_one_out_ignores_positions():
    """Catches a critic that leaves gold out although it was told not to."""
    corpus = np.random.default_rng(2).integers(0, 5, 200)
    critic = NgramCritic(corpus, 5, leave_one_out=False)
    tokens = torch.from_numpy(corpus[None, 20:40])
    plain = critic.opinion(tokens, torch.tensor([20])).full()
    assert torch.equal(plain, critic.opinion(tokens).full())
    assert not torch.equal(plain, NgramCritic(corpus, 5).opinion(tokens, torch.tensor([20])).full())


def test_long_contexts_of_a_large_vocabulary():
    """Catches context keys that overflow 64 bits (50,257 to the 16th power), and sparse rows read wrongly."""
    vocab_size, unit = 50_257, np.random.default_rng(3).integers(0, 50_257, 60)
    corpus = np.concatenate([unit, unit[:40], unit[:50]])
    opinion = NgramCritic(corpus, vocab_size, context=16).opinion(torch.from_numpy(corpus[None, 70:95]))
    p = opinion.full().exp()
    torch.testing.assert_close(p.sum(-1), torch.ones(25))
    ids = torch.from_numpy(unit).repeat(25, 1)
    torch.testing.assert_close(opinion.log_probs(ids).exp(), p.gather(1, ids))
    small = {int(token): i for i, token in enumerate(dict.fromkeys(corpus))}
    renamed = [small[int(token)] for token in corpus]
    for t in (3, 24):
        left = oracle(renamed, vocab_size, 16, 0.75, renamed[70 : 71 + t])
        ours = p[t, torch.tensor(list(small))]
        torch.testing.assert_close(ours, torch.tensor([float(x) for x in left[: len(small)]]))


@pytest.mark.parametrize("seed", range(3))
def test_ladders_are_the_formula(seed):
    """Catches a wrong suffix, fallback, guess or offset in the ladders, which score on their own."""
    stream = np.random.default_rng(seed).integers(0, 4, 150)
    train, val = stream[:110].tolist(), stream[110:].tolist()
    ladder, own = ngram_ladder(stream[:110], stream[110:], 5), leave_one_out_ladder(stream[:110], 5)
    assert [r["context"] for r in ladder] == [r["context"] for r in own] == [1, 2, 3, 4, 5, 6]
    for n in (1, 2, 4, 6):
        ps = [oracle(train, 5, n, Fraction(3, 4), val[:t]) for t in range(10, len(val))]
        golds = val[10:]
        ce = -np.log([float(p[g]) for p, g in zip(ps, golds, strict=True)]).mean()
        accuracy = np.mean([p.index(max(p)) == g for p, g in zip(ps, golds, strict=True)])
        assert ladder[n - 1]["ce"] == pytest.approx(ce, abs=1e-9)
        assert ladder[n - 1]["accuracy"] == pytest.approx(accuracy, abs=1e-9)
        left_out = [oracle(train, 5, n, Fraction(3, 4), train[:t], t)[train[t]] for t in range(10, len(train))]
        assert own[n - 1]["ce"] == pytest.approx(-np.log([float(p) for p in left_out]).mean(), abs=1e-9)


@pytest.fixture(scope="module")
def characters(shakespeare: str) -> np.ndarray:
    """tinyshakespeare as ids of its sorted characters."""
    points = np.frombuffer(shakespeare.encode("utf-32-le"), np.uint32)
    return np.unique(points, return_inverse=True)[1]


def test_reference_table(characters):
    """Catches any departure from DESIGN's n-gram: both of its rows, to half a unit of the last digit."""
    train, val = characters[:TRAIN_CHARACTERS], characters[TRAIN_CHARACTERS:]
    ladder = ngram_ladder(train, val, 65)
    assert [r["ce"] for r in ladder] == pytest.approx([2.4865, 2.0560, 1.7896, 1.6922, 1.7214, 1.7868], abs=5e-4)
    accuracy = [100 * r["accuracy"] for r in ladder]
    assert accuracy == pytest.approx([27.0, 38.1, 47.2, 52.7, 54.2, 54.8], abs=0.1)
    own = [r["ce"] for r in leave_one_out_ladder(train, 65)]
    assert own == pytest.approx([2.4537, 1.9202, 1.5727, 1.4502, 1.4547, 1.5058], abs=5e-4)


def test_critic_reproduces_the_reference(characters):
    """Catches a critic that departs from DESIGN's table at real size: each split is one long window."""
    train, val = torch.from_numpy(characters).split([TRAIN_CHARACTERS, len(characters) - TRAIN_CHARACTERS])
    critic = NgramCritic(train, 65, context=4)
    own = critic.opinion(train[None, :-1], torch.tensor([0])).log_probs(train[1:, None])
    assert -own[9:].mean().item() == pytest.approx(1.4502, abs=5e-4)
    unseen = critic.opinion(val[None, :-1])
    assert -unseen.log_probs(val[1:, None])[9:].mean().item() == pytest.approx(1.6922, abs=5e-4)


@pytest.mark.parametrize(
    ("corpus", "arguments", "named"),
    [
        ([0, 1, 3], {}, "0 to 3"),
        ([0, -1, 2], {}, "-1 to 2"),
        ([0, 1], {"context": 2}, "at least 3"),
        ([0, 1, 2], {"context": -1}, "ngram-context"),
        ([0, 1, 2], {"discount": 1.0}, "ngram-discount"),
    ],
)
def test_bad_input_is_named(corpus, arguments, named):
    """Catches counts from wrong ids, or an error from deep inside numpy, where one line would help."""
    with pytest.raises(ConfigError, match=named):
        NgramCritic(np.array(corpus), 3, **{"context": 1, **arguments})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("storage", ["dense", "sparse"])
def test_gpu_agrees_and_never_waits(storage):
    """Catches a host synchronisation per opinion, and results that differ between devices."""
    corpus = torch.from_numpy(np.random.default_rng(4).integers(0, 20, 2000))
    tokens, positions = corpus.unfold(0, 32, 1)[::100], torch.arange(0, 1969, 100)
    ids = torch.arange(5).repeat(tokens.numel(), 1)

    def results(device: str) -> tuple[Tensor, Tensor]:
        critic = NgramCritic(corpus, 20, device=device)
        arguments = tokens.to(device), positions.to(device)
        where = ids.to(device)
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        opinion = critic.opinion(*arguments)
        opinion.top_ids(8)
        log_probs = opinion.log_probs(where)
        torch.cuda.set_sync_debug_mode("default")
        return log_probs.cpu(), opinion.full().cpu()

    with limits(*LIMITS[storage]):
        for ours, reference in zip(results("cuda"), results("cpu"), strict=True):
            torch.testing.assert_close(ours, reference)
