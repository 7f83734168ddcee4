"""The loop: batches that are split differently give the same curve, and what is not finite changes nothing."""

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train_core
from avatarl.objective import AvataRL
from data.batches import TrainingBatches
from tests.tiny_train import PRESET, before_step, flags, here, lines, same, trained, weights

# Twenty steps at the rates of the first twenty of the default preset. They matter: Muon orthogonalises in bfloat16,
# so a last bit of a gradient can become a third digit of an update.
CURVE: dict[str, Any] = {
    "train_steps": 20,
    "eval_every": 10,
    "eval_sample_tokens": 0,
    "optim_warmup_steps": 5,
}
COMPARED = ("train/loss", "train/reward", "train/entropy", "train/p_gold", "val/ce", "val/accuracy", "val/ece")


def assert_same_curve(a: Path, b: Path) -> None:
    """The curves of two records, to 1e-5."""
    for one, other in zip(lines(a), lines(b), strict=True):
        assert one.keys() == other.keys() and one["step"] == other["step"]
        for key in one.keys() & set(COMPARED):
            assert other[key] == pytest.approx(one[key], rel=0, abs=1e-5), (key, one["step"])


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_accumulation_changes_nothing(place, optimizer):
    """Catches a loss summed over micro-batches, one that is not averaged over all of them, or rows trained twice."""
    runs = [trained(f"x{n}", optim_name=optimizer, train_grad_accum=n, **CURVE) for n in (1, 2, 4)]
    assert_same_curve(runs[0], runs[1])
    assert_same_curve(runs[0], runs[2])
    assert lines(runs[0])[-2]["train/loss"] < lines(runs[0])[1]["train/loss"] - 0.01, "the run did not learn"


def poison(monkeypatch: pytest.MonkeyPatch, where: str, steps: set[int]) -> None:
    """Make the loss, or only its gradient, NaN at those steps."""
    forward = AvataRL.forward

    def poisoned(self: AvataRL, batch: Any, step: int, *rest: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = forward(self, batch, step, *rest)
        if step in steps and where == "loss":
            loss = loss * math.nan
        if step in steps and where == "gradient":
            loss = loss + (0 * self.student.wte.weight).abs().sqrt().sum()  # 0, with the slope 0 · ∞
        return loss, metrics

    monkeypatch.setattr(AvataRL, "forward", poisoned)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped(place, monkeypatch, where):
    """Catches NaN that reaches weights or momentum, a step that is not counted, a run that stops at the first."""
    poison(monkeypatch, where, {4})
    snapshots = []

    def remember(job: train_core.Job) -> None:
        moments = [s for o in job.optimizers for p in o.state.values() for s in p.values()]
        snapshots.append([t.detach().clone() for t in (*job.objective.parameters(), *moments)])

    with before_step(4, remember), before_step(5, remember):
        outcome = here(PRESET, *flags(run_name="run", data_corpus="corpus.txt"))
    assert outcome.code == 0
    before, after = snapshots
    assert len(before) == len(after) > 10 and all(map(torch.equal, before, after))
    assert "step 5" in outcome.err and "not finite" in outcome.err
    assert json.loads(Path("runs/run/result.json").read_text())["skipped_steps"] == 1
    assert all(tensor.isfinite().all() for tensor in weights(Path("runs/run")).values())
    text = Path("runs/run/metrics.jsonl").read_text()
    assert "NaN" not in text  # no JSON, though Python's own parser takes it


def test_too_many_bad_steps_end_the_run(place, monkeypatch):
    """Catches a run that burns its hours on NaN, and an end that does not say where to go on."""
    poison(monkeypatch, "loss", set(range(5, 99)))
    settings = flags(run_name="run", data_corpus="corpus.txt", train_max_bad_steps=3, train_checkpoint_every=2)
    good: dict[str, Tensor] = {}

    def remember(job: train_core.Job) -> None:
        good.update({k: v.clone() for k, v in job.objective.student.state_dict().items()})

    with before_step(5, remember):
        outcome = here(PRESET, *settings)
    assert outcome.code == 1 and len(outcome.errors) == 1
    assert "step 8" in outcome.errors[0] and "3 steps in a row" in outcome.errors[0]
    assert "step-000006" in outcome.errors[0]
    # What it calls good is good: the weights before the first bad step.
    assert same(good, weights(Path("runs/run"), 6))


def test_bad_steps_in_a_row_are_counted_in_a_row(place, monkeypatch):
    """Catches a counter that is never reset: with limit 2, three single bad steps are no reason to stop."""
    poison(monkeypatch, "loss", {1, 3, 5})
    run = trained("run", train_max_bad_steps=2)
    assert json.loads((run / "result.json").read_text())["skipped_steps"] == 3


def test_waiting_for_batches_is_training_time(place, monkeypatch):
    """Catches `seconds` and tokens a second that leave out what loading costs, to a cached critic's advantage."""
    batch = TrainingBatches.batch

    def slow(self: TrainingBatches, *which: Any) -> Any:
        time.sleep(0.05)
        return batch(self, *which)

    monkeypatch.setattr(TrainingBatches, "batch", slow)
    last = json.loads((trained("run") / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 8 and last["seconds"] > 8 * 0.05


def test_the_record_of_a_run(place):
    """Catches keys of DESIGN section 6 that are missing or renamed, and wrong counts of steps and tokens."""
    run = trained("run", log_every=2)
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in found if "train/loss" in line]
    val = [line for line in found if "val/ce" in line]
    assert [line["step"] for line in train] == [2, 4, 6, 8] and [line["step"] for line in val] == [0, 4, 8]
    names = (
        "loss reward reward_std p_gold gold_rank gold_kept action_mass action_count overlap entropy critic_kl "
        "grad_norm tokens_per_second utilisation peak_memory_gb"
    )
    assert train[0].keys() == {"step", "tokens", "seconds", "lr"} | {f"train/{n}" for n in names.split()}
    assert val[0].keys() == {"step", "tokens", "seconds"} | {
        f"val/{n}" for n in ("ce", "ppl", "bpb", "accuracy", "ece")
    }
    assert [line["tokens"] for line in train] == [2 * 64, 4 * 64, 6 * 64, 8 * 64]
    assert train[0]["lr"] == pytest.approx(3e-3)  # the second of two steps of warm-up
    assert all(a["seconds"] < b["seconds"] for a, b in itertools.pairwise(train))
    assert val[0]["val/ppl"] == pytest.approx(math.exp(val[0]["val/ce"]))
    assert (run / "samples.txt").read_text().count("=== step ") == 3


def test_a_key_that_does_not_apply_is_absent(place):
    """Catches rewards and critics reported as zero where the objective has none."""
    (first, *_) = [line for line in lines(trained("run", "pretrain-char")) if "train/loss" in line]
    assert "train/loss" in first
    of_rewards = {"reward", "reward_std", "gold_kept", "action_mass", "action_count", "overlap", "critic_kl"}
    assert not {f"train/{name}" for name in of_rewards} & first.keys()


def test_the_rate_follows_the_schedule(place):
    """Catches a rate that is set after the step, or set for one of the two optimisers only."""
    rates = []

    def note(job: train_core.Job) -> None:
        rates.append([group["lr"] / group["peak_lr"] for o in job.optimizers for group in o.param_groups])

    with before_step(1, note), before_step(2, note), before_step(7, note):
        trained("run", optim_warmup_steps=2)
    # `note` sees the rate of the step about to be taken.
    assert all(len(set(shares)) == 1 and len(shares) == 3 for shares in rates)
    assert [shares[0] for shares in rates] == pytest.approx([1.0, 1.0, 0.1 + 0.9 * (1 + math.cos(5 / 6 * math.pi)) / 2])


def test_evaluation_and_samples_leave_training_alone(place):
    """Catches evaluation or sampling that draws from the generator of training, or leaves dropout off."""
    settings: dict[str, Any] = {"model_dropout": 0.3, "log_every": 8}
    often = trained("often", eval_every=1, **settings)
    never = trained("never", eval_every=0, eval_sample_tokens=0, **settings)
    assert same(weights(often), weights(never))
    assert not (never / "samples.txt").exists()


def test_another_seed_is_another_run(place):
    """Catches a seed that does not reach the weights or the order of the data."""
    a, b = trained("a", train_steps=2), trained("b", train_steps=2, run_seed=1338)
    assert lines(a)[0]["val/ce"] != lines(b)[0]["val/ce"]


def test_one_run_twice_is_one_run(place):
    """Catches hidden randomness, without which no comparison and no resume could be trusted."""
    a, b = trained("a", model_dropout=0.2), trained("b", model_dropout=0.2)
    assert same(weights(a), weights(b)) and lines(a) == lines(b)


def test_dropout_differs_from_step_to_step(place):
    """Catches generators keyed by the seed alone, which drop the same numbers at every step."""
    drawn: list[Tensor] = []
    seeded = train_core.checkpoints.seed_everything

    def draw(*key) -> None:
        seeded(*key)
        drawn.append(torch.rand(8))
        seeded(*key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_core.checkpoints, "seed_everything", draw)
        trained("run", train_steps=3)
    assert len(drawn) == 3 and len({tuple(d.tolist()) for d in drawn}) == 3
