"""What only a GPU can show: the tests that need one, compiled steps of 124 M and 250 M, and a whole short run.

The losses' part of `bench.py --gpu` is benchmarks/loss.py, on the device.
"""

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from benchmarks.step import ENTROPY, WITH_FORWARD, add_forward, step_arm
from benchmarks.table import Table
from benchmarks.timing import Arm, Conditions, forget_compiled, measure, peak_flops, settle
from benchmarks.trainers import PlainLoop, Shape, new_model, read_text, trainer
from config import Config, override, preset
from data.prepare import Dataset
from data.tokenizers import Tokenizer
from model import GPT
from train_core import fit
from training.hardware import synchronise
from training.record import Recorder

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"124 M": Shape(12, 768, 12, 1024, 16), "250 M": Shape(16, 1024, 16, 1024, 16)}
CRITIC = Shape(6, 384, 6, 1024, 16)
GPT2_VOCABULARY = 50257
COMPILED = "nanoGPT's loop, compiled"
NO_TESTS = 5  # pytest's exit code where nothing was collected


def tests(conditions: Conditions, words: Sequence[str] = ("-m", "gpu")) -> Iterator[Table]:
    """The tests marked gpu, in a process of their own. A failure, or no such test, fails the part."""
    table = Table("Tests that need a GPU")
    command = [sys.executable, "-m", "pytest", *words, "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=conditions.seconds)
    except subprocess.TimeoutExpired:
        table.failed = f"not over after {conditions.seconds:.0f} s"
    else:
        said = [line for line in done.stdout.splitlines() if line.strip()]
        summary = re.sub(r" in [\d.]+s.*", "", said[-1]).strip("= ") if said else "pytest said nothing"
        table.notes.append(f"{summary}, {time.perf_counter() - start:.0f} s")
        table.notes += [line for line in said if line.startswith(("FAILED", "ERROR"))]
        if done.returncode:
            nothing = done.returncode == NO_TESTS
            table.failed = "no test is marked gpu" if nothing else f"pytest ended with {done.returncode}"
    yield table


@dataclass(frozen=True)
class RandomIds:
    """Stands where a tokenizer would: ids that mean nothing."""

    vocab_size: int
    kind: str = "random"


def random_tokens(vocab_size: int, length: int, seed: int) -> Dataset:
    """A dataset of random tokens, for speed alone."""
    tokens = np.random.default_rng(seed).integers(vocab_size, size=length, dtype=np.uint16)
    tokenizer = cast(Tokenizer, RandomIds(vocab_size))
    return Dataset(tokens, tokens[:0], tokenizer, "random tokens", "", "random", fallback=False, val_bytes=0)


def large(
    conditions: Conditions,
    sizes: dict[str, Shape] | None = None,
    critic: Shape = CRITIC,
    vocab_size: int = GPT2_VOCABULARY,
    compile: str = "auto",
) -> Iterator[Table]:
    """Steps at the sizes of the OpenWebText presets: AvataRL with a model critic against cross-entropy."""
    sizes = sizes or SIZES
    for name, shape in sizes.items():
        forget_compiled()
        dataset = random_tokens(vocab_size, 64 * shape.tokens, conditions.seed)
        arms = large_arms(shape, critic, dataset, conditions, compile)
        table = measure(f"Step of {name}: {shape}, vocabulary {vocab_size:,}", arms, conditions, share=1 / len(sizes))
        table.unit, table.work, table.reference = "tokens", shape.tokens, COMPILED
        table.facts = {"shape": vars(shape), "critic": vars(critic), "vocab_size": vocab_size}
        table.notes = [
            "random tokens, AdamW; AvataRL has its published settings",
            f"critic: {critic.layers} × {critic.width}, random weights; its FLOPs count in the share of the peak",
            "peak memory: weights, optimiser state, critic and one step",
            "first call, compilation included: "
            + ", ".join(f"{r.name} {r.first_seconds:.0f} s" for r in table.rows if r.first_seconds is not None),
        ]
        yield table
        del arms


def large_arms(shape: Shape, critic: Shape, dataset: Dataset, conditions: Conditions, compile: str) -> list[Arm]:
    """Four arms, each with its model; on a GPU they know what they hold."""
    hardware, precision = settle(conditions, compile=compile)
    device, vocab_size = conditions.device, dataset.tokenizer.vocab_size
    base = shape.config(conditions)
    ours = override(base, train={"objective": "avatarl"}, critic={"kind": "model"})

    def plain() -> Arm:
        fused = device.type == "cuda" or None
        loop = PlainLoop(base, dataset, device, dtype=hardware.dtype, compiled=hardware.compile, fused=fused)
        return Arm(COMPILED, loop.step, [], loop.flops, hardware.dtype, precision)

    def frozen() -> GPT:
        model = new_model(critic.model, vocab_size, conditions.seed + 1, hardware)
        return model.eval().requires_grad_(False)

    def entropy() -> Arm:
        return step_arm(ENTROPY, trainer(base, dataset, hardware, conditions), precision, COMPILED)

    def with_forward() -> Arm:
        made = trainer(base, dataset, hardware, conditions)
        arm = step_arm(WITH_FORWARD, made, precision, COMPILED)
        add_forward(arm, made, frozen())
        return arm

    def avatarl() -> Arm:
        made = trainer(ours, dataset, hardware, conditions, frozen=frozen())
        return step_arm("AvataRL, model critic", made, precision, COMPILED, WITH_FORWARD)

    return [weighed(make, device) for make in (plain, entropy, with_forward, avatarl)]


def weighed(make: Any, device: torch.device) -> Arm:
    """The arm that make() builds, with the bytes that it holds once it has made a step (GPU only)."""
    if device.type != "cuda":
        return make()
    before = torch.cuda.memory_allocated(device)
    arm: Arm = make()
    with contextlib.suppress(RuntimeError):  # `measure` says why it cannot run
        arm.run()  # optimiser state comes with the first step
        synchronise(device)
    arm.held = torch.cuda.memory_allocated(device) - before
    return arm


class OutOfTime(Exception):
    """The run was stopped because its share of the time is over."""


class StepClock(Recorder):
    """Notes when logged steps were done, and stops the run when `limit` seconds are over; changes nothing else."""

    def __init__(self, folder: Path, config: Config, device: torch.device, limit: float) -> None:
        super().__init__(folder, first=True, steps=config.train.steps, start=0)
        self.done, self.times = 0, dict[int, float]()
        self._config, self._device, self._limit, self._start = config, device, limit, time.perf_counter()

    def advance(self, **shown: str) -> None:
        super().advance(**shown)
        self.done += 1
        if self.done % self._config.log.every == 0 or self.done == self._config.train.steps:
            synchronise(self._device)
            self.times[self.done] = time.perf_counter() - self._start
            if self.times[self.done] > self._limit:
                raise OutOfTime


def char_config(conditions: Conditions) -> Config:
    """The preset avatarl-char-gpu without evaluations on the way, samples and checkpoints."""
    return override(
        preset("avatarl-char-gpu"),
        run={"seed": conditions.seed, "threads": conditions.threads},
        data={"corpus": "tinyshakespeare"},
        train={"checkpoint_every": 0},
        eval={"every": 0, "sample_tokens": 0, "ladder": 0},
    )


def char(conditions: Conditions, config: Config | None = None) -> Iterator[Table]:
    """The whole run of a preset in its own loop, timed from the first log line to the last step."""
    forget_compiled()
    config = config or char_config(conditions)
    dataset = read_text(config.data.corpus or "tinyshakespeare", "char", config.model.block_size)
    hardware, precision = settle(conditions)
    job = trainer(config, dataset, hardware, conditions).job
    clock = StepClock(conditions.scratch, config, conditions.device, conditions.seconds)
    job.recorder = clock
    steps, tokens = config.train.steps, job.tokens_per_step
    table = Table(f"A whole run: avatarl-char-gpu's settings, {steps:,} steps of {tokens:,} tokens")
    print(f"{table.title} …", flush=True)
    with clock:
        try:
            fit(job)
        except OutOfTime:
            table.failed = f"stopped at step {clock.done:,}, after {conditions.seconds:.0f} s"
    val_ce = job.state.val_ce if clock.done == steps else None
    table.facts = {"steps": steps, "seed": conditions.seed, "times": clock.times, "val_ce": val_ce}
    first, last = min(clock.times), max(clock.times)
    if first < last:
        per_step = (clock.times[last] - clock.times[first]) / (last - first)
        share = job.objective.flops_per_token() * tokens / per_step
        share /= peak_flops(conditions.device, hardware.dtype, precision)
        table.facts |= {"seconds": per_step * steps, "seconds_per_step": per_step, "utilisation": share}
        table.notes = [
            f"{per_step * steps:.1f} s for its {steps:,} steps: {1e3 * per_step:.2f} ms a step, measured from step "
            f"{first} to step {last:,}, batches, metrics and logging included; evaluations and compilation are not "
            f"(from the start to step {first}, with the first evaluation: {clock.times[first]:.1f} s)",
            f"{tokens / per_step:,.0f} tokens/s, {share:.1%} of the matmul peak",
        ]
    if val_ce is not None:
        table.notes.append(f"validation CE after it: {val_ce:.4f} nats, seed {conditions.seed}")
    yield table
