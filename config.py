"""Every knob of AvataRL: its default, its unit, its check; the presets stand in presets.py.

    python train.py --help                      # all of this, as flags
    python train.py PRESET --optim.lr 3e-3      # a field of a group is --group.field

The dataclass defaults are the published settings of the method (DESIGN's section 3) on a GPT-2-shaped model. What
measures best at a given size is a preset. Values are checked when the config is built, and the error names the field,
the value and the way out. The group `model` is in config_model.py, `critic` and `method` in config_method.py,
`bootstrap` in config_bootstrap.py.
"""

import dataclasses
import difflib
import re
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from checks import ConfigError, check_fields, require
from config_bootstrap import BootstrapConfig
from config_method import CriticConfig, MethodConfig, check_judging
from config_model import ModelConfig
from presets import PRESETS as PRESETS_OF_THE_METHOD
from presets_bootstrap import PRESETS_BOOTSTRAP

PRESETS = PRESETS_OF_THE_METHOD | PRESETS_BOOTSTRAP


@dataclass(frozen=True)
class RunConfig:
    """Where and how a run happens."""

    name: str = ""
    """Folder name under out-dir; empty: the preset's name. An existing name gets -2, -3, … appended."""
    seed: int = 1337
    """Seed of weights, data order, dropout and student contexts."""
    out_dir: str = "runs"
    """Folder that holds the runs."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. auto takes a GPU when there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products (weights stay float32). auto: bfloat16 where the hardware multiplies it fast."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile. auto: on a GPU; on a CPU eager, where compiling costs more than a short run gains."""
    threads: int = 0
    """CPU threads of PyTorch; 0: one for every core this process may use, divided among local processes."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Many processes. ddp: each holds the whole model; fsdp: each a share, for models past one GPU's memory."""

    def __post_init__(self) -> None:
        check_fields("run", self)
        require(
            self.name == "" or (self.name.strip(". ") == self.name and not set(self.name) & set("/\\:")),
            "run.name",
            self.name,
            "use a plain folder name, without / \\ : and without dots or spaces at its ends",
        )
        require(self.threads >= 0, "run.threads", self.threads, "use 0 (all cores) or a positive number")
        require(0 <= self.seed < 2**32, "run.seed", self.seed, f"use a number from 0 to {2**32 - 1}")
        known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None
        require(known, "run.device", self.device, "use auto, cpu, cuda or cuda:N")


@dataclass(frozen=True)
class DataConfig:
    """What is read, and as which tokens."""

    corpus: str | None = None
    """tinyshakespeare, pydoc, a UTF-8 file or a folder of .txt. Unset: tinyshakespeare, else pydoc with a warning."""
    val_corpus: str | None = None
    """Validate on all of this corpus instead of on the last tenth of `corpus`."""
    val_fraction: float = 0.1
    """Share of the corpus, at its end, that is held out for validation."""
    train_start: float = 0.0
    """Train from this fraction of the training split on (critics for cross-fitting, small-data studies)."""
    train_stop: float = 1.0
    """Train up to this fraction of the training split."""
    tokenizer: Literal["char", "bpe", "gpt2"] = "char"
    """char: the corpus's own characters; bpe: byte-level BPE trained on the training split; gpt2: OpenAI's."""
    bpe_vocab: int = 1024
    """Vocabulary size of `bpe`, at least 257 (256 bytes and <|endoftext|>)."""

    def __post_init__(self) -> None:
        check_fields("data", self)
        require(
            0 < self.val_fraction < 1,
            "data.val-fraction",
            self.val_fraction,
            "use a share between 0 and 1, such as 0.1",
        )
        require(
            0 <= self.train_start < self.train_stop <= 1,
            "data.train-start, data.train-stop",
            (self.train_start, self.train_stop),
            "they must satisfy 0 <= start < stop <= 1",
        )
        require(
            257 <= self.bpe_vocab <= 65536,
            "data.bpe-vocab",
            self.bpe_vocab,
            "use 257 to 65536 (tokens are stored in 16 bits)",
        )


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw for everything, or muon for the blocks' matrices and adamw for the rest."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon."""
    beta1: float = 0.9
    """AdamW's decay of the gradient average."""
    beta2: float = 0.95
    """AdamW's decay of the squared-gradient average."""
    weight_decay: float = 0.1
    """Decoupled decay of AdamW's matrices (with muon: of none)."""
    muon_momentum: float = 0.95
    """Muon's Nesterov momentum."""
    muon_weight_decay: float = 0.01
    """Decoupled decay of Muon's matrices."""
    warmup_steps: int = 100
    """Optimiser steps of linear warm-up."""
    min_lr_ratio: float = 0.1
    """Share of the peak rate that the cosine ends at."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""

    def __post_init__(self) -> None:
        check_fields("optim", self)
        for name in ("lr", "muon_lr"):
            value = getattr(self, name)
            require(value > 0, f"optim.{name.replace('_', '-')}", value, "use a positive rate")
        for name in ("beta1", "beta2", "muon_momentum"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name.replace('_', '-')}", value, "use a value in [0, 1)")
        for name in ("weight_decay", "muon_weight_decay", "warmup_steps", "grad_clip"):
            value = getattr(self, name)
            require(value >= 0, f"optim.{name.replace('_', '-')}", value, "must not be negative")
        require(0 <= self.min_lr_ratio <= 1, "optim.min-lr-ratio", self.min_lr_ratio, "use a share from 0 to 1")


@dataclass(frozen=True)
class TrainConfig:
    """Length and batches of a run."""

    objective: Literal["avatarl", "cross-entropy", "bootstrap"] = "avatarl"
    """What is minimised: AvataRL, cross-entropy (for critics and baselines), or the bootstrapping experiments' loss."""
    label_smoothing: float = 0.0
    """cross-entropy: share of the target that is spread over the whole vocabulary, in [0, 1)."""
    steps: int = 2000
    """Optimiser steps."""
    batch_size: int = 12
    """Sequences per optimiser step, over all processes and accumulated micro-batches."""
    grad_accum: int = 1
    """Micro-batches that one process cuts a step into; more share them, none larger. Changes memory, not results."""
    max_bad_steps: int = 20
    """Stop after this many steps in a row with a loss or gradient that is not finite."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0: only at the end or when interrupted."""
    keep: int = 2
    """How many of the newest checkpoints stay, besides the best by validation loss."""

    def __post_init__(self) -> None:
        check_fields("train", self)
        for name in ("steps", "batch_size", "grad_accum", "max_bad_steps", "keep"):
            value = getattr(self, name)
            require(value >= 1, f"train.{name.replace('_', '-')}", value, "use a positive number")
        require(self.checkpoint_every >= 0, "train.checkpoint-every", self.checkpoint_every, "use 0 or more steps")
        require(0 <= self.label_smoothing < 1, "train.label-smoothing", self.label_smoothing, "use a share in [0, 1)")
        require(
            self.label_smoothing == 0 or self.objective == "cross-entropy",
            "train.label-smoothing",
            self.label_smoothing,
            "rewards have no labels to smooth; add --train.objective cross-entropy",
        )
        require(
            self.batch_size % self.grad_accum == 0,
            "train.grad-accum",
            self.grad_accum,
            f"must divide train.batch-size = {self.batch_size}",
        )


@dataclass(frozen=True)
class EvalConfig:
    """What is measured on the validation split, and how often."""

    every: int = 500
    """Steps between evaluations; 0: only at the first and the last step."""
    also_at: str = ""
    """Further steps at which to evaluate, as 25,50,100: a close look at the start of a run."""
    batch_size: int = 64
    """Windows per forward pass of an evaluation."""
    ece_bins: int = 15
    """Equal-width confidence bins of the calibration error."""
    ladder: int = 6
    """Longest context, in tokens, of the n-gram ladder; 0: no ladder."""
    prompt: str = "\n"
    """What the samples of a run continue."""
    sample_tokens: int = 300
    """Length of each sample; 0: no samples."""

    def __post_init__(self) -> None:
        for name in ("every", "ladder", "sample_tokens"):
            value = getattr(self, name)
            require(value >= 0, f"eval.{name.replace('_', '-')}", value, "must not be negative")
        for name in ("batch_size", "ece_bins"):
            value = getattr(self, name)
            require(value >= 1, f"eval.{name.replace('_', '-')}", value, "use a positive number")
        require(self.prompt != "", "eval.prompt", self.prompt, "a sample needs at least one character to continue")
        self.further_steps  # noqa: B018  # checked by looking at them

    @property
    def further_steps(self) -> frozenset[int]:
        """The steps of `also_at`."""
        words = [part.strip() for part in self.also_at.split(",") if part.strip()]
        fix = "write whole steps from 1 on, as 25,50,100"
        require(all(word.isdecimal() and int(word) >= 1 for word in words), "eval.also-at", self.also_at, fix)
        return frozenset(int(word) for word in words)


@dataclass(frozen=True)
class LogConfig:
    """Where numbers go besides metrics.jsonl, which is always written."""

    every: int = 25
    """Steps between lines of metrics.jsonl."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases. offline and disabled need no account."""
    wandb_project: str = "avatarl"
    """Project name in Weights & Biases."""

    def __post_init__(self) -> None:
        check_fields("log", self)
        require(self.every >= 1, "log.every", self.every, "use a positive number of steps")


@dataclass(frozen=True)
class Config:
    """Everything that defines a run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        require(
            self.optim.warmup_steps <= self.train.steps,
            "optim.warmup-steps",
            self.optim.warmup_steps,
            f"the warm-up outlasts the run; use at most train.steps = {self.train.steps}",
        )
        require(
            not self.critic.cache or self.method.context == "gold",
            "critic.cache",
            self.critic.cache,
            "a cache judges the corpus's own tokens, not those of --method.context student; leave one of them out",
        )
        if self.train.objective == "avatarl":
            check_judging(self.critic, self.method)
            fix = "use 0 with --method.inner-epochs above 1, where π over π_old would compare two dropout masks"
            require(self.model.dropout == 0 or self.method.inner_epochs == 1, "model.dropout", self.model.dropout, fix)
        if self.train.objective == "bootstrap":
            self.bootstrap.check_model(self.model.block_size, self.model.dropout)
            fix = "a bootstrapping run is small, and every process holds it whole; use ddp"
            require(self.run.parallel != "fsdp", "run.parallel", self.run.parallel, fix)
        top, k = self.critic.cache_top, self.method.top_k
        require(top == 0 or top >= k, "critic.cache-top", top, f"the critic proposes method.top-k = {k}; keep as many")

    @property
    def row_length(self) -> int:
        """Tokens of a training row: the model's context, unless windows slide over longer rows."""
        block_size = self.model.block_size
        return self.bootstrap.row_length(block_size) if self.train.objective == "bootstrap" else block_size

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain nested dicts, for config.json."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(groups: dict[str, dict[str, Any]]) -> "Config":
        """Inverse of `to_dict`. Raises ConfigError for a group or field that this version lacks."""
        hints = typing.get_type_hints(Config)
        built = {}
        for name, values in groups.items():
            require(name in hints, name, "…", "no such group of settings in this version")
            known = {f.name for f in dataclasses.fields(hints[name])}
            unknown = sorted(set(values) - known)
            require(not unknown, f"{name}.{', '.join(unknown)}", "…", "no such setting in this version")
            built[name] = hints[name](**values)
        return Config(**built)


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Fields in which two configs differ: {"group.field": (value in a, value in b)}."""
    left, right = a.to_dict(), b.to_dict()
    return {
        f"{group}.{name}": (value, right[group][name])
        for group, values in left.items()
        for name, value in values.items()
        if value != right[group][name]
    }


def override(config: Config, **groups: dict[str, Any]) -> Config:
    """A copy with some fields replaced: override(c, model={"n_layer": 4}, train={"steps": 100})."""
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in groups.items()}
    return dataclasses.replace(config, **changed)


def preset(name: str) -> Config:
    """The Config of a preset. Raises ConfigError for an unknown name, with the nearest known one."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"unknown preset {name!r}: {hint}There are {', '.join(PRESETS)}")
    _, base, groups = PRESETS[name]
    return override(preset(base) if base else Config(), **groups)


def critic_preset(config: Config) -> str:
    """The preset that pretrains the model critic of `config`: the one it names, or the one for its tokens."""
    return config.critic.preset or ("pretrain-30m" if config.data.tokenizer == "gpt2" else "pretrain-char")
