"""The one training loop: whatever the objective, on one process or many.

`fit` runs a job from its state to its last step: set the rate, learn from a batch, log, evaluate, save. It
knows no objective by name (see Objective), writes only into the run's folder, and leaves it such that
`train.py --resume` continues bit for bit.
"""

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from config import Config
from data.batches import Batch, TrainingBatches, prefetch, validation_windows
from data.critic_cache import CriticCache
from data.prepare import Dataset
from generation import generate
from model import GPT
from training import checkpoint as checkpoints
from training.checkpoint import TrainState
from training.distributed import World, all_sum, ask_all
from training.evaluation import evaluate
from training.finite import BadSteps, share_of, step_where
from training.hardware import Hardware, matmul_peak, peak_memory_gb, synchronise
from training.micro_batches import rows_of
from training.optim import clip_gradients, lr_share, set_lr
from training.parallel import backward_of, gathered, is_sharded, wrapped
from training.record import Recorder
from training.run_folder import append_sample
from training.signals import StopRequest, stop_on_signals


class Objective(Protocol):
    """What a step minimises: an nn.Module that holds the student and returns the loss from its forward."""

    student: GPT
    inner_epochs: int
    """Optimiser updates on each batch."""

    def __call__(
        self, batch: Batch, step: int, rollout: dict[str, Any], measure: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over a micro-batch, and metrics (0-d tensors) when `measure`d.

        `rollout` is empty at the first inner epoch and handed on to the later ones.
        """

    def after_step(self, step: int) -> None:
        """Called when `step` optimiser steps are done."""

    def flops_per_token(self) -> float:
        """Matrix-product FLOPs that a training step spends on one token."""


class Seen(Protocol):
    """What a monitor makes of a line of metrics."""

    @property
    def metrics(self) -> dict[str, float]:
        """Added to the line."""

    @property
    def warnings(self) -> list[str]:
        """Printed above the bar, each with its step."""

    @property
    def shown(self) -> str:
        """Its state in a word or two, for the bar."""


class Monitor(Protocol):
    """Watches what a run measures; an objective that has one keeps it as `monitor`, in its own state dict."""

    def observe(self, line: Mapping[str, float]) -> Seen:
        """Take in a finished line of metrics, the same on every process."""


class Companion(Protocol):
    """Something that works on the student between optimiser steps, and travels in its checkpoints."""

    def after_step(self, job: "Job") -> None:
        """Called after every optimiser step; its time counts as training."""

    def save(self, folder: Path) -> None:
        """Write what it needs to continue into a folder of the checkpoint that is being written."""


class RunFailed(RuntimeError):
    """Training cannot go on. The message names the step and the last good checkpoint."""


@dataclass
class Job:
    """Everything a run consists of, built by whoever launches it."""

    config: Config
    dataset: Dataset
    objective: Any
    optimizers: list[Optimizer]
    hardware: Hardware
    world: World
    folder: Path
    recorder: Recorder
    state: TrainState = field(default_factory=TrainState)
    cache: CriticCache | None = None
    """What a cached critic thinks of the training windows."""
    companion: Companion | None = None
    """What works on the student between the steps."""
    until: int | None = None
    """Stop after this step; schedules still run to train.steps. None: train.steps."""

    def __post_init__(self) -> None:
        self.module = wrapped(self.objective, self.world, self.hardware.device)
        self.bad_steps = BadSteps(self.hardware.device, self.state.bad_in_a_row, self.state.bad_steps)
        train = self.config.train
        self.batches = TrainingBatches(
            self.dataset.train, self.config.row_length, train.batch_size, self.config.run.seed, cache=self.cache
        )
        self.slices = rows_of(train, self.world.rank, self.world.size)
        self.tokens_per_step = train.batch_size * self.config.row_length


def fit(job: Job) -> int:
    """Train to the last step; returns an exit code: 0, or 128 + the signal that stopped the run.

    Raises RunFailed after `train.max_bad_steps` steps in a row that were not finite.
    """
    config, state = job.config, job.state
    steps = config.train.steps if job.until is None else job.until
    further, meter = config.eval.further_steps, Meter(job)
    batches = prefetch(job.batches, range(state.step, steps), job.slices, job.hardware.device)
    with stop_on_signals() as stop, contextlib.closing(batches):
        if state.step == 0:
            measure_validation(job)
        while state.step < steps:
            share = lr_share(state.step, config.train.steps, config.optim)
            set_lr(job.optimizers, share)
            due = is_every(config.log.every, state.step + 1) or state.step + 1 == steps
            last = state.step + 1 == steps
            evaluating = last or is_every(config.eval.every, state.step + 1) or state.step + 1 in further
            saving = last or is_every(config.train.checkpoint_every, state.step + 1)
            waiting = due or evaluating or saving
            stopped = ask_all(lambda: stop.signal is not None)
            with meter.running():
                micros = [next(batches) for _ in job.slices]
                loss, norm, metrics = learn(job, micros, measure=due)
                job.objective.after_step(state.step)
                if job.companion is not None:
                    job.companion.after_step(job)
                if waiting:  # so that the time of queued kernels counts as training
                    synchronise(job.hardware.device)
            if waiting or job.hardware.device.type == "cpu":
                check_finite(job)
            meter.after_step(loss, norm, metrics, share, due)
            if evaluating:
                measure_validation(job)
            stopping = stopped()
            if stopping or saving:
                check_finite(job)
                save(job)
            if stopping and (not last or job.until is not None):
                return stop_code(stop)
    return 0


def is_every(every: int, step: int) -> bool:
    """Whether what happens each `every` steps (0: never) is due at `step`."""
    return every > 0 and step % every == 0


def stop_code(stop: StopRequest) -> int:
    """The exit code of a stopped run, also where only another process got the signal."""
    return stop.exit_code or 143


def learn(job: Job, micros: list[Batch], measure: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """One step on this process's micro-batches: mean loss, gradient norm before clipping, metrics.

    A loss or gradient that is not finite on any process is skipped by all of them. On a GPU nothing here waits
    for it: the outcome stays on the device.
    """
    state, config = job.state, job.config
    checkpoints.seed_everything(config.run.seed, state.step, job.world.rank, job.hardware.device)
    rollouts: list[dict[str, Any]] = [{} for _ in micros]
    mean_loss, norm, found = torch.zeros(()), torch.zeros(()), list[dict[str, Tensor]]()
    for epoch in range(job.objective.inner_epochs):
        losses = []
        for i, (micro, rollout) in enumerate(zip(micros, rollouts, strict=True)):
            last = i == len(micros) - 1
            with backward_of(job.module, last):
                with job.hardware.autocast():
                    loss, metrics = job.module(micro, state.step, rollout, measure and epoch == 0)
                share_of(loss, len(micros)).backward()
            losses.append(loss.detach())
            if epoch == 0:
                found.append(metrics)
        mean_loss = torch.stack(losses).mean()
        norm = clip_gradients(job.module, config.optim.grad_clip)
        finite = torch.isfinite(norm)
        step_where(finite, job.optimizers)
        job.bad_steps.count(finite)
        job.module.zero_grad(set_to_none=True)
    state.step += 1
    keys = found[0]
    return mean_loss, norm, {k: torch.stack([m[k] for m in found]).mean() for k in keys}


def check_finite(job: Job) -> None:
    """Report steps that were skipped since the last look; give up after too many in a row."""
    state = job.state
    before = state.bad_steps
    state.bad_in_a_row, longest, state.bad_steps = job.bad_steps.read()
    if state.bad_steps == before:
        return
    count = state.bad_steps - before
    job.recorder.warn(
        f"step {state.step}: loss or gradient is not finite; {count} step{'s' * (count > 1)} skipped "
        f"({longest} in a row)"
    )
    if longest >= job.config.train.max_bad_steps:
        good = checkpoints.stored(job.folder / "checkpoints")
        where = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
        raise RunFailed(
            f"step {state.step}: loss or gradient not finite for {longest} steps in a row; {where}. "
            "Lower the learning rate or warm up longer."
        )


def measure_validation(job: Job) -> None:
    """Evaluate on the whole validation split, write the numbers and a sample."""
    config, state, world = job.config, job.state, job.world
    windows = validation_windows(
        job.dataset.val, config.model.block_size, config.eval.batch_size, world.rank, world.size
    )
    student = job.objective.student
    tally = gathered(job.objective, evaluate, student, windows, job.hardware, bins=config.eval.ece_bins)
    metrics = tally.metrics(job.dataset.val_bytes)
    state.val_ce, state.val_step = metrics["val/ce"], state.step
    job.recorder.write(
        {
            "step": state.step,
            "tokens": state.step * job.tokens_per_step,
            "seconds": state.seconds,
            **metrics,
        }
    )
    job.recorder.say(
        f"step {state.step:>6}  val CE {metrics['val/ce']:.4f}  ppl {metrics['val/ppl']:.2f}  "
        f"bpb {metrics['val/bpb']:.3f}  accuracy {metrics['val/accuracy']:.1%}  ECE {metrics['val/ece']:.3f}"
    )
    if config.eval.sample_tokens and (world.first or is_sharded(job.objective)):
        write_sample(job)


def write_sample(job: Job) -> None:
    """Append a sample of the student's text to samples.txt, drawn with the run's own seed.

    Of a sharded student all processes draw it, to full length: whose rounding differs must not stop before others.
    """
    config, dataset = job.config, job.dataset
    prompt = [int(i) for i in dataset.tokenizer.encode(config.eval.prompt)]
    end = dataset.tokenizer.end_of_text
    (tokens,) = gathered(
        job.objective,
        generate,
        job.objective.student,
        [prompt],
        config.eval.sample_tokens,
        temperature=0.8,
        seed=config.run.seed,
        end_of_text=None if is_sharded(job.objective) else end,
    )
    tokens = tokens[: tokens.index(end)] if end in tokens else tokens
    if job.world.first:
        append_sample(job.folder / "samples.txt", job.state.step, dataset.tokenizer.decode(tokens))


def save(job: Job) -> None:
    """Write a checkpoint of the present step."""
    folder, keep = job.folder / "checkpoints", job.config.train.keep
    beside = None if job.companion is None else job.companion.save
    checkpoints.save(folder, job.objective, job.optimizers, job.state, job.world, keep=keep, beside=beside)


class Meter:
    """Times the steps, and writes what they measured when it is due."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._peak = matmul_peak(job.hardware.device, job.hardware.dtype) * job.world.size
        self._since, self._steps = 0.0, 0

    @contextlib.contextmanager
    def running(self):  # type: ignore[no-untyped-def]
        """Counts the block as training time."""
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        self._job.state.seconds += elapsed
        self._since += elapsed
        self._steps += 1

    def after_step(self, loss: Tensor, norm: Tensor, metrics: dict[str, Tensor], share: float, due: bool) -> None:
        """Move the bar; when `due`, reduce the step's metrics over processes and write them."""
        job = self._job
        if not due:
            job.recorder.advance()
            return
        names = ["train/loss", *metrics]
        values = torch.stack([loss.float(), *(m.float() for m in metrics.values())]).cpu()
        line = dict(zip(names, (all_sum(values) / job.world.size).tolist(), strict=True))
        rate = self._steps * job.tokens_per_step / self._since
        line |= {
            "train/grad_norm": float(norm),
            "train/tokens_per_second": rate,
            "train/utilisation": rate * job.objective.flops_per_token() / self._peak,
            "train/peak_memory_gb": peak_memory_gb(job.hardware.device),
        }
        if hasattr(job.objective, "rates"):  # what an objective counts besides tokens
            line |= job.objective.rates(rate)
        monitor: Monitor | None = getattr(job.objective, "monitor", None)
        seen = None if monitor is None else monitor.observe(line)
        if seen is not None:
            line |= seen.metrics
        state = job.state
        head = {
            "step": state.step,
            "tokens": state.step * job.tokens_per_step,
            "seconds": state.seconds,
            "lr": share * job.config.optim.lr,
        }
        job.recorder.write(head | line)
        shown = {"loss": f"{line['train/loss']:.3f}", "tok/s": f"{rate:,.0f}"}
        if seen is not None:
            shown["health"] = seen.shown
            for warning in seen.warnings:
                job.recorder.warn(f"step {state.step}: {warning}")
        if "train/reward" in line:
            shown["reward"] = f"{line['train/reward']:.3f}"
        if state.val_ce is not None and math.isfinite(state.val_ce):
            shown["val CE"] = f"{state.val_ce:.3f}"
        job.recorder.advance(**shown)
        self._since, self._steps = 0.0, 0
