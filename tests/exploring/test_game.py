"""The game at every token: what is shown is what training would pay, at the place where it would pay it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avatarl.critics import DenseOpinion
from avatarl.schedules import Schedules
from exploring.game import play, views
from model import GPT
from tests.avatarl import oracle
from tests.avatarl.builders import method, tiny_gpt

V, T = 11, 8


class LastToken:
    """A critic that knows the last token alone."""

    def __init__(self) -> None:
        draws = torch.Generator().manual_seed(3)
        self.table = torch.randn(V, V, generator=draws, dtype=torch.float64).log_softmax(-1)

    def opinion(self, tokens, positions) -> DenseOpinion:
        assert positions is None  # nothing of a text to look at is left out of the counts
        return DenseOpinion(self.table[tokens.flatten()])


def text(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(V, (length,), generator=torch.Generator().manual_seed(seed))


def seen_logits(student: GPT, ids: torch.Tensor) -> list[list[float]]:
    """Logits of every next token, each from the window that `views` gives it, one forward pass a token."""
    found = []
    for view in views(len(ids), T):
        for at in range(view.start + view.skip, view.stop):
            found.append(student(ids[None, view.start : at + 1])[0, -1].double().tolist())
    return found


@given(st.integers(2, 200), st.integers(1, 20))
@settings(deadline=None, max_examples=80)
def test_every_token_is_seen_once_and_from_far_enough(length, block):
    """Catches a token that is skipped or shown twice, a window beyond the context, and one that has hardly any."""
    predicted = []
    for view in views(length, block):
        assert 0 < view.stop - view.start <= block
        fresh = range(view.start + view.skip, view.stop)
        assert all(at - view.start >= min(at, block // 2) for at in fresh)
        predicted += [at + 1 for at in fresh]
    assert predicted == list(range(1, length))


@pytest.mark.parametrize("changes", [{}, {"normalize": "sum", "mean": "arithmetic"}, {"unproposed": "gold"}])
@pytest.mark.parametrize("length", [2, 6, 30])
def test_moves_are_the_oracles(length, changes):
    """Catches actions, opinions or rewards of a neighbouring place, and settings that training would not have."""
    student, critic, ids = tiny_gpt(V).eval(), LastToken(), text(length)
    m = method(critic_weight_schedule="0:0.2,1:0.9", **changes)
    rules = Schedules(m, 11, "cpu").settings(10)
    moves = play(student, ids, critic, rules)
    assert [move.gold for move in moves] == ids[1:].tolist()
    last = method(critic_weight=0.9, **changes)
    for move, z, before in zip(moves, seen_logits(student, ids), ids.tolist(), strict=False):
        log_p_c = critic.table[before].tolist()
        judged = oracle.judge(z, log_p_c, move.gold, last)
        pi = [math.exp(x) for x in oracle.log_softmax(z)]
        assert move.actions[0].token == move.gold
        found = {a.token: a for a in move.actions}
        assert found.keys() == judged.actions and len(found) == len(move.actions)
        for a, shown in found.items():
            assert shown.student == pytest.approx(pi[a], rel=1e-4)
            assert shown.critic == pytest.approx(math.exp(log_p_c[a]), rel=1e-4)
            assert shown.reality == pytest.approx(oracle.reality(judged.actions, move.gold, 0.1)[a], rel=1e-4)
            assert shown.consensus == pytest.approx(judged.p_ref[a], rel=1e-3, abs=1e-7)
            assert shown.reward == pytest.approx(judged.rewards[a], rel=1e-3, abs=1e-6)
            proposers = [x for x, values in (("s", z), ("c", log_p_c)) if a in oracle.top(values, 3)]
            assert shown.by == "".join(proposers)
        assert move.rank == 1 + sum(p > pi[move.gold] for p in pi)
        assert move.entropy == pytest.approx(oracle.entropy(z), rel=1e-4)


def test_a_schedule_of_k_narrows_who_proposes():
    """Catches proposals that a small k of the moment does not allow."""
    rules = Schedules(method(top_k=4, top_k_schedule="0:1,1:4"), 5, "cpu").settings(0)
    for move in play(tiny_gpt(V).eval(), text(9), LastToken(), rules):
        assert len(move.actions) <= 3 and sum("s" in a.by for a in move.actions) == 1


def test_alone_the_students_own_are_shown():
    """Catches a student without a critic who is shown numbers that nobody gave, or gold twice."""
    student, ids = tiny_gpt(V).eval(), text(20)
    rules = Schedules(method(), 1, "cpu").settings(0)
    for move, z in zip(play(student, ids, None, rules), seen_logits(student, ids), strict=True):
        tokens = [a.token for a in move.actions]
        assert tokens[0] == move.gold and sorted(tokens) == sorted({move.gold, *oracle.top(z, 3)})
        assert all((a.critic, a.reality, a.consensus, a.reward) == (None,) * 4 for a in move.actions)
        assert [a.by for a in move.actions] == ["s" if t in oracle.top(z, 3) else "" for t in tokens]
