"""The n-gram critic against counting by hand and against DESIGN section 3's reference table."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from avatarl import ngram, ngram_tables
from avatarl.ngram import NgramCritic
from config import ConfigError
from tests.avatarl.ngram_oracle import STORAGE, oracle, stored

TRAIN_CHARACTERS = 1_003_854  # nine tenths of tinyshakespeare, as in DESIGN's table


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


@pytest.mark.parametrize("storage", STORAGE)
@settings(deadline=None, max_examples=40)
@given(case=cases(), leave_one_out=st.booleans(), discount=st.sampled_from([Fraction(1, 4), Fraction(3, 4)]))
def test_opinion_is_the_formula(storage, case, leave_one_out, discount):
    """Catches a wrong weight, count, context, left-out token or fallback, in every way of storing counts."""
    corpus, vocab_size, context, tokens, positions = case
    with stored(storage):
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


@pytest.mark.parametrize("storage", STORAGE)
def test_rows_are_a_slice_and_top_ids_a_ranking(storage):
    """Catches a slice that loses the left-out token, and a top-k that breaks ties by chance."""
    corpus = torch.from_numpy(np.random.default_rng(0).integers(0, 9, 300))
    tokens, positions = corpus.unfold(0, 8, 1)[::37], torch.arange(0, 293, 37)
    with stored(storage):
        opinion = NgramCritic(corpus, 13, context=3).opinion(tokens, positions)  # ids 9 … 12 never occur: ties
        full, ids = opinion.full(), opinion.top_ids(13)
        part = opinion.rows(5, 23)
        torch.testing.assert_close(part.full(), full[5:23], rtol=0, atol=0)
        assert torch.equal(part.top_ids(4), ids[5:23, :4])
        torch.testing.assert_close(part.log_probs(ids[5:23]), full[5:23].gather(1, ids[5:23]))
    assert torch.equal(ids.sort(-1).values, torch.arange(13).expand_as(ids))
    assert (full.gather(1, ids).diff() <= 0).all()
    assert (ids[ids >= 9].view(-1, 4) == torch.arange(9, 13)).all()


@settings(deadline=None, max_examples=60)
@given(case=cases(), leave_one_out=st.booleans(), k=st.integers(1, 7), spare=st.integers(0, 4))
def test_top_ids_are_the_likeliest(case, leave_one_out, k, spare):
    """Catches a sparse top-k that lacks a token although no count is left out, or that holds one twice."""
    corpus, vocab_size, context, tokens, positions = case
    k = min(k, vocab_size)
    with stored("sparse"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram, "SPARE", spare)
        opinion = NgramCritic(np.array(corpus), vocab_size, context=context).opinion(
            tokens, positions if leave_one_out else None
        )
        ids, full = opinion.top_ids(k), opinion.full()
    assert ids.dtype == torch.int64 and ids.shape == (tokens.numel(), k)
    assert all(len(set(row)) == k for row in ids.tolist())
    values, best = full.gather(1, ids), full.sort(-1, descending=True).values[:, :k]
    assert (values.diff() < 1e-6).all()
    if not leave_one_out or k + spare >= vocab_size:
        torch.testing.assert_close(values, best)


def test_leaving_out_keeps_the_best_of_real_text(shakespeare):
    """Catches candidates that are too few under leave-one-out, for sparse tables of a real distribution."""
    points = np.frombuffer(shakespeare[:200_000].encode("utf-32-le"), np.uint32)
    points = points[: len(points) // 2 * 2]
    pairs = np.unique(points.reshape(-1, 2), axis=0, return_inverse=True)[1]  # two characters are one token
    corpus, vocab_size = torch.from_numpy(pairs), int(pairs.max()) + 1
    assert vocab_size > ngram_tables.DENSE_VOCABULARY
    positions = torch.arange(0, 90_000, 4_999)
    opinion = NgramCritic(corpus, vocab_size).opinion(corpus.unfold(0, 64, 1)[positions], positions)
    wanted = opinion.full().topk(16).values
    torch.testing.assert_close(opinion.log_probs(opinion.top_ids(16)), wanted)


@pytest.mark.parametrize("storage", STORAGE)
def test_ties_go_to_the_lowest_id(storage):
    """Catches ties that go to the highest id or to whatever comes first in memory."""
    with stored(storage):
        critic = NgramCritic(np.array([5, 5, 5, 2, 5, 5]), 7, context=0)
        assert critic.opinion(torch.tensor([[5, 2]])).top_ids(5).tolist() == [[5, 2, 0, 1, 3]] * 2
        pairs = NgramCritic(np.array([0, 6, 0, 4, 0, 5, 0, 3, 1, 1]), 7, context=1)
        assert pairs.opinion(torch.tensor([[0]])).top_ids(7).tolist() == [[0, 1, 3, 4, 5, 6, 2]]


@pytest.mark.parametrize("storage", STORAGE)
def test_unseen_contexts_fall_back(storage):
    """Catches tokens proposed by, or masses read from, the row that contexts without a row point at."""
    corpus = np.random.default_rng(7).integers(0, 5, 200)
    with stored(storage):
        critic = NgramCritic(corpus, 9, context=3)
        unseen = critic.opinion(torch.tensor([[8, 8, 8, 7, 1]]))  # 7 and 8 never occur
        known = critic.opinion(torch.tensor([[1]]))
        unigram = NgramCritic(corpus, 9, context=0).opinion(torch.zeros(1, 4, dtype=torch.int64))
        torch.testing.assert_close(unseen.full(), torch.cat([unigram.full(), known.full()]))
        assert torch.equal(unseen.top_ids(9), torch.cat([unigram.top_ids(9), known.top_ids(9)]))


class Largest(TorchDispatchMode):
    """Remembers the most elements that any operation made anew."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = (
            {t.untyped_storage().data_ptr(): t.numel() for t in tree_leaves(tree) if isinstance(t, Tensor)}
            for tree in (args, out)
        )
        self.elements = max([self.elements, *(made[place] for place in made.keys() - given.keys())])
        return out


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_a_large_vocabulary_is_never_laid_out(leave_one_out):
    """Catches any tensor of size (N, V), or of size V: an opinion's cost must not grow with the vocabulary."""
    vocab_size, n = 50_257, 96
    corpus = torch.from_numpy(np.random.default_rng(6).zipf(1.3, 5_000) % vocab_size)
    critic, positions = NgramCritic(corpus, vocab_size), torch.arange(0, 4_000, 350)
    tokens = corpus.unfold(0, n // len(positions), 1)[positions]
    with Largest() as watch:
        opinion = critic.opinion(tokens, positions if leave_one_out else None).rows(0, n)
        opinion.log_probs(opinion.top_ids(16).repeat(1, 2))
    assert 0 < watch.elements <= n * 5 * (16 + ngram.SPARE + 1) < vocab_size
    assert opinion.top_ids(16).shape == (n, 16)


@pytest.mark.parametrize("storage", ["dense", "sparse"])
def test_more_than_the_vocabulary_is_refused(storage):
    """Catches ids that are no tokens, where k exceeds V."""
    with stored(storage):
        opinion = NgramCritic(np.arange(5), 5).opinion(torch.tensor([[1, 2]]))
        with pytest.raises(ValueError, match="k <= 5"):
            opinion.top_ids(6)


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
    ids = torch.from_numpy(unit).repeat(25, 1)
    small = {int(token): i for i, token in enumerate(dict.fromkeys(corpus))}
    renamed = [small[int(token)] for token in corpus]
    for t in (3, 24):
        p = opinion.rows(t, t + 1).full().exp()
        torch.testing.assert_close(p.sum(-1), torch.ones(1))
        torch.testing.assert_close(opinion.log_probs(ids)[t].exp(), p[0, ids[t]])
        left = oracle(renamed, vocab_size, 16, Fraction(3, 4), renamed[70 : 71 + t], first=len(small))
        ours = p[0, torch.tensor(list(small))]
        torch.testing.assert_close(ours, torch.tensor([float(x) for x in left]))


@pytest.mark.parametrize("storage", ["dense", "sparse"])
def test_critic_reproduces_the_reference(storage, shakespeare):
    """Catches a critic that departs from DESIGN's table at real size: each split is one long window."""
    points = np.frombuffer(shakespeare.encode("utf-32-le"), np.uint32)
    characters = torch.from_numpy(np.unique(points, return_inverse=True)[1])
    train, val = characters.split([TRAIN_CHARACTERS, len(characters) - TRAIN_CHARACTERS])
    with stored(storage):
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


@pytest.mark.gpu
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

    with stored(storage):
        for ours, reference in zip(results("cuda"), results("cpu"), strict=True):
            torch.testing.assert_close(ours, reference)
