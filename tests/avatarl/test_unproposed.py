"""Gold that neither side proposes: who is paid there, and that what is unlikely is paid as often as it comes."""

from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avatarl.action_space import build_action_set, unproposed
from avatarl.critics import DenseOpinion
from avatarl.loss import LossSettings, judge
from avatarl.objective import AvataRL
from tests.avatarl import oracle
from tests.avatarl.builders import Case, maps, method, random_case, rewards_of, tied_cases, tiny_gpt

V = 11


@given(tied_cases(), st.sampled_from(["sum", "cap"]), st.sampled_from(["none", "above_mean"]))
@settings(deadline=None, max_examples=60)
def test_rewards_are_the_oracles(drawn, normalize, sparsify):
    """Catches gold that counts as unproposed where one side named it, or a critic that keeps a vote there."""
    case, k = drawn
    m = method(top_k=k, unproposed="gold", normalize=normalize, sparsify=sparsify)
    judged = [oracle.judge(z, c, g, m) for z, c, g in case.rows()]
    for found, one in zip(maps(*rewards_of(case, m)), judged, strict=True):
        if len(one.actions) == 1 or oracle.margin(one.p_ref) > 1e-5:  # ties with the mean are test_reward.py's
            assert found == pytest.approx(one.rewards, rel=1e-5, abs=0)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_tail_is_paid_as_often_as_it_comes(k):
    """Catches the starved tail: with gold drawn from p, a token beyond the proposals must earn p on average, not p²."""
    one = random_case(1, V)
    p = one.critic.exp()[0]
    every = Case(one.logits.expand(V, V), one.critic.expand(V, V), torch.arange(V))  # each token once as gold
    proposed = {*oracle.top(one.logits[0].tolist(), k), *oracle.top(one.critic[0].tolist(), k)}
    tail = torch.tensor([a not in proposed for a in range(V)])

    def earned(**changes: Any) -> torch.Tensor:
        m = method(top_k=k, reality_weight=0.0, critic_weight=1.0, normalize="sum", **changes)
        actions, r = rewards_of(every, m)
        return p @ torch.zeros(V, V, dtype=r.dtype).scatter_add_(1, actions.ids, r * actions.valid)  # (V,)

    torch.testing.assert_close(earned(unproposed="gold"), p)
    assert (earned()[tail] < 0.8 * p[tail]).all()


def test_who_proposes_decides():
    """Catches gold that counts as its own proposal where the student has none, and a k that has shrunk."""
    case = random_case(40, V)
    critic = DenseOpinion(case.critic).top_ids(3)
    by_critic = (critic == case.gold[:, None]).any(1)
    by_both = by_critic | (case.logits.topk(3).indices == case.gold[:, None]).any(1)
    both = build_action_set(case.logits, critic, case.gold, 3)
    assert torch.equal(unproposed(both, 3), ~by_both)
    alone = build_action_set(case.logits, critic, case.gold, 3, student_proposes=False)
    assert torch.equal(unproposed(alone, 3, student_proposes=False), ~by_critic)
    short, one = torch.tensor(1.0), build_action_set(case.logits, critic, case.gold, 3, torch.tensor(1.0))
    first = (critic[:, 0] == case.gold) | (case.logits.argmax(1) == case.gold)
    assert torch.equal(unproposed(one, 3, short), ~first)
    assert by_both.any() and not by_both.all() and not torch.equal(by_critic, by_both)


@pytest.mark.parametrize("changes", [{}, {"proposals": "critic"}, {"active_k": torch.tensor(1.0)}])
def test_the_loss_is_told(changes):
    """Catches a setting lost between the configuration and the judgement."""
    case, m = random_case(40, V, dtype=torch.float32), method(unproposed="gold", normalize="sum")
    fields = {name: getattr(m, name) for name in LossSettings._fields if hasattr(m, name)} | changes
    _, _, paid = judge(case.logits, DenseOpinion(case.critic), case.gold, LossSettings(**fields))
    _, _, before = judge(
        case.logits, DenseOpinion(case.critic), case.gold, LossSettings(**(fields | {"unproposed": "consensus"}))
    )
    own = AvataRL(tiny_gpt(V), m, steps=1, seed=0, critic=cast(Any, object()))
    assert own.settings(0).unproposed == "gold"
    alone = (paid[:, 0] == 1) & ~paid[:, 1:].any(1)
    assert alone.any() and torch.equal(paid[~alone], before[~alone]) and (before[alone, 0] < 1).all()
