"""Whole training steps: this project's, through its own loop, and the plain loop that everyone knows, written out.

Both read the same batches of the same text into models with the same first weights, so that their losses can be
compared as well as their speed. What is timed is what a run does between two log lines: batch, rate, forward, loss,
backward, clipping, optimiser, whatever follows a step. Metrics are not measured in it.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avatarl.build import build_objective
from benchmarks.timing import Conditions
from config import Config, ConfigError, DataConfig, ModelConfig, override, preset
from data.batches import Batch, TrainingBatches, prefetch
from data.corpora import CorpusMissing
from data.critic_cache import CriticCache
from data.prepare import Dataset, check_length, prepare_real
from model import GPT
from train_core import Job, check_finite, is_every, learn
from training.distributed import World
from training.hardware import Hardware, prepare_model
from training.optim import build_optimizers, lr_share, set_lr
from training.record import Recorder


@dataclass(frozen=True)
class Shape:
    """A model and its batch: layers x width, heads, context T, sequences a step."""

    layers: int
    width: int
    heads: int
    block: int
    batch: int

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.block * self.batch

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(self.layers, self.heads, self.width, self.block, dropout=0.0, bias=False)

    def __str__(self) -> str:
        return f"{self.layers} × {self.width}, T {self.block}, batch {self.batch}"

    def config(self, conditions: Conditions, **groups: dict[str, Any]) -> Config:
        """Settings of a run of this shape: pretrain-char's cross-entropy with AdamW, and the changes `groups`."""
        base = override(
            preset("pretrain-char"),
            run={"seed": conditions.seed, "threads": conditions.threads},
            model=vars(self.model),
            train={"batch_size": self.batch},
        )
        return override(base, **groups)


def read_text(corpus: str, tokenizer: str, block: int) -> Dataset:
    """The tokens of a real text. Raises ConfigError where it can't be had: nothing stands in for it here."""
    try:
        dataset = prepare_real(DataConfig(corpus=corpus, tokenizer=tokenizer), "benchmarks")  # type: ignore[arg-type]
    except CorpusMissing as missing:
        found = str(missing).partition("; use")[0].partition("; connect")[0]
        raise ConfigError(
            f"{found}; benchmarks run on real text only: put it under data/{corpus}/ or $AVATARL_DATA/{corpus}/"
        ) from None
    check_length(dataset, block)
    return dataset


class Trainer:
    """train_core's loop, one whole step at a time."""

    def __init__(self, job: Job) -> None:
        self.job, self.micros = job, list[Batch]()
        self._batches = prefetch(job.batches, itertools.count(), job.slices, job.hardware.device)

    def step(self) -> Tensor:
        """One optimiser step as `train_core.fit` makes it; its loss. Raises RuntimeError where it was skipped."""
        job = self.job
        set_lr(job.optimizers, lr_share(job.state.step, job.config.train.steps, job.config.optim))
        self.micros = [next(self._batches) for _ in job.slices]
        loss, _, _ = learn(job, self.micros, measure=False)
        job.objective.after_step(job.state.step)
        if job.hardware.device.type == "cpu" or is_every(job.config.log.every, job.state.step):  # as `fit` looks
            check_finite(job)
        if job.state.bad_steps:
            raise RuntimeError(f"step {job.state.step}: a loss or gradient was not finite; the step was skipped")
        return loss

    @property
    def flops(self) -> float:
        """Matrix-product FLOPs of a step."""
        return self.job.objective.flops_per_token() * self.job.tokens_per_step


def new_model(config: ModelConfig, vocab_size: int, seed: int, hardware: Hardware) -> GPT:
    """A model with random weights, on its device and compiled where the hardware's choice says so."""
    torch.manual_seed(seed)
    return prepare_model(GPT(config, vocab_size), hardware)


def trainer(
    config: Config,
    dataset: Dataset,
    hardware: Hardware,
    conditions: Conditions,
    frozen: GPT | None = None,
    cache: CriticCache | None = None,
) -> Trainer:
    """A run of `config` that has not begun, judged by the model `frozen` or by a `cache` where it is to be."""
    student = new_model(config.model, dataset.tokenizer.vocab_size, config.run.seed, hardware)
    critics = [] if frozen is None else [frozen]
    objective = build_objective(student, config, dataset.train, critics, hardware.autocast, cache, dataset.strings)
    optimizers = build_optimizers(objective, config.optim, hardware.dtype)
    recorder = Recorder(conditions.scratch, first=False, steps=config.train.steps, start=0)
    return Trainer(
        Job(config, dataset, objective, optimizers, hardware, World(), conditions.scratch, recorder, cache=cache)
    )


class PlainLoop:
    """nanoGPT's loop: AdamW, autocast, clipping, and cross-entropy inside what is compiled, if anything is.

    Its defaults are eager float32 and PyTorch's default AdamW; `compiled` and `fused` make it what nanoGPT is on a GPU.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
        fused: bool | None = None,
    ) -> None:
        torch.manual_seed(config.run.seed)
        self.config, self.device, self.dtype, self.steps = config, device, dtype, 0
        self.model = GPT(config.model, dataset.tokenizer.vocab_size).to(device)
        self.forward = torch.compile(self.loss) if compiled else self.loss
        o, parameters = config.optim, list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": o.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), fused=fused)
        train = config.train
        batches = TrainingBatches(dataset.train, config.model.block_size, train.batch_size, config.run.seed)
        self._batches = prefetch(batches, itertools.count(), [(0, train.batch_size)], device)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of a batch (B, T), over a padded vocabulary, as nanoGPT has it for speed."""
        logits = self.model.hidden(tokens) @ self.model.wte.weight.T  # (B, T, V rounded up)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def step(self) -> Tensor:
        """One optimiser step; returns the loss."""
        config, batch = self.config, next(self._batches)
        share = lr_share(self.steps, config.train.steps, config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = share * config.optim.lr
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss = self.forward(batch.tokens, batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return loss.detach()

    @property
    def flops(self) -> float:
        """Matrix-product FLOPs of a step."""
        tokens = self.config.train.batch_size * self.config.model.block_size
        return 3 * self.model.flops_per_token() * tokens


def critic_forward(model: GPT, hardware: Hardware, micros: list[Batch]) -> None:
    """What asking a model costs at the least: its logits for a step's tokens."""
    with torch.inference_mode(), hardware.autocast():
        for micro in micros:
            model(micro.tokens)
