"""The shared conformance cases, through the step-by-step functions and through the fused loss."""

import json
from types import SimpleNamespace

import pytest
import torch

from avatarl.action_space import build_action_set
from avatarl.critics import DenseOpinion
from avatarl.loss import fused_avatarl_loss, reinforce_loss
from avatarl.reward import consensus, rewards
from tests.avatarl import oracle
from tests.avatarl.builders import maps

CASES = 16
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def load(shared, number: int, dtype: torch.dtype) -> SimpleNamespace:
    """One case: tensors of its inputs, its settings `m`, and what it expects."""
    path = shared / "conformance" / "avatarl_cases.json"
    if not path.is_file():
        pytest.skip("../shared/conformance/avatarl_cases.json is missing")
    case = SimpleNamespace(**json.loads(path.read_text(encoding="utf-8"))["cases"][number])
    case.m = SimpleNamespace(**case.config, top_k=case.config["k"], policy_weighting="reinforce")
    case.logits = torch.tensor(case.student_logits, dtype=dtype)
    case.critic = torch.tensor(case.critic_log_probs, dtype=dtype)
    case.targets = torch.tensor(case.gold)
    return case


def expected_maps(case, values) -> list[dict[int, float]]:
    """A case's rows as maps from token to value."""
    return [dict(zip(ids, row, strict=True)) for ids, row in zip(case.actions, values, strict=True)]


def assert_near(found, wanted, tolerance: float) -> None:
    """Equal relative to each value, zeros exactly."""
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=tolerance, abs=0)


def assert_gradient(found: torch.Tensor, wanted: list[list[float]], tolerance: float) -> None:
    """Equal relative to the largest entry of a row: R π − r cancels, so single entries may be tiny."""
    target = torch.tensor(wanted, dtype=torch.float64)
    error = (found.double() - target).abs().amax(-1) / target.abs().amax(-1)
    assert error.max() < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("number", range(CASES))
def test_step_by_step(shared, number, dtype):
    """Catches any departure from the published method: set, consensus, rewards, loss or gradient."""
    case, tolerance = load(shared, number, dtype), TOLERANCE[dtype]
    m, logits = case.m, case.logits.requires_grad_()
    actions = build_action_set(logits, DenseOpinion(case.critic).top_ids(m.k), case.targets, m.k)
    p_ref = consensus(
        actions,
        case.critic.gather(-1, actions.ids),
        reality_weight=m.reality_weight,
        critic_weight=m.critic_weight,
        epsilon=m.epsilon,
    )
    r = rewards(
        p_ref,
        actions.valid,
        sparsify=m.sparsify,
        normalize=m.normalize,
        reward_scale=m.reward_scale,
        reward_cap=m.reward_cap,
    )
    loss = reinforce_loss(logits, actions, r, entropy_coef=m.entropy_coef, policy_weighting="reinforce")
    loss.backward()
    assert actions.ids[:, 0].tolist() == case.gold
    assert_near(maps(actions, p_ref), expected_maps(case, case.consensus), tolerance)
    assert_near(maps(actions, r), expected_maps(case, case.rewards), tolerance)
    assert loss.item() == pytest.approx(case.loss, rel=tolerance)
    assert_gradient(logits.grad, case.grad_student_logits, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("number", range(CASES))
def test_fused(shared, number, dtype):
    """Catches a fused loss that agrees with our own definition but not with the published one."""
    case, tolerance = load(shared, number, dtype), TOLERANCE[dtype]
    hidden = case.logits.requires_grad_()
    unembedding = torch.eye(hidden.shape[1], dtype=dtype)
    loss, _ = fused_avatarl_loss(
        hidden, unembedding, DenseOpinion(case.critic), case.targets, settings=case.m, chunk_size=2
    )
    loss.backward()
    assert loss.item() == pytest.approx(case.loss, rel=tolerance)
    assert_gradient(hidden.grad, case.grad_student_logits, tolerance)


@pytest.mark.parametrize("number", range(CASES))
def test_oracle(shared, number):
    """Catches an oracle that is wrong in the way the code is: the other tests lean on it."""
    case = load(shared, number, torch.float64)
    rows = list(zip(case.student_logits, case.critic_log_probs, case.gold, strict=True))
    judged = [oracle.judge(z, c, g, case.m) for z, c, g in rows]
    assert_near([j.p_ref for j in judged], expected_maps(case, case.consensus), 1e-10)
    assert_near([j.rewards for j in judged], expected_maps(case, case.rewards), 1e-10)
    pairs = list(zip(rows, judged, strict=True))
    loss = sum(oracle.loss(z, j.rewards, case.m) for (z, _, _), j in pairs) / len(rows)
    assert loss == pytest.approx(case.loss, rel=1e-10)
    gradient = torch.tensor([oracle.gradient(z, j.rewards, case.m) for (z, _, _), j in pairs])
    assert_gradient(gradient.double() / len(rows), case.grad_student_logits, 1e-5)


def test_all_cases_are_run(shared):
    """Catches cases that were added to the file and are never looked at."""
    path = shared / "conformance" / "avatarl_cases.json"
    assert len(json.loads(path.read_text(encoding="utf-8"))["cases"]) == CASES
