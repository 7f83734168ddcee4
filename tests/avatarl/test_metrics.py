"""The logged numbers against the oracle, and chunk by chunk."""

import statistics

import pytest
import torch

from avatarl.action_space import ActionSet
from avatarl.critics import DenseOpinion
from avatarl.loss import fused_avatarl_loss, judge
from avatarl.metrics import MetricSums, kl_over_actions, policy_metrics
from tests.avatarl import oracle
from tests.avatarl.builders import SPARSIFY, Case, method, random_case

N, V = 7, 11


def metrics_of(case: Case, m, chunk_size: int = N) -> dict[str, float]:
    """What the fused loss reports, without the prefix."""
    _, found = fused_avatarl_loss(
        case.logits,
        torch.eye(V, dtype=case.logits.dtype),
        DenseOpinion(case.critic),
        case.gold,
        settings=m,
        chunk_size=chunk_size,
    )
    assert all(key.startswith("train/") and value.shape == () for key, value in found.items())
    return {key.removeprefix("train/"): float(value) for key, value in found.items()}


@pytest.mark.parametrize("sparsify", SPARSIFY)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_the_oracles(sparsify, ties, seed):
    """Catches a metric that counts invalid slots, another set, or another quantity than its name says."""
    case, m = random_case(N, V, seed), method(sparsify=sparsify)
    if ties:
        case = case._replace(logits=case.logits.round())
    rows = [oracle.metrics(z, c, g, m) for z, c, g in case.rows()]
    wanted = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    spreads = [statistics.pstdev(oracle.judge(z, c, g, m).rewards.values()) for z, c, g in case.rows()]
    wanted["reward_std"] = statistics.fmean(spreads)
    assert metrics_of(case, m) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 3, N + 5])
def test_chunks_add_up(chunk_size):
    """Catches a mean of chunk means: the last chunk is a short one."""
    case, m = random_case(N, V), method()
    assert metrics_of(case, m, chunk_size) == pytest.approx(metrics_of(case, m), rel=1e-5)


@pytest.mark.parametrize(("active", "overlap"), [(1, 0.0), (2, 0.5), (3, 1.0)])
def test_overlap_of_a_scheduled_k(active, overlap):
    """Catches an overlap over inactive proposals, or divided by the largest k."""
    student = torch.tensor([[5.0, 4.0, 3.0, 0.0, 0.0]])  # proposes 0, 1, 2
    critic = torch.tensor([[3.0, 5.0, 4.0, 0.0, 0.0]]).log_softmax(-1)  # proposes 1, 2, 0
    m = method(top_k=3)
    fields = {name: getattr(m, name) for name in vars(m)}
    settings = type("Settings", (), fields | {"active_k": torch.tensor(float(active))})
    actions, log_p_c, r = judge(student, DenseOpinion(critic), torch.tensor([4]), settings)
    sums = MetricSums()
    sums.add(student, actions, log_p_c, r, settings)
    assert float(sums.means()["train/overlap"]) == pytest.approx(overlap)


def test_kl_is_finite_where_the_critic_says_never():
    """Catches 0 · log 0: a critic that gives an action no mass at all must not turn the log line into NaN."""
    actions = ActionSet(torch.tensor([[0, 1, 2, 1]]), torch.tensor([[True, True, True, False]]))
    critic = torch.tensor([[0.0, 0.75, 0.25, 0.75]]).log()
    student = torch.tensor([[0.5, 0.25, 0.25, 0.25]]).log()
    kl = kl_over_actions(critic, student, actions.valid)
    wanted = 0.75 * torch.tensor(0.75 / 0.25).log() + 0.25 * torch.tensor(0.25 / 0.25).log()
    torch.testing.assert_close(kl[0], wanted)


def test_nothing_summed_nothing_said():
    """Catches a key that stands there without a value: what does not apply is absent."""
    assert MetricSums().means() == {}


def test_metrics_hold_no_gradient():
    """Catches sums that keep every step's graph alive until they are logged."""
    case, m = random_case(N, V), method()
    logits = case.logits.clone().requires_grad_()
    actions, log_p_c, r = judge(logits, DenseOpinion(case.critic), case.gold, m)
    sums = MetricSums()
    sums.add(logits, actions, log_p_c, r, m)
    assert not any(value.requires_grad for value in sums.means().values())


def test_a_policy_without_rewards_is_described_alike():
    """Catches baselines whose P(gold), rank or entropy mean something else than AvataRL's: their curves stand side
    by side."""
    case, m = random_case(N, V), method()
    ours = metrics_of(case, m)
    theirs = {key.removeprefix("train/"): float(v) for key, v in policy_metrics(case.logits, case.gold).items()}
    assert set(theirs) == {"p_gold", "gold_rank", "entropy"}
    assert theirs == pytest.approx({key: ours[key] for key in theirs}, rel=1e-5)
