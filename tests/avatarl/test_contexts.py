"""Student contexts: keyed draws, picks from π over A, and gold that stays aligned."""

import pytest
import torch

from avatarl.action_space import ActionSet
from avatarl.contexts import keyed_uniform, replace_context, sample_actions
from tests.avatarl.builders import action_set_of, random_batch, random_case

LARGEST = 1 - 2**-24  # the largest draw there is


def chi_square(counts: torch.Tensor, shares: torch.Tensor) -> float:
    """Pearson's statistic of counts against the shares expected."""
    expected = shares * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("seed", [0, 1337, -1, 2**62])
def test_draws_are_uniform(seed):
    """Catches a hash that favours some values. 64 bins, fixed seeds.

    A fair source passes 63 + 6 · √126 = 130 with a chance below 1e-5 a seed, once and for all.
    """
    draws = keyed_uniform(seed, 7, torch.arange(500), 64, 0)
    assert draws.dtype == torch.float32 and draws.shape == (500, 64)
    assert draws.min() >= 0 and draws.max() < 1
    counts = torch.histc(draws, bins=64, min=0, max=1)
    assert chi_square(counts, torch.full((64,), 1 / 64)) < 130


@pytest.mark.parametrize("lag", ["position", "sequence", "step", "seed", "stream"])
def test_neighbouring_draws_are_independent(lag):
    """Catches keys that collide or correlate: 32,000 pairs, |r| above 0.03 has a chance below 1e-6."""
    place = torch.arange(501)
    one = keyed_uniform(3, 7, place[:-1], 65, 0)
    other = {
        "position": one.roll(1, dims=1),
        "sequence": keyed_uniform(3, 7, place[1:], 65, 0),
        "step": keyed_uniform(3, 8, place[:-1], 65, 0),
        "seed": keyed_uniform(4, 7, place[:-1], 65, 0),
        "stream": keyed_uniform(3, 7, place[:-1], 65, 1),
    }[lag]
    pairs = torch.stack((one.flatten(), other.flatten()))
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.03
    assert (one == other).float().mean() < 1e-3


def test_draws_do_not_depend_on_the_batch():
    """Catches draws keyed by the row in a micro-batch: processes would repeat each other's."""
    whole = keyed_uniform(3, 7, torch.arange(6), 10, 1)
    assert torch.equal(whole, keyed_uniform(3, 7, torch.arange(6), 10, 1))
    parts = [keyed_uniform(3, 7, torch.tensor(rows), 10, 1) for rows in ([0], [1, 2], [3, 4, 5])]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole[:, :4], keyed_uniform(3, 7, torch.arange(6), 4, 1))


def test_draws_are_these():
    """Catches a changed hash: whoever resumes an older run would read other contexts than it would have."""
    found = keyed_uniform(1337, 0, torch.arange(2), 3, 0) * 2**24
    assert found.tolist() == [[16384001, 6041922, 8657426], [10159290, 1701370, 5881945]]


def test_the_largest_draw_is_below_one():
    """Catches a scale that reaches 1, where nothing is left to pick; this key gives 24 ones."""
    assert keyed_uniform(0, 2, torch.tensor([270]), 365, 0)[0, 364] == LARGEST


def test_draws_leave_the_generator_alone():
    """Catches a draw from torch's own generator, which a resume would have to replay."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    keyed_uniform(3, 7, torch.arange(6), 10, 1)
    assert torch.equal(before, torch.get_rng_state())


def test_picks_follow_the_policy():
    """Catches picks from the rewards, from the full vocabulary, or the likeliest one always.

    One position drawn 20,000 times at fixed keys; χ² at 6 degrees above 40 has a chance below 1e-6.
    """
    case = random_case(1, 11, seed=2)
    actions = action_set_of(case, 3)
    log_pi_a = case.logits.log_softmax(-1).gather(-1, actions.ids)
    draws = keyed_uniform(0, 0, torch.arange(20), 1000, 0).flatten()
    many = ActionSet(*(t.expand(len(draws), -1) for t in actions))
    picks = sample_actions(log_pi_a.expand(len(draws), -1), many, draws)
    ids = actions.ids[actions.valid]
    shares = log_pi_a[actions.valid].softmax(-1).float()
    counts = torch.stack([(picks == token).sum() for token in ids]).float()
    assert counts.sum() == len(draws)
    assert chi_square(counts, shares) < 40


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("draw", [0.0, 0.5, LARGEST])
def test_an_invalid_action_is_never_picked(k, spread, draw):
    """Catches rounding at either end of the ladder, also where nearly all mass is on one token."""
    case = random_case(500, 6, dtype=torch.float32)
    case = case._replace(logits=spread * case.logits)
    actions = action_set_of(case, k)
    log_pi_a = case.logits.log_softmax(-1).gather(-1, actions.ids)
    # Duplicates point at a token outside the vocabulary, so that picking one would show.
    marked = actions._replace(ids=actions.ids.masked_fill(~actions.valid, 99))
    picks = sample_actions(log_pi_a, marked, torch.full((500,), draw))
    assert picks.max() < 6
    chosen = case.logits.softmax(-1).gather(-1, picks[:, None])
    assert (chosen > 0).all()


def test_a_pick_lands_one_position_later():
    """Catches the off-by-one by which a model learns to copy its input: pick t stands for token t + 1."""
    tokens = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    picks = 10 + tokens
    replaced = torch.tensor([[True, True, False, True], [False, False, True, False]])
    found = replace_context(tokens, picks, replaced)
    assert found.tolist() == [[0, 10, 2, 12], [4, 5, 15, 7]]
    assert replaced[0, 0] and tokens[0, 1] == 1  # the inputs stay as they were


def test_a_perfect_student_changes_nothing():
    """Catches any misalignment of picks and gold: who always picks gold reads the corpus itself."""
    batch = random_batch()
    everywhere = torch.ones_like(batch.tokens, dtype=torch.bool)
    assert torch.equal(replace_context(batch.tokens, batch.targets, everywhere), batch.tokens)
