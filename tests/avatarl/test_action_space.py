"""Action sets: gold, both top-k, no token twice, ties to the lowest id."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avatarl.action_space import _top_ids_by_key, build_action_set, top_ids
from avatarl.critics import DenseOpinion
from tests.avatarl import oracle
from tests.avatarl.builders import action_set_of, maps, random_case, tied_cases

QUICK = settings(deadline=None, max_examples=60)
# Few values, many ties; both zeros, both infinities, subnormal and neighbouring numbers.
FLOATS = [0.0, -0.0, 1.0, -1.0, 1.0000001192092896, float("inf"), float("-inf"), 1e-45, -1e-45, 3e38, -3e38]


@given(tied_cases())
@QUICK
def test_set_is_the_oracles(drawn):
    """Catches a missing or doubled member, gold out of place, a tie that goes to a higher id."""
    case, k = drawn
    actions = action_set_of(case, k)
    vocab = case.logits.shape[1]
    assert actions.ids.dtype == torch.int64 and actions.valid.dtype == torch.bool
    assert actions.ids.shape == actions.valid.shape == (len(case.gold), 2 * k + 1)
    assert torch.equal(actions.ids[:, 0], case.gold) and actions.valid[:, 0].all()
    assert actions.valid.sum(-1).max() <= min(2 * k + 1, vocab)
    found = [set(row) for row in maps(actions, actions.ids)]
    assert found == [oracle.action_set(z, c, g, k) for z, c, g in case.rows()]


@given(tied_cases(), st.booleans())
@QUICK
def test_a_student_that_proposes_nothing_leaves_critic_and_gold(drawn, fewer):
    """Catches its ideas among the actions, and a critic's token that is lost because the student had it too."""
    case, k = drawn
    critic = DenseOpinion(case.critic).top_ids(k)
    active_k = torch.tensor(max(1, k - 1)) if fewer else None
    actions = build_action_set(case.logits, critic, case.gold, k, active_k, student_proposes=False)
    assert actions.ids.shape == (len(case.gold), 2 * k + 1)
    assert torch.equal(actions.ids[:, 0], case.gold) and actions.valid[:, 0].all()
    assert not actions.valid[:, 1 : k + 1].any()
    active = k if active_k is None else int(active_k)
    for ids, valid, row in zip(actions.ids.tolist(), actions.valid.tolist(), critic[:, :active].tolist(), strict=True):
        members = [i for i, counts in zip(ids, valid, strict=True) if counts]
        assert sorted(members) == sorted({ids[0], *row})


@given(tied_cases())
@QUICK
def test_proposals_are_ordered(drawn):
    """Catches proposals out of order: a smaller active k must keep the best ones."""
    case, k = drawn
    assert top_ids(case.logits, k).tolist() == [oracle.top(z, k) for z in case.logits.tolist()]


@given(st.data())
@QUICK
def test_integer_keys_order_as_the_floats_do(data):
    """Catches a GPU path that orders negative numbers backwards or tells −0 from 0."""
    row = data.draw(st.lists(st.sampled_from(FLOATS), min_size=1, max_size=12))
    k = data.draw(st.integers(1, len(row)))
    values = torch.tensor([row], dtype=torch.float32)
    wanted = [oracle.top(values[0].tolist(), k)]
    assert _top_ids_by_key(values, k).tolist() == wanted
    assert top_ids(values, k).tolist() == wanted


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=12))
@QUICK
def test_integer_keys_on_any_float(row):
    """Catches a bit pattern that the few values above do not have."""
    values = torch.tensor([row], dtype=torch.float32)
    assert _top_ids_by_key(values, len(row)).tolist() == [oracle.top(values[0].tolist(), len(row))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_ties(dtype):
    """Catches ties judged before rounding: at 8 bits of mantissa most neighbours are equal."""
    values = torch.randn(5, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert len(values.unique()) < values.numel()
    assert top_ids(values, 20).tolist() == [oracle.top(row, 20) for row in values.tolist()]


def test_tie_at_the_boundary_alone():
    """Catches a check for ties that looks at the first k values only: the k + 1st may equal the last taken."""
    values = torch.full((1, 500), 1.0)
    values[0, 300] = 2.0
    assert top_ids(values, 2).tolist() == [[300, 0]]


@given(tied_cases(), st.data())
@QUICK
def test_active_k_is_a_smaller_k(drawn, data):
    """Catches a schedule of k whose inactive proposals still count, or still hide the critic's."""
    case, k = drawn
    active = data.draw(st.integers(1, k))
    critic = DenseOpinion(case.critic)
    wide = build_action_set(case.logits, critic.top_ids(k), case.gold, k, torch.tensor(float(active)))
    narrow = build_action_set(case.logits, critic.top_ids(active), case.gold, active)
    assert wide.ids.shape[1] == 2 * k + 1
    assert maps(wide, wide.ids) == maps(narrow, narrow.ids)


def test_k_beyond_the_vocabulary_is_refused():
    """Catches a k > V that torch would report as an internal index error."""
    case = random_case(vocab=5)
    with pytest.raises(ValueError, match=r"6 actions of a vocabulary of 5; use k <= 5"):
        top_ids(case.logits, 6)
    with pytest.raises(ValueError, match="vocabulary of 5"):
        build_action_set(case.logits, torch.zeros(7, 6, dtype=torch.int64), case.gold, 6)


def test_inputs_are_left_alone():
    """Catches an in-place step on logits, gold or the critic's proposals."""
    case = random_case()
    proposals = DenseOpinion(case.critic).top_ids(3)
    before = [t.clone() for t in (*case, proposals)]
    build_action_set(case.logits, proposals, case.gold, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, (*case, proposals), strict=True))


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    """Catches a look at the data from the host, which would stall the GPU at every chunk."""
    case = random_case(64, 300, dtype=torch.float32)
    logits, critic, gold = (t.cuda() for t in case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        actions = build_action_set(logits, DenseOpinion(critic).top_ids(16), gold, 16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wanted = action_set_of(case, 16)
    assert torch.equal(actions.ids.cpu(), wanted.ids) and torch.equal(actions.valid.cpu(), wanted.valid)
