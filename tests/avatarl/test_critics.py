"""Critics and their opinions: slices, normalisation, who judges what, and the student's own past."""

import copy

import pytest
import torch
from torch import Tensor

from avatarl.critics import (
    CrossFitCritic,
    DenseOpinion,
    EitherOpinion,
    HiddenOpinion,
    ModelCritic,
    PastCritic,
    model_opinion,
)
from config import ConfigError
from tests.avatarl.builders import random_batch, random_case, tiny_gpt

N, V, K = 7, 11, 3


def dense(seed: int = 0) -> DenseOpinion:
    return DenseOpinion(random_case(N, V, seed, torch.float32).critic)


def hidden() -> HiddenOpinion:
    draws = torch.Generator().manual_seed(1)
    return HiddenOpinion(torch.randn(N, 4, generator=draws), torch.randn(V, 4, generator=draws))


def either() -> EitherOpinion:
    return EitherOpinion(torch.arange(N) % 3 == 0, dense(1), dense(2))


def everything(n: int, vocab: int) -> Tensor:
    """The ids of the whole vocabulary at n positions: (n, V)."""
    return torch.arange(vocab).expand(n, vocab)


@pytest.mark.parametrize("opinion", [dense, hidden, either])
@pytest.mark.parametrize(("start", "stop"), [(0, N), (2, 5), (6, 7)])
def test_rows_are_slices(opinion, start, stop):
    """Catches a chunk that is judged by another chunk's opinion, or by what was computed before."""
    whole = opinion()
    whole.top_ids(K)
    part = whole.rows(start, stop)
    ids = torch.randint(V, (N, 5), generator=torch.Generator().manual_seed(4))
    assert torch.equal(part.top_ids(K), whole.top_ids(K)[start:stop])
    torch.testing.assert_close(part.log_probs(ids[start:stop]), whole.log_probs(ids)[start:stop])


@pytest.mark.parametrize("opinion", [dense, hidden, either])
def test_opinions_cover_the_vocabulary(opinion):
    """Catches probabilities normalised over the tokens asked for, and proposals that are not the likeliest."""
    whole = opinion()
    log_p = whole.log_probs(everything(N, V))
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(N))
    proposals = whole.top_ids(K)
    assert torch.equal(proposals, log_p.topk(K).indices)
    torch.testing.assert_close(whole.log_probs(proposals), log_p.gather(-1, proposals))


def test_either_listens_to_one_critic_a_position():
    """Catches a mixture, and the two critics taken for each other."""
    log_p = either().log_probs(everything(N, V))
    for n in range(N):
        assert torch.equal(log_p[n], dense(1 if n % 3 == 0 else 2).log_probs(everything(N, V))[n])


def test_padding_is_no_token():
    """Catches a critic that spends probability on padded rows of its embedding (1,100 → 1,152)."""
    model, batch = tiny_gpt(vocab=1100), random_batch(vocab=1100)
    assert len(model.wte.weight) > model.vocab_size
    log_p = ModelCritic(model, 1100, 8).opinion(batch.tokens, None).log_probs(everything(24, 1100))
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(24))
    torch.testing.assert_close(log_p, model(batch.tokens).flatten(0, 1).log_softmax(-1).detach())


def test_a_models_opinion_leaves_no_trace():
    """Catches a critic that judges under dropout, moves the run's random numbers, or stays in eval mode."""
    model, batch = tiny_gpt(dropout=0.5).train(), random_batch()
    state = torch.get_rng_state()
    one, other = (model_opinion(model, batch.tokens).log_probs(everything(24, V)) for _ in range(2))
    assert torch.equal(one, other) and not one.requires_grad
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    model.eval()
    model_opinion(model, batch.tokens)
    assert not any(module.training for module in model.modules())


def test_model_critic_is_frozen():
    """Catches a critic whose weights an optimiser could move, or that keeps a graph."""
    critic = ModelCritic(tiny_gpt(dropout=0.5).train(), V, 8)
    assert not any(p.requires_grad for p in critic.model.parameters()) and not critic.model.training
    assert not critic.opinion(random_batch().tokens, None).log_probs(everything(24, V)).requires_grad


@pytest.mark.parametrize(
    ("vocab", "block_size", "message"),
    [(12, 8, r"vocabulary = 11: .*12 tokens.*same corpus"), (V, 9, r"block-size = 8: .*now 9")],
)
def test_a_critic_that_does_not_fit_is_refused(vocab, block_size, message):
    """Catches a critic that scores other tokens, or one that cannot read as far as the student."""
    with pytest.raises(ConfigError, match=message):
        ModelCritic(tiny_gpt(), vocab, block_size)


class Says:
    """A critic that puts everything on one token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def opinion(self, tokens: Tensor, positions: Tensor | None) -> DenseOpinion:
        log_p = torch.full((tokens.numel(), V), -20.0)
        log_p[:, self.token] = 0.0
        return DenseOpinion(log_p)


def test_cross_fit_judges_the_other_half():
    """Catches a critic that judges the text it has memorised; a window belongs to where it starts."""
    critic = CrossFitCritic(Says(1), Says(2), 100)
    tokens, positions = torch.zeros(4, 3, dtype=torch.int64), torch.tensor([100, 0, 250, 99])
    judges = critic.opinion(tokens, positions).top_ids(1).view(4, 3).tolist()
    assert judges == [[1] * 3, [2] * 3, [1] * 3, [2] * 3]
    assert critic.opinion(tokens, None).top_ids(1).flatten().tolist() == [1] * 12


def drift(student: torch.nn.Module, step: int) -> None:
    """Stands in for an optimiser step: every weight becomes the number of steps done."""
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(float(step))


def value(copied: torch.nn.Module) -> float:
    return next(copied.parameters()).flatten()[0].item()


def test_moving_average():
    """Catches an average that decays the wrong way round, aliases the student, or misses a parameter."""
    student = tiny_gpt()
    past = PastCritic(student, size=1, decay=0.75, every=1, seed=0)
    wanted = [p.detach().clone() for p in student.parameters()]
    for step in (1, 2, 3):
        drift(student, step)
        past.follow(student, step)
        wanted = [0.75 * p + 0.25 * step for p in wanted]
        for found, right in zip(past.copies[0].parameters(), wanted, strict=True):
            torch.testing.assert_close(found.detach(), right)
    assert not any(p.requires_grad for p in past.parameters())


def ring(steps: int) -> tuple[PastCritic, torch.nn.Module]:
    """A ring of three, a snapshot every two steps, after so many steps."""
    student = tiny_gpt()
    drift(student, 0)
    past = PastCritic(student, size=3, decay=None, every=2, seed=5)
    for step in range(1, steps + 1):
        drift(student, step)
        past.follow(student, step)
    return past, student


@pytest.mark.parametrize(("steps", "kept"), [(0, {0}), (3, {0, 2}), (5, {0, 2, 4}), (6, {2, 4, 6}), (13, {8, 10, 12})])
def test_ring_keeps_the_newest(steps, kept):
    """Catches a ring that overwrites the newest, snapshots at the wrong step, or plays against empty slots."""
    past, _ = ring(steps)
    judges = set()
    for seed in range(60):  # the chance that one of three is never drawn is 3 · (2/3)^60 < 1e-9
        past.seed = seed
        assert past.judge_index() < len(kept)
        judges.add(value(past.copies[past.judge_index()]))
    assert judges == kept


def test_ring_draws_are_keyed():
    """Catches a draw from the global generator: after a resume the same copy must judge the same step."""
    past, _ = ring(13)
    draws = []
    for step in range(13, 43):
        past.step = step
        torch.manual_seed(step)
        draws.append(past.judge_index())
        torch.manual_seed(0)
        assert past.judge_index() == draws[-1]
    assert set(draws) == {0, 1, 2}


def test_the_past_survives_a_checkpoint():
    """Catches a past outside the state dict: a resumed run would play against its random start."""
    past, student = ring(13)
    fresh = PastCritic(tiny_gpt(seed=9), size=3, decay=None, every=2, seed=5)
    fresh.load_state_dict(copy.deepcopy(past.state_dict()))
    fresh.step = past.step
    tokens = random_batch().tokens
    one, other = (p.opinion(tokens, None).log_probs(everything(24, V)) for p in (past, fresh))
    assert torch.equal(one, other)
    assert value(student) == 13
