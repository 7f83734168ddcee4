"""One, two and four processes learn the same, replicated or sharded, and continue each other's checkpoints."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from avatarl.objective import AvataRL, CrossEntropy
from config import ModelConfig, OptimConfig
from data.batches import Batch
from model import GPT
from tests.processes import command, on, together, trained_together, words
from tests.test_train_core import CURVE, assert_same_curve
from tests.tiny_train import here, lines, same, trained, weights
from training.distributed import process_group, shared_out, world_from_environment
from training.optim import build_optimizers
from training.parallel import backward_of, cut_like, gathered, shard, whole, wrapped

CPU = torch.device("cpu")


def test_one_two_and_four_processes_give_one_curve(place):
    """Catches gradients summed or not exchanged, rows that two ranks share, a share of the evaluation that is lost."""
    settings = CURVE | {"model_n_layer": 2, "train_steps": 12, "eval_every": 6}
    alone, two = trained("alone", **settings), Path("runs/two")
    said = trained_together(2, words("two", train_grad_accum=4, **settings))
    assert sum(outcome.out.count("step     12  val CE") for outcome in said) == 1, "more than one process speaks"
    assert_same_curve(alone, two)
    assert_same_curve(alone, on(4, "four", **settings))
    assert_same_curve(alone, on(2, "two-sharded", "fsdp", train_grad_accum=4, **settings))
    for run in (alone, two):  # what two have saved continues on one
        assert here("--resume", str(run), "--train.steps", "14").code == 0
    assert_same_curve(alone, two)


OBJECTIVES: dict[str, dict[str, Any]] = {
    "cross-entropy, adamw": {"train_objective": "cross-entropy", "optim_name": "adamw"},
    "ring": {"critic_kind": "self", "critic_past": "ring", "critic_ring_every": 2, "critic_ring_size": 2},
    "twin": {"critic_kind": "self", "critic_past": "twin"},
    "group, accumulation": {
        "method_policy_weighting": "expected",
        "method_advantage": "group",
        "method_inner_epochs": 2,
        "train_grad_accum": 4,  # two on each of two processes
    },
    "imagined windows, accumulation": {"method_imagined_windows": 2, "train_grad_accum": 2},
    "student contexts, rotary": {
        "method_context": "student",
        "model_position": "rope",
        "model_qk_norm": True,
        "model_short_conv": 2,
        "model_ngram_embed": 3,
        "model_ngram_rows": 64,
    },
}


@pytest.mark.parametrize("settings", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_whatever_is_learned_can_be_sharded(place, settings):
    """Catches an objective that uses parameters which are not gathered, and a past that follows half a student."""
    short = CURVE | {"train_steps": 6, "eval_every": 3, "eval_sample_tokens": 4}
    alone, two = trained("alone", **settings, **short), on(2, "two", "fsdp", **settings, **short)
    assert_same_curve(alone, two)
    assert (alone / "samples.txt").read_text() == (two / "samples.txt").read_text()


MOVES = [(2, "ddp", 4, "ddp"), (2, "fsdp", 1, "ddp"), (1, "ddp", 2, "fsdp"), (2, "fsdp", 4, "fsdp")]


@pytest.mark.parametrize("move", MOVES, ids=lambda m: f"{m[0]} {m[1]} to {m[2]} {m[3]}")
def test_a_checkpoint_continues_on_other_processes(place, move):
    """Catches shares saved as wholes, weights of one rank, moments that are lost or belong to other parameters."""
    before, kind, after, other = move
    settings = CURVE | {"train_steps": 8, "eval_every": 4, "critic_kind": "self", "critic_past": "ema"}
    settings |= {"train_grad_accum": 2}  # twice two sequences on one process; two have one of two each, four of one
    alone = trained("alone", train_checkpoint_every=4, **settings)
    run = on(before, "run", kind, train_checkpoint_every=4, **settings)
    for step in (4, 8):
        mine, theirs = weights(run, step), weights(alone, step)
        assert mine.keys() == theirs.keys()
        assert all(torch.allclose(mine[k], theirs[k], rtol=0, atol=1e-4) for k in mine)
    more = ["--train.steps", "12", "--run.parallel"]
    assert here("--resume", str(alone), *more, "ddp").code == 0
    trained_together(after, ["--resume", str(run), *more, other])
    assert_same_curve(alone, run)


def test_resuming_is_exact_on_many_processes(place):
    """Catches sums whose order depends on how long ago a process started: three of them differ in the last bits."""
    settings = CURVE | {"train_steps": 8, "train_batch_size": 6, "train_checkpoint_every": 4, "model_n_layer": 2}
    whole_run = on(3, "whole", **settings)
    run = shutil.copytree(whole_run, "runs/run")
    shutil.rmtree(Path(run) / "checkpoints" / "step-000008")
    trained_together(3, ["--resume", "runs/run"])
    assert same(weights(whole_run), weights(Path(run))) and lines(whole_run) == lines(Path(run))


def test_the_first_process_writes_whole_checkpoints(place):
    """Catches parts of what all hold that are written by others, on whose machines nobody looks for them."""
    run = on(2, "run", train_steps=2, critic_kind="self", critic_past="ema", optim_name="muon")
    state = run / "checkpoints" / "step-000002" / "state"
    held = {name: sum(path.stat().st_size for path in state.glob(f"__{name}_*.distcp")) for name in "01"}
    assert held["0"] > 0 and held["1"] == 0  # the library makes its file all the same
    assert here("--resume", str(run), "--train.steps", "3").code == 0


def refused(count: int, *more: str) -> list[str]:
    """What `count` processes say of a command that none of them accepts."""
    outcomes = together(count, command, [*words("run", "ddp", train_batch_size=6), *more])
    assert [o.code for o in outcomes] == [2] * count
    return [line for o in outcomes for line in o.errors]


def test_a_batch_that_the_processes_cannot_share_is_refused(place):
    """Catches a machine more or fewer that changes the batch, or leaves processes waiting for the one that failed."""
    said = refused(4)
    assert len(set(said)) == 1 and "train.batch-size = 6" in said[0] and "among 4 processes" in said[0]
    assert not Path("runs").exists()


def poisoned(line: list[str], poison: float) -> Any:
    """A run on these processes, of which the second has a loss that is not finite at step 3: its gradients are."""
    forward, world = AvataRL.forward, world_from_environment()

    def bad(self: AvataRL, batch: Any, step: int, *rest: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = forward(self, batch, step, *rest)
        return loss + poison if step == 3 and world.rank == 1 else loss, metrics

    AvataRL.forward = bad  # type: ignore[assignment, method-assign]  # this process ends with the run
    return command(line).code


@pytest.mark.parametrize(("kind", "poison"), [("ddp", math.inf), ("fsdp", math.nan)])
def test_what_is_not_finite_on_one_process_is_skipped_by_all(place, kind, poison):
    """Catches processes that go apart at a bad step, and one whose partners never hear of it."""
    assert together(2, poisoned, words("run", kind), poison) == [0, 0]
    assert json.loads(Path("runs/run/result.json").read_text())["skipped_steps"] == 1
    assert all(tensor.isfinite().all() for tensor in weights(Path("runs/run")).values())


def objective() -> CrossEntropy:
    """A model of 7 columns, which no number of processes cuts evenly."""
    torch.manual_seed(1)
    return CrossEntropy(GPT(ModelConfig(n_layer=2, n_head=1, n_embd=7, block_size=4), 5))


def rows(rank: int) -> Batch:
    """One row that only this process learns from."""
    tokens = torch.randint(5, (1, 5), generator=torch.Generator().manual_seed(rank))
    return Batch(tokens[:, :-1], tokens[:, 1:], None, torch.arange(1))


def shares() -> tuple[int, float, bool]:
    """Numbers that this process holds of a sharded model; how far it is from the whole one; whether it loads whole."""
    world, there = world_from_environment(), objective()
    full = {k: v.clone() for k, v in there.state_dict().items()}
    with process_group(world, CPU):
        shard(there, world, CPU)
        own = sum(p.to_local().numel() for p in there.parameters())  # type: ignore[attr-defined]
        with torch.no_grad():
            mine = gathered(there, there.student, rows(0).tokens)
            error = float((mine - objective().student(rows(0).tokens)).abs().max())
        state = there.state_dict()
        back = all(torch.equal(whole(cut_like(v, state[k])), v) for k, v in full.items())
    return own, error, back


@pytest.mark.parametrize("count", [2, 3])
def test_a_sharded_model_is_cut_and_gathered(place, count):
    """Catches parameters that every process keeps whole, rows that are lost where they do not divide, other weights."""
    found = together(count, shares)
    assert sum(own for own, _, _ in found) == objective().student.parameter_count()
    assert max(own for own, _, _ in found) < 1.3 * objective().student.parameter_count() / count
    assert all(error < 1e-6 and back for _, error, back in found)


def accumulated(kind: str) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of two micro-batches in this process: those that it has before the last, and after it."""
    world, there = world_from_environment(), objective()
    with process_group(world, CPU):
        if kind == "fsdp":
            shard(there, world, CPU)
        module, seen = wrapped(there, world, CPU), []
        for last in (False, True):
            with backward_of(module, last):
                loss, _ = module(rows(2 * world.rank + last), 0, {}, False)
                (loss / 2).backward()
            seen.append([whole(p.grad.detach()).clone() for p in there.parameters() if p.grad is not None])
    return seen[0], seen[1]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_are_exchanged_once_a_step(place, kind):
    """Catches an exchange after every micro-batch, and an accumulated part that is left out of the only one."""
    (first, after), (first_of_other, after_of_other) = together(2, accumulated, kind)
    if kind == "ddp":
        assert any(not torch.allclose(a, b) for a, b in zip(first, first_of_other, strict=True))
    else:
        assert first == first_of_other == []  # not even a share is there yet
    alone = objective()
    for i in range(4):
        (alone(rows(i), 0, {}, False)[0] / 4).backward()
    expected = [p.grad for p in alone.parameters() if p.grad is not None]
    for found in (after, after_of_other):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def spread(counts: list[int]) -> tuple[list[list[Tensor]], int]:
    """Squares of stacks of so many matrices, each stack of another shape, and how many this process did."""
    done = 0

    def work(stack: Tensor) -> Tensor:
        nonlocal done
        done += len(stack)
        return stack.square()

    with process_group(world_from_environment(), CPU):
        return shared_out(matrices(counts), work), done


def matrices(counts: list[int]) -> list[list[Tensor]]:
    """Stacks of matrices of which no two are alike."""
    return [[torch.arange(3.0 * (k + 1)).view(k + 1, 3) + 10 * k + i for i in range(n)] for k, n in enumerate(counts)]


@pytest.mark.parametrize("counts", [[1], [5], [6, 1, 4]], ids=str)
def test_work_is_shared_out_and_comes_back_in_order(place, counts):
    """Catches items done twice or by nobody, results in another order, and a process without work that fails."""
    found = together(3, spread, counts)
    for results, _ in found:
        for stack, mine in zip(results, matrices(counts), strict=True):
            assert len(stack) == len(mine) and all(map(torch.equal, stack, [m.square() for m in mine]))
    assert sum(done for _, done in found) == sum(counts)


def stepped(kind: str, skipped: bool) -> dict[str, Tensor]:
    """Weights after two steps of Muon and AdamW, the second of them skipped as on a GPU where it is bad."""
    world, there = world_from_environment(), objective()
    with process_group(world, CPU):
        if kind == "fsdp":
            shard(there, world, CPU)
        module, optimizers = wrapped(there, world, CPU), build_optimizers(there, OptimConfig(name="muon"))
        for bad in (False, skipped):
            module(rows(0), 0, {}, False)[0].backward()
            for optimizer in optimizers:
                optimizer.found_inf = torch.tensor(float(bad))  # type: ignore[attr-defined]
                optimizer.step()
            module.zero_grad()
        return {k: whole(v).clone() for k, v in there.state_dict().items()}


@pytest.mark.parametrize("skipped", [False, True])
def test_a_step_on_shares_is_the_step_on_the_whole(place, skipped):
    """Catches Muon on rows of a matrix instead of all of it, and optimisers that ignore a flag beside their shares."""
    (alone,) = together(1, stepped, "ddp", skipped)
    for kind in ("ddp", "fsdp"):
        one, other = together(2, stepped, kind, skipped)
        assert same(one, other)
        assert all(torch.allclose(one[k], alone[k], atol=1e-6) for k in alone)
