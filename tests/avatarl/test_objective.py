"""Objectives on a tiny GPT: what they minimise, whom they train, and what they keep between calls."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avatarl.contexts import keyed_uniform, replace_context, sample_actions
from avatarl.critics import DenseOpinion, ModelCritic, PastCritic, model_opinion
from avatarl.loss import group_loss, judge, reinforce_loss
from avatarl.objective import AvataRL, CrossEntropy
from data.batches import Batch
from tests.avatarl.builders import method, random_batch, random_case, tiny_gpt

V, N = 11, 24
CHANGED: dict[str, dict[str, Any]] = {
    "group": {"advantage": "group", "policy_weighting": "expected", "inner_epochs": 2}
}


class TableCritic:
    """Judges by a fixed table of log-probabilities, one row for each token read; remembers what it was asked."""

    def __init__(self) -> None:
        self.table = random_case(V, V, 5, torch.float32).critic
        self.asked: list[Tensor] = []

    def opinion(self, tokens: Tensor, positions: Tensor | None) -> DenseOpinion:
        self.asked.append(tokens)
        return DenseOpinion(self.table[tokens.flatten()])


def avatarl(student=None, seed: int = 0, critic=None, past=None, twin=None, **changes: Any) -> Any:
    """AvataRL with a table critic, unless the student has another judge."""
    if past is None and twin is None:
        critic = critic or TableCritic()
    return AvataRL(student or tiny_gpt(), method(**changes), steps=10, seed=seed, critic=critic, past=past, twin=twin)


def loss_of(objective, batch: Batch | None = None, step: int = 0, rollout: dict | None = None) -> Tensor:
    """The loss alone."""
    loss, _ = objective(batch or random_batch(), step, {} if rollout is None else rollout, False)
    return loss


def by_hand(student, opinion, tokens: Tensor, gold: Tensor, m) -> Tensor:
    """reinforce_loss of whole logits."""
    logits = student(tokens).flatten(0, 1)
    actions, _, r = judge(logits, opinion, gold.flatten(), m)
    return reinforce_loss(logits, actions, r, entropy_coef=m.entropy_coef, policy_weighting=m.policy_weighting)


def assert_same_gradients(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert a.grad is not None and a.grad.any(), name
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("advantage", [{}, CHANGED["group"]])
def test_the_student_may_propose_nothing(advantage):
    """Catches a setting lost on the way, and metrics that speak of proposals that nobody made."""
    both, alone = (avatarl(proposals=who, **advantage) for who in ("both", "critic"))
    metrics = [objective(random_batch(), 0, {}, True)[1] for objective in (both, alone)]
    assert metrics[1]["train/action_count"] <= 4 < metrics[0]["train/action_count"]
    assert set(metrics[0]) - set(metrics[1]) == {"train/overlap"}
    assert all(torch.isfinite(value) for value in metrics[1].values())


@pytest.mark.parametrize("weighting", ["reinforce", "expected"])
@pytest.mark.parametrize("chunk_size", [5, 100])
def test_forward_is_the_definition(weighting, chunk_size):
    """Catches logits read one position late, a chunk of the wrong opinion, a setting lost on the way."""
    student, critic, batch = tiny_gpt(), TableCritic(), random_batch()
    objective = avatarl(student, critic=critic, policy_weighting=weighting, entropy_coef=0.2)
    objective.chunk_size = chunk_size
    loss, metrics = objective(batch, 0, {}, True)
    loss.backward()
    reference = tiny_gpt()
    wanted = by_hand(reference, critic.opinion(batch.tokens, None), batch.tokens, batch.targets, objective.method)
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    assert_same_gradients(student, reference)
    assert {"train/reward", "train/reward_std", "train/overlap", "train/critic_kl"} < set(metrics)


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("reality_weight", 1.0, 0.0),
        ("critic_weight", 1.0, 0.0),
        ("epsilon", 0.5, 0.1),
        ("entropy_coef", 0.0, 1.0),
        ("top_k", 3, 1),
    ],
)
def test_schedules_reach_the_loss(name, first, last):
    """Catches a constant where a schedule was asked for."""
    schedule: dict[str, Any] = {f"{name}_schedule": f"0:{first},1:{last}"}
    scheduled = avatarl(**schedule)
    start, end = loss_of(scheduled, step=0), loss_of(scheduled, step=9)
    torch.testing.assert_close(start, loss_of(avatarl(**{name: first})))
    torch.testing.assert_close(end, loss_of(avatarl(**{name: last})))
    assert not torch.isclose(start, end)


def group_by_hand(student, old_student, batch: Batch, critic: TableCritic, m) -> Tensor:
    """GRPO's loss for a student, with actions and rewards judged at `old_student`."""
    opinion = critic.opinion(batch.tokens, None)
    now, old = (s(batch.tokens).flatten(0, 1).log_softmax(-1) for s in (student, old_student))
    actions, _, r = judge(old.detach(), opinion, batch.targets.flatten(), m)
    now_a, old_a = now.gather(-1, actions.ids), old.gather(-1, actions.ids)
    entropy = -(now.exp() * now).sum(-1).mean()
    return group_loss(now_a, old_a, r, actions.valid, clip_ratio=m.clip_ratio) - m.entropy_coef * entropy


def test_inner_epochs_keep_the_first_judgement():
    """Catches a second inner epoch against itself: its ratio would be 1 for ever and nothing would clip."""
    student, critic, batch = tiny_gpt(), TableCritic(), random_batch()
    objective = avatarl(student, critic=critic, **CHANGED["group"])
    assert objective.inner_epochs == 2
    old = copy.deepcopy(student)
    rollout: dict[str, Any] = {}
    first = loss_of(objective, batch, rollout=rollout)
    torch.testing.assert_close(first, group_by_hand(student, old, batch, critic, objective.method))
    with torch.no_grad():
        student.wte.weight.add_(0.3 * torch.randn_like(student.wte.weight))
    second = loss_of(objective, batch, rollout=rollout)
    torch.testing.assert_close(second, group_by_hand(student, old, batch, critic, objective.method))
    assert len(critic.asked) == 3  # twice by hand
    assert not torch.isclose(second, loss_of(objective, batch))


def student_contexts_of(objective, batch: Batch | None = None, step: int = 0) -> Tensor:
    """The tokens that the student of an objective reads."""
    rollout: dict[str, Any] = {}
    loss_of(objective, batch, step, rollout)
    return rollout["tokens"]


def student_contexts(step: int = 0, seed: int = 0, share: float = 1.0, rows=slice(None)) -> Tensor:
    """The tokens that the tiny student reads."""
    tokens, targets, _, indices, *_ = random_batch()
    batch = Batch(tokens[rows], targets[rows], None, indices[rows])
    return student_contexts_of(avatarl(seed=seed, context="student", student_context_share=share), batch, step)


def test_student_contexts_keep_gold():
    """Catches rewards for the student's own picks, and a critic that judges a context nobody read."""
    student, critic, batch = tiny_gpt(), TableCritic(), random_batch()
    rollout: dict[str, Any] = {}
    objective = avatarl(student, critic=critic, context="student", student_context_share=0.5)
    loss_of(objective, batch, rollout=rollout).backward()
    tokens = rollout["tokens"]
    changed = tokens != batch.tokens
    assert changed.any() and not changed[:, 0].any()
    assert torch.equal(critic.asked[-1], tokens)
    reference = tiny_gpt()
    opinion = critic.opinion(tokens, None)
    by_hand(reference, opinion, tokens, batch.targets, objective.method).backward()
    assert_same_gradients(student, reference)


def test_inner_epochs_read_the_same_context():
    """Catches contexts drawn anew by the student that has just learned: its ratio would compare two texts."""
    student = tiny_gpt()
    rollout: dict[str, Any] = {}
    objective = avatarl(student, context="student", student_context_share=1.0, **CHANGED["group"])
    loss_of(objective, rollout=rollout)
    first = rollout["tokens"]
    with torch.no_grad():
        student.wte.weight.mul_(-1)
    loss_of(objective, rollout=rollout)
    assert torch.equal(rollout["tokens"], first)
    assert not torch.equal(student_contexts_of(objective), first)


def test_student_contexts_are_the_students():
    """Catches another share than the scheduled one, and one draw that decides both where and what is picked."""
    batch, student, m = random_batch(rows=20), tiny_gpt(), method()
    objective = avatarl(student, seed=7, context="student", student_context_share_schedule="0:0,1:0.9")
    found = student_contexts_of(objective, batch, step=5)
    logits = student(batch.tokens).flatten(0, 1).detach()
    actions, _, _ = judge(logits, TableCritic().opinion(batch.tokens, None), batch.targets.flatten(), m)
    where, what = (keyed_uniform(7, 5, batch.indices, 8, stream) for stream in (1, 0))
    log_pi_a = logits.log_softmax(-1).gather(-1, actions.ids)
    picks = sample_actions(log_pi_a, actions, what.flatten()).view(20, 8)
    assert torch.equal(found, replace_context(batch.tokens, picks, where < 0.5))
    assert not torch.equal(found, batch.tokens)


def test_student_contexts_are_keyed():
    """Catches contexts that a resume or another split of the batch would draw anew."""
    whole = student_contexts()
    assert torch.equal(whole, student_contexts())
    assert torch.equal(whole[1:], student_contexts(rows=slice(1, None)))
    assert not torch.equal(whole, student_contexts(step=1))
    assert not torch.equal(whole, student_contexts(seed=1))
    assert torch.equal(student_contexts(share=0.0), random_batch().tokens)


def test_twins_judge_each_other():
    """Catches a twin that never learns, or that judges itself."""
    student, twin, batch = tiny_gpt(), tiny_gpt(seed=1), random_batch()
    objective = avatarl(student, twin=twin)
    loss = loss_of(objective, batch)
    loss.backward()
    one, other = tiny_gpt(), tiny_gpt(seed=1)
    wanted = by_hand(one, model_opinion(other, batch.tokens), batch.tokens, batch.targets, objective.method)
    wanted = wanted + by_hand(other, model_opinion(one, batch.tokens), batch.tokens, batch.targets, objective.method)
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    assert_same_gradients(student, one)
    assert_same_gradients(twin, other)


def test_a_twin_judges_the_context_that_was_read():
    """Catches a twin that judges the corpus while its rival reads contexts of its own."""
    student, twin, batch = tiny_gpt(), tiny_gpt(seed=1), random_batch()
    rollout: dict[str, Any] = {}
    objective = avatarl(student, twin=twin, context="student", student_context_share=1.0)
    loss = loss_of(objective, batch, rollout=rollout)
    wanted = torch.zeros(())
    for player, rival, name in ((student, twin, "student"), (twin, student, "twin")):
        tokens = rollout[name]["tokens"]
        wanted = wanted + by_hand(player, model_opinion(rival, tokens), tokens, batch.targets, objective.method)
    torch.testing.assert_close(loss, wanted)


def with_judge(kind: str) -> Any:
    """AvataRL with each kind of judge."""
    student = tiny_gpt()
    if kind == "twin":
        return avatarl(student, twin=tiny_gpt(seed=1))
    if kind in ("ema", "ring"):
        decay = 0.5 if kind == "ema" else None
        return avatarl(student, past=PastCritic(student, size=1, decay=decay, every=1, seed=0))
    critic = ModelCritic(tiny_gpt(seed=2), V, 8) if kind == "model" else None
    return avatarl(student, critic=critic, **CHANGED.get(kind, {"context": "student"} if kind == "context" else {}))


@pytest.mark.parametrize("kind", ["table", "model", "twin", "ema", "ring", "group", "context"])
def test_every_parameter_gets_a_gradient(kind):
    """Catches a parameter outside the loss: DDP would wait for it for ever."""
    objective = with_judge(kind)
    loss_of(objective).backward()
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    assert len(trained) == len(list(tiny_gpt().parameters())) * (2 if kind == "twin" else 1)


@pytest.mark.parametrize("kind", ["table", "model", "twin", "ema", "group", "context"])
def test_a_step_lowers_the_loss(kind):
    """Catches a sign, by which the student would unlearn. Rewards and contexts are those before the step."""
    torch.manual_seed(0)
    objective = with_judge(kind)
    rollout: dict[str, Any] = {}
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.02)
    before = loss_of(objective, rollout=rollout)
    before.backward()
    optimizer.step()
    assert loss_of(objective, rollout=rollout) < before


def test_the_average_follows_the_student():
    """Catches a past that is never told of a step, and one outside the state dict."""
    objective = with_judge("ema")
    before = objective.past.copies[0].wte.weight.clone()
    with torch.no_grad():
        objective.student.wte.weight.add_(1.0)
    objective.after_step(1)
    torch.testing.assert_close(objective.past.copies[0].wte.weight, before + 0.5)
    assert any(key.startswith("past.copies.0.") for key in objective.state_dict())


def test_the_ring_judges_by_the_step():
    """Catches a ring that does not learn the step from the loop: after a resume it must judge alike."""
    student = tiny_gpt()
    past = PastCritic(student, size=3, decay=None, every=1, seed=0)
    objective = avatarl(student, past=past)
    judges = []
    for step in range(30):
        loss_of(objective, step=step)
        judges.append(past.judge_index())
    assert judges[0] == 0 and set(judges) == {0, 1, 2}


@pytest.mark.parametrize(
    ("judge_of_run", "changes", "forwards"),
    [
        ("critic", {}, 3 + 0.5),  # training costs three forward passes; this critic costs half of one
        ("critic", {"context": "student"}, 4 + 2 * 0.5),
        ("critic", CHANGED["group"], 6 + 0.5),
        ("past", {}, 3 + 1),
        ("twin", {}, 2 * (3 + 1)),
        ("twin", {"context": "student"}, 2 * (4 + 2)),
    ],
)
def test_work_is_counted(judge_of_run, changes, forwards):
    """Catches a utilisation that forgets the critic, the second pass or the twin."""
    student = tiny_gpt()
    judges: dict[str, Any] = {
        "critic": {"critic": TableCritic(), "critic_flops": 0.5 * student.flops_per_token()},
        "past": {"past": PastCritic(student, size=1, decay=0.5, every=1, seed=0)},
        "twin": {"twin": tiny_gpt(seed=1)},
    }
    objective = AvataRL(student, method(**changes), steps=10, seed=0, **judges[judge_of_run])
    assert objective.flops_per_token() == forwards * student.flops_per_token()
    assert CrossEntropy(student).flops_per_token() == 3 * student.flops_per_token()


def test_a_frozen_critic_is_not_saved():
    """Catches checkpoints that carry, or optimisers that train, a critic that never changes."""
    assert all(key.startswith("student.") for key in with_judge("model").state_dict())


def test_cross_entropy():
    """Catches an objective that shifts targets, and one that leaves a parameter out."""
    student, batch = tiny_gpt(), random_batch()
    objective = CrossEntropy(student)
    loss = loss_of(objective, batch)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(student(batch.tokens).reshape(N, V), batch.targets.reshape(N)))
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())
    objective.after_step(1)


def test_exactly_one_judge():
    """Catches an objective without a judge, or with two of which one is ignored."""
    student = tiny_gpt()
    both: dict[str, Any] = {"critic": TableCritic(), "twin": tiny_gpt(seed=1)}
    for judges in ({}, both):
        with pytest.raises(ValueError, match=r"either a critic .* or a twin"):
            AvataRL(student, method(), steps=10, seed=0, **judges)
