"""Cached critics: what float16 and the tail leave of an opinion, and that a pass asks about every window, once."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avatarl import cache as cache_module
from avatarl.build import build_objective, frozen_critic
from avatarl.cache import CachedCritic, CachedOpinion, judge_windows, write_cache
from avatarl.critics import DenseOpinion
from avatarl.objective import AvataRL
from config import Config, override
from data import critic_cache
from data.batches import TrainingBatches, window_count
from data.critic_cache import CacheLayout, CacheWriter, CriticCache
from tests.avatarl.builders import random_case, tiny_gpt

V, T = 11, 8
TOKENS = np.random.default_rng(0).integers(V, size=203).astype(np.uint16)
LAYOUT = CacheLayout(window_count(len(TOKENS), T), T, 4, V)
CONFIG = override(
    Config(),
    model={"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": T},
    critic={"kind": "ngram", "ngram_context": 2},
    method={"top_k": 2, "sparsify": "none", "normalize": "sum"},
)


class PositionCritic:
    """Says of each token and place of the stream something of its own, and remembers where it was asked."""

    def __init__(self) -> None:
        self.table = random_case(V, V, 3, torch.float32).critic
        self.asked: list[int] = []

    def opinion(self, tokens: Tensor, positions: Tensor | None) -> DenseOpinion:
        assert positions is not None
        self.asked += positions.tolist()
        place = positions[:, None] + torch.arange(tokens.shape[1])  # (B, T)
        return DenseOpinion(
            (self.table[tokens] + 0.01 * place[..., None] * self.table[0]).log_softmax(-1).flatten(0, 1)
        )


def kept(log_p: Tensor, top: int) -> CachedOpinion:
    """The opinion log_p (N, V) as a cache of its `top` likeliest tokens holds it."""
    values, ids = log_p.sort(descending=True, stable=True)
    return CachedOpinion(ids[:, :top].int(), values[:, :top].half(), log_p.shape[1])


def all_log_probs(opinion: CachedOpinion, n: int, vocab: int) -> Tensor:
    return opinion.log_probs(torch.arange(vocab).expand(n, vocab))


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 12), st.integers(0, 10**6), st.booleans())
def test_what_is_not_kept_shares_what_is_left(vocab, top, spread, seed, dense):
    """Catches a tail that is forgotten, counted V times, or negative; float16 may move the sum by 2⁻¹¹ H."""
    top = min(top, vocab)
    logits = spread * torch.randn(5, vocab, generator=torch.Generator().manual_seed(seed))
    exact = logits.log_softmax(-1)
    opinion = kept(exact, top)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cache_module, "DENSE_ENTRIES", 2**22 if dense else 0)
        log_p = all_log_probs(opinion, 5, vocab)
    assert torch.isfinite(log_p).all() and log_p.dtype == torch.float32
    entropy = -(exact.exp() * exact).sum(-1)
    error = (log_p.exp().sum(-1) - 1).abs()
    assert (error <= 2**-11 * 1.01 * entropy + 1e-5).all()
    proposals = opinion.top_ids(top)
    stored = opinion.log_probs(proposals)
    left = 1 - stored.exp().sum(-1)
    if top < vocab:
        assert (error[left > 0] < 1e-5).all()
        others = torch.ones_like(log_p).scatter_(1, proposals, 0.0).bool()
        tails = log_p[others].view(5, vocab - top)
        assert (tails == tails[:, :1]).all()
        torch.testing.assert_close(tails[:, 0].exp(), (left / (vocab - top)).clamp_min(1e-12), rtol=1e-3, atol=1e-8)
    # What is kept: the likeliest, best first, each rounded to 11 bits.
    assert torch.equal(proposals, exact.sort(descending=True, stable=True).indices[:, :top])
    true = exact.gather(1, proposals)
    assert ((stored - true).abs() <= true.abs() * 2**-11 + 2**-24).all()


def test_search_and_dense_rows_agree(monkeypatch):
    """Catches an id that finds its neighbour's probability where V is large."""
    exact = random_case(6, 500, dtype=torch.float32).critic
    ids = torch.randint(500, (6, 33), generator=torch.Generator().manual_seed(1))
    ids[:, :8] = kept(exact, 20).top_ids(8)
    dense = kept(exact, 20).log_probs(ids)
    monkeypatch.setattr(cache_module, "DENSE_ENTRIES", 0)
    assert torch.equal(kept(exact, 20).log_probs(ids), dense)


@pytest.mark.parametrize("entries", [0, 2**22])
def test_rows_are_slices(monkeypatch, entries):
    """Catches a chunk that is judged by another chunk's rows, or by what was computed before."""
    monkeypatch.setattr(cache_module, "DENSE_ENTRIES", entries)
    whole = kept(random_case(7, V, dtype=torch.float32).critic, 5)
    log_p = all_log_probs(whole, 7, V)
    part = whole.rows(2, 6)
    assert torch.equal(part.top_ids(5), whole.top_ids(5)[2:6]) and part.top_ids(5).dtype == torch.int64
    assert torch.equal(all_log_probs(part, 4, V), log_p[2:6])
    with pytest.raises(ValueError, match="keeps 5 tokens a position, not 6"):
        whole.top_ids(6)


def test_a_pass_stores_what_the_critic_says(monkeypatch):
    """Catches windows judged without their position, shifted by a batch or a chunk, and a token too many or few."""
    want = PositionCritic().opinion(
        torch.from_numpy(TOKENS[: 24 * T].astype(np.int64)).view(24, T), torch.arange(0, 24 * T, T)
    )
    monkeypatch.setattr(cache_module, "PASS_POSITIONS", 5 * T)
    monkeypatch.setattr(cache_module, "CHUNK_ENTRIES", 3 * V)
    critic = PositionCritic()
    ids, log_probs = judge_windows(critic, TOKENS, LAYOUT, range(3, 24), "cpu")
    assert critic.asked == list(range(3 * T, 24 * T, T))
    assert ids.shape == log_probs.shape == (21, T, 4)
    part = want.rows(3 * T, 24 * T)
    assert np.array_equal(ids, part.top_ids(4).view(21, T, 4).numpy())
    assert np.array_equal(log_probs, part.log_probs(part.top_ids(4)).half().view(21, T, 4).numpy())


def test_the_impossible_is_stored_as_finite():
    """Catches −∞ in float16, which would be NaN wherever it meets a zero."""

    class Certain:
        def opinion(self, tokens: Tensor, positions: Tensor | None) -> DenseOpinion:
            return DenseOpinion(torch.full((tokens.numel(), V), -torch.inf).index_fill_(1, torch.tensor(2), 0.0))

    ids, log_probs = judge_windows(Certain(), TOKENS, LAYOUT, range(1), "cpu")
    assert np.isfinite(log_probs).all() and (ids[..., 0] == 2).all()
    log_p = all_log_probs(CachedOpinion(torch.from_numpy(ids[0]), torch.from_numpy(log_probs[0]), V), T, V)
    assert torch.isfinite(log_p).all() and (log_p[:, 2] == 0).all()


def test_an_interrupted_pass_asks_only_for_the_rest(tmp_path, monkeypatch):
    """Catches a pass that starts anew, ends with other bytes, or builds its critic for a cache that is whole."""
    monkeypatch.setattr(critic_cache, "PART_BYTES", 5 * LAYOUT.window_bytes)
    whole, interrupted = PositionCritic(), PositionCritic()

    class Fails(PositionCritic):
        def opinion(self, tokens: Tensor, positions: Tensor | None) -> DenseOpinion:
            if positions is not None and 12 * T in positions:
                raise OSError("the lights went out")
            return super().opinion(tokens, positions)

    def ask(name: str, critic: PositionCritic) -> None:
        write_cache(CacheWriter(tmp_path / name, LAYOUT, {}), lambda: critic, TOKENS, quiet=True)

    ask("whole", whole)
    assert whole.asked == list(range(0, 24 * T, T))
    with pytest.raises(OSError, match="lights"):
        ask("broken", Fails())
    ask("broken", interrupted)
    assert interrupted.asked == list(range(10 * T, 24 * T, T))
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "broken" / path.name).read_bytes() == path.read_bytes()
    write_cache(CacheWriter(tmp_path / "whole", LAYOUT, {}), lambda: pytest.fail("not needed"), TOKENS, quiet=True)


def test_a_pass_waits_for_its_turn(tmp_path):
    """Catches processes that all write, or one wait that lasts as long as the whole pass."""
    turns: list[object] = []
    writer = CacheWriter(tmp_path / "cache", LAYOUT, {})
    write_cache(writer, PositionCritic, TOKENS, turn=turns.append, quiet=True)
    assert len(turns) == 1 + len(LAYOUT.parts) and not (tmp_path / "cache").exists()


def cached_ngrams(folder: Path, config: Config) -> CriticCache:
    """A cache of all that the n-gram critic of `config` says."""
    layout = CacheLayout(window_count(len(TOKENS), T), T, V, V)
    critic = frozen_critic(config, TOKENS, V, [], nullcontext, "cpu")
    write_cache(CacheWriter(folder, layout, {}), lambda: critic, TOKENS, quiet=True)
    return CriticCache(folder, layout, {})


@pytest.mark.parametrize("carried", [True, False], ids=["with the batch", "looked up"])
def test_training_from_a_cache_is_training_from_its_critic(tmp_path, carried):
    """Catches a cache whose windows are not the run's, an opinion of the wrong row, and a critic asked all the same."""
    cache = cached_ngrams(tmp_path / "cache", CONFIG)
    batches = TrainingBatches(TOKENS, T, 6, seed=1, fixed_offset=True, cache=cache if carried else None)
    live, stored = (build_objective(tiny_gpt(V), CONFIG, TOKENS, [], nullcontext, source) for source in (None, cache))
    assert isinstance(stored, AvataRL) and isinstance(stored._critics[0], CachedCritic)
    assert stored.flops_per_token() == live.flops_per_token()  # n-grams cost none either
    for step in range(6):
        losses, gradients = [], []
        for objective in (live, stored):
            loss, _ = objective(batches.batch(step), step, {}, False)
            objective.zero_grad()
            loss.backward()
            losses.append(loss)
            gradients.append(torch.cat([p.grad.flatten() for p in objective.student.parameters()]))  # type: ignore[union-attr]
        torch.testing.assert_close(losses[0], losses[1], rtol=2e-4, atol=0)
        assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[0].norm()


def test_a_cached_model_costs_nothing():
    """Catches FLOPs of a critic that is not asked."""
    config = override(CONFIG, critic={"kind": "model"})
    live = build_objective(tiny_gpt(V), config, TOKENS, [tiny_gpt(V)], nullcontext)
    student = tiny_gpt(V)
    stored = AvataRL(student, config.method, steps=1, seed=0, critic=PositionCritic())
    assert stored.flops_per_token() == 3 * student.flops_per_token() < live.flops_per_token()


def test_a_cached_critic_judges_training_windows_alone(tmp_path):
    """Catches an opinion on text that was never judged."""
    critic = CachedCritic(cached_ngrams(tmp_path / "cache", CONFIG))
    tokens = torch.zeros(1, T, dtype=torch.int64)
    for wrong in ((tokens, None), (tokens[:, 1:], torch.tensor([0]))):
        with pytest.raises(ValueError, match="judges training windows of 8 tokens alone"):
            critic.opinion(*wrong)
    with pytest.raises(ValueError, match="multiples of 8"):
        critic.opinion(tokens, torch.tensor([3]))
