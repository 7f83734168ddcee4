"""The bootstrapping objective on a tiny policy: what it minimises, in every form, and what it keeps between calls."""

from typing import Any

import pytest
import torch
from torch import Tensor

from avatarl.critics import PastCritic
from avatarl.ngram import NgramCritic
from bootstrap import grpo
from bootstrap.curriculum import STAGES, Curriculum, StageStatistics
from bootstrap.rewards import credit_table, exact_match
from bootstrap.rollouts import uniform_draws
from bootstrap.selfplay import beating, judging_copy, value_of
from data.batches import Batch
from tests.bootstrap.builders import SAMPLED, TABLES, TEXT, V, corpus_batch, loss_of, objective, policy, rows_of

EXPECTED: dict[str, Any] = {"policy_weighting": "expected"}
CREDIT = credit_table(TABLES, (0.1, 0.2, 0.3, 0.4), "relative")
GROUP: dict[str, Any] = {**EXPECTED, "advantage": "group"}
HORIZON: dict[str, Any] = {**SAMPLED, "horizon": 3}
FORMS: dict[str, dict[str, Any]] = {
    "reinforce": {},
    "expected": EXPECTED,
    "group": GROUP,
    "sampled": SAMPLED,
    "horizon": HORIZON,
    "kl, band, mask": {"kl_coef": 0.3, "entropy_low": 1.5, "entropy_bonus": 0.5, "mask_entropy": 1.0, **SAMPLED},
    "credit, confidence": {"ngram_weight": 0.5, "confidence_weight": 0.7},
}
forms = pytest.mark.parametrize("settings", FORMS.values(), ids=FORMS.keys())


def log_pi_of(model, batch: Batch) -> Tensor:
    """log π at every position, as decisions: (N, V)."""
    return model(batch.tokens).flatten(0, 1).log_softmax(-1)


def curriculum(stages=STAGES, **bounds: Any) -> Curriculum:
    """A curriculum over the text, whose tokens stand for letters, a space and a line's end."""
    return Curriculum(StageStatistics.build(TEXT, list("abAB: \n")), stages, **bounds)


@pytest.mark.parametrize("weighting", ["reinforce", "expected"])
def test_exhaustive_is_the_definition(weighting):
    """Catches logits read one position late, a term without its weight, a mean over actions."""
    model, batch = policy(), corpus_batch()
    made = objective(model, policy_weighting=weighting, exact_weight=0.3, ngram_weight=0.5, kl_coef=0.2)
    loss, _ = made(batch, 0, {}, True)
    log_pi = log_pi_of(model, batch)
    r = 0.3 * exact_match(batch.targets, V).flatten(0, 1)
    r = r + 0.5 * CREDIT.for_sequence(batch.tokens, 3).flatten(0, 1)
    gain = (r * (log_pi if weighting == "reinforce" else log_pi.exp())).sum(-1)
    kl = grpo.kl_to(log_pi, TABLES.log_reference(batch.tokens.flatten()[:, None]))
    torch.testing.assert_close(loss, (0.2 * kl - gain).mean())


def test_sampled_rewards_are_those_of_the_slow_way():
    """Catches samples, rewards or advantages that are given to another position: one sample at a time, by hand."""
    model, batch, seed = policy(), corpus_batch(), 5
    made = objective(model, seed=seed, temperature_low=0.5, temperature_high=2.0, guidance=0.25, **SAMPLED)
    rollout: dict[str, Any] = {}
    loss = loss_of(made, batch, 3, rollout)
    pi, draws = log_pi_of(model, batch).exp().view(3, 8, V), uniform_draws(seed, 3, batch, 4)
    total = 0.0
    for b in range(3):
        for t in range(8):
            context, brought = batch.tokens[b, : t + 1], []
            reference = TABLES.log_reference(context[-1:][None])[0].exp()
            for g, temperature in enumerate([0.5, 1.0, 1.5, 2.0]):
                mu = pi[b, t] ** (0.75 / temperature) * reference**0.25
                ladder = (mu / mu.sum()).cumsum(-1)
                action = int((ladder <= draws[b, t, g]).sum())
                assert rollout["actions"][b * 8 + t, g] == action
                credit = 0.0
                for n, share in enumerate((0.1, 0.2, 0.3, 0.4)):
                    p = TABLES.probs(context[None], n)[0]
                    credit += share * float(p[action] / p.max())
                brought.append(float(action == int(batch.targets[b, t])) + 0.5 * credit)
            wanted = grpo.group_advantages(torch.tensor(brought, dtype=torch.float64))
            torch.testing.assert_close(
                rollout["advantages"][b * 8 + t], wanted, rtol=1e-4, atol=1e-5, check_dtype=False
            )
            total += float(wanted.mean())  # at ratio 1
    assert loss.item() == pytest.approx(-total / 24, abs=1e-5)


@forms
def test_finite_differences(settings):
    """Catches a detached factor anywhere between a weight and the loss; rollouts and rewards are held constant."""
    model = policy()
    made, rollout = objective(model, **settings), dict[str, Any]()
    loss_of(made, rollout=rollout)
    with torch.no_grad():  # away from the kink of the ratio's minimum at 1
        for p in model.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(4), dtype=p.dtype))
    loss_of(made, rollout=rollout).backward()
    weight, step = dict(model.named_parameters())["blocks.0.mlp.up.weight"], 1e-5
    for place in ((0, 0), (3, 5), (17, 2)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[place] += sign * step
            values.append(float(loss_of(made, rollout=rollout).detach()))
            with torch.no_grad():
                weight[place] -= sign * step
        assert weight.grad is not None
        assert float(weight.grad[place]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("settings", [SAMPLED, HORIZON, GROUP], ids=["sampled", "horizon", "group"])
def test_the_ratio_is_one_at_the_first_inner_epoch(settings):
    """Catches an update that reads another context, or in another mode, than the policy that acted did."""
    model, kept = policy(), dict[str, Any]()
    made = objective(model, temperature_low=0.5, temperature_high=1.5, inner_epochs=2, **settings)
    first, again = (loss_of(made, rollout=kept) for _ in range(2))
    assert torch.equal(first, again), "nothing has changed: ρ = 1 to the last bit"
    kept["old"] = kept["old"] - 0.5
    assert not torch.equal(loss_of(made, rollout=kept), first)


def test_with_dropout_the_pass_that_acts_is_the_one_that_learns():
    """Catches actions drawn under one mask and learned from under another."""
    model, batch, kept = policy(dropout=0.4), corpus_batch(), dict[str, Any]()
    torch.manual_seed(3)
    loss_of(objective(model, **SAMPLED), batch, rollout=kept)
    torch.manual_seed(3)
    torch.testing.assert_close(kept["old"], log_pi_of(model, batch).gather(-1, kept["actions"]))


@forms
def test_windows_of_whole_rows_are_sequences(settings):
    """Catches two forms of context that give other numbers where contexts are the same."""
    batch = corpus_batch()
    one, other = (objective(contexts=form, **settings) for form in ("sequence", "windows"))
    assert torch.equal(loss_of(one, batch), loss_of(other, batch))


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["exhaustive", "sampled"])
def test_sliding_windows_are_the_last_places_of_sequences(settings):
    """Catches a sliding window that is judged on another context than the sequence that ends with it.

    A row of 15 has 8 full windows; each is the last position of a sequence of its own.
    """
    wide = corpus_batch(rows=1, length=15)
    model = policy()
    made = objective(
        model, contexts="windows", row=15, soft=NgramCritic(TEXT, V, context=2), soft_weight=0.5, **settings
    )
    kept: dict[str, Any] = {}
    loss_of(made, wide, rollout=kept)
    tokens = wide.tokens.unfold(1, 8, 1)[0]
    narrow = Batch(tokens, wide.targets.unfold(1, 8, 1)[0], torch.arange(8), torch.arange(8))
    alone = objective(model, soft=NgramCritic(TEXT, V, context=2), soft_weight=0.5, **settings)
    theirs: dict[str, Any] = {}
    loss_of(alone, narrow, rollout=theirs)
    last = theirs["reward"].view(8, 8, V)[:, -1]
    torch.testing.assert_close(kept["reward"][7:, 0], last)


@forms
def test_a_split_batch_gives_the_same_loss(settings):
    """Catches a mean, a draw or a band that depends on how a batch is split among micro-batches and processes."""
    batch, made = corpus_batch(rows=4), objective(**settings)
    halves = [rows_of(batch, part) for part in (slice(2), slice(2, 4))]
    parts = [loss_of(made, half) for half in halves]
    torch.testing.assert_close(loss_of(made, batch), (parts[0] + parts[1]) / 2)


def test_masked_decisions_learn_nothing_from_rewards():
    """Catches a mask that keeps the sure ones, and a mean over the kept alone, which changes with the batch."""
    model, batch = policy(), corpus_batch()
    entropy = grpo.entropy_of(log_pi_of(model, batch).detach())
    threshold = float(entropy.median())
    loss, measured = objective(model, mask_entropy=threshold)(batch, 0, {}, True)
    log_pi = log_pi_of(model, batch)
    gain = log_pi.gather(-1, batch.targets.flatten()[:, None])[:, 0]
    torch.testing.assert_close(loss, -(gain * (entropy >= threshold)).mean())
    assert float(measured["bootstrap/masked"]) == pytest.approx(float((entropy < threshold).float().mean()))


@pytest.mark.parametrize("name", ["exact_weight", "ngram_weight", "confidence_weight", "soft_weight", "kl_coef"])
def test_schedules_reach_the_loss(name):
    """Catches a constant where a schedule was asked for."""
    parts: dict[str, Any] = {"soft": NgramCritic(TEXT, V, context=2)} if name == "soft_weight" else {}
    paid: dict[str, Any] = {} if name == "exact_weight" else {"exact_weight": 1.0}
    scheduled: dict[str, Any] = {f"{name}_schedule": "0:0.1,1:2"}
    made = objective(**paid, **parts, **scheduled)
    for step, value in ((0, 0.1), (9, 2.0)):
        constant: dict[str, Any] = {name: value}
        torch.testing.assert_close(loss_of(made, step=step), loss_of(objective(**paid, **constant, **parts)))


def test_guidance_reaches_the_samples():
    """Catches a guidance that is not scheduled: at 1 the bigram acts alone, and π learns nothing from it."""
    made, kept = objective(guidance_schedule="0:1,1:0", **SAMPLED), dict[str, Any]()
    loss = loss_of(made, rollout=kept)
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in made.student.parameters())
    torch.testing.assert_close(
        kept["old"].double(), kept["bigram"][:, 0].gather(-1, kept["actions"]).double(), rtol=1e-5, atol=1e-5
    )


def test_what_is_logged():
    """Catches a key that docs/metrics.md does not explain, and terms that don't add up to the reward."""
    from reporting.metrics import METRICS

    made = objective(
        soft=NgramCritic(TEXT, V, context=2), curriculum=curriculum(), stages=",".join(STAGES),
        soft_weight=0.2, confidence_weight=0.3, mask_entropy=0.1, entropy_bonus=0.1, entropy_low=1.0, **SAMPLED,
        past=PastCritic(policy(2), size=1, decay=0.9, every=1, seed=0), opponent="ema", opponent_weight=0.0,
    )  # fmt: skip
    _, measured = made(corpus_batch(), 0, {}, True)
    found = {**measured, **made.rates(100.0)}
    assert set(found) <= set(METRICS)
    assert all(torch.as_tensor(value).isfinite() for value in found.values())
    terms = [value for key, value in measured.items() if key.startswith("bootstrap/reward_") and "mean" not in key]
    assert len(terms) == 5
    torch.testing.assert_close(torch.stack(terms).sum(), measured["train/reward"])
    assert not made(corpus_batch(), 0, {}, False)[1], "nothing is measured unasked"


def test_the_plain_mean_of_rewards_says_nothing_of_the_policy():
    """Catches a mean that is taken under the policy: it must be the same for any two, where expected reward is not."""
    means = [objective(policy(seed))(corpus_batch(), 0, {}, True)[1] for seed in (0, 1)]
    assert float(means[0]["bootstrap/reward_mean"]) == pytest.approx(1 / V)
    assert torch.equal(means[0]["bootstrap/reward_mean"], means[1]["bootstrap/reward_mean"])
    assert not torch.equal(means[0]["train/reward"], means[1]["train/reward"])


def test_selfplay_pays_for_the_margin():
    """Catches an opponent that reads something else, a value under the wrong policy, a margin that may be negative."""
    model, rival, batch = policy(), policy(3), corpus_batch()
    past = PastCritic(rival, size=1, decay=0.9, every=1, seed=0)
    kept: dict[str, Any] = {}
    loss = loss_of(objective(model, past=past, ngram_weight=0.5, opponent="ema", opponent_weight=0.7), batch, 0, kept)
    own = exact_match(batch.targets, V).flatten(0, 1).double()
    own = own + 0.5 * CREDIT.for_sequence(batch.tokens, 3).flatten(0, 1)
    r = beating(own, value_of(log_pi_of(rival, batch), own), 0.7)
    assert (r >= 0).all()
    torch.testing.assert_close(kept["reward"][:, 0], r, check_dtype=False)
    torch.testing.assert_close(loss, -(r * log_pi_of(model, batch)).sum(-1).mean(), check_dtype=False)


def test_a_margin_alone_is_a_baseline():
    """Catches self-play that does nothing: without the cut at 0, a value per context cancels from advantages."""
    rewards = torch.rand(4, V, dtype=torch.float64)
    value = torch.rand(4, dtype=torch.float64)
    centred = grpo.group_advantages(rewards - value[:, None])
    torch.testing.assert_close(centred, grpo.group_advantages(rewards))
    assert not torch.allclose(grpo.group_advantages(beating(rewards, value, 1.0)), centred, atol=1e-3)


def test_the_past_follows_and_the_twin_learns():
    """Catches an opponent that stays as it was."""
    student = policy()
    past = PastCritic(student, size=1, decay=0.5, every=1, seed=0)
    made = objective(student, past=past, opponent="ema")
    before = judging_copy(past).wte.weight.clone()
    with torch.no_grad():
        student.wte.weight.add_(1.0)
    made.after_step(1)
    torch.testing.assert_close(judging_copy(past).wte.weight, before + 0.5)
    twins = objective(policy(), twin=policy(1), opponent="twin")
    loss_of(twins).backward()
    for player in (twins.student, twins.twin):
        assert player is not None and all(p.grad is not None and p.grad.any() for p in player.parameters())


def test_the_curriculum_moves_on_and_travels():
    """Catches a stage that never ends, or a resumed run that starts over with the first."""
    settings: dict[str, Any] = {"stages": ",".join(STAGES), "exact_weight": 0.0}
    bounds: dict[str, Any] = {"window": 1, "min_steps": 2, "max_steps": 2}
    made = objective(curriculum=curriculum(**bounds), **settings)
    seen = []
    for step in range(5):
        loss_of(made, step=step)
        made.after_step(step + 1)
        _, measured = made(corpus_batch(), step, {}, True)
        made._stage_batches = 0
        seen.append(int(measured["bootstrap/stage"]))
    assert seen == [0, 1, 1, 2, 2]
    again = objective(curriculum=curriculum(**bounds), **settings)
    again.load_state_dict(made.state_dict())
    assert torch.equal(loss_of(again), loss_of(made))
    assert again.curriculum is not None and again.curriculum.current == "words"


def test_what_is_counted():
    """Catches a speed that counts tokens for decisions, and FLOPs that forget windows, samples or players."""
    forward = policy().flops_per_token()
    cases: list[tuple[dict[str, Any], float, float]] = [
        ({}, 1.0, 3.0),
        ({"policy_weighting": "expected", "advantage": "group", "inner_epochs": 2}, 1.0, 6.0),
        ({"contexts": "windows", "row": 12}, 1.0, 3 * 5 * 8 / 12),
        ({**HORIZON}, 4 * 3 / 8, 3 * 4 * 8 / 8 + (6 + 4 * 2) / 8),
        ({"twin": policy(1), "opponent": "twin"}, 2.0, 2 * 4.0),
    ]
    for settings, decisions, passes in cases:
        made = objective(**settings)
        assert made.decisions_per_token() == pytest.approx(decisions)
        assert made.flops_per_token() == pytest.approx(passes * forward)
