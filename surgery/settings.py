"""Every knob of `python hybrid.py` that train.py does not have: phases, surgery, acceptance, the agent.

    python hybrid.py --help                          # all of this, as flags
    python hybrid.py --phases.grpo-steps 2000 --surgeon td3

Values are checked when the settings are built, and the error names the field, the value and the way out. Source:
DESIGN section 9.
"""

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from checks import ConfigError, check_fields, require
from config import Config, DataConfig, override, preset

AGENTS = ("sac", "td3", "ddpg", "ppo", "a2c")
"""Agents of stable-baselines3 that take continuous actions."""
ArmName = Literal["surgeon", "none", "random"]


@dataclass(frozen=True)
class PhaseConfig:
    """How long the three phases are."""

    grpo_steps: int = 1800
    """Phase 1, the student alone: at most this many optimiser steps."""
    plateau_window: int = 4
    """Phase 1 ends early once the mean validation cross-entropy of this many evaluations in a row …"""
    plateau_tolerance: float = 0.01
    """… is less than this below that of as many before them, in nats."""
    surgeon_rounds: int = 80
    """Phase 2, the surgeon alone on the frozen student: rounds of `surgery.candidates` evaluations."""
    both_steps: int = 600
    """Phase 3, both: optimiser steps of the student."""

    def __post_init__(self) -> None:
        check_fields("phases", self)
        for name in ("grpo_steps", "plateau_window", "both_steps"):
            positive("phases", self, name)
        require(self.surgeon_rounds >= 0, "phases.surgeon-rounds", self.surgeon_rounds, "use 0 or more rounds")
        require(self.plateau_tolerance >= 0, "phases.plateau-tolerance", self.plateau_tolerance, "use 0 or more nats")


@dataclass(frozen=True)
class SurgeryConfig:
    """What an operation is, and what text is worth."""

    layers: tuple[int, ...] = ()
    """Blocks that are operated on, numbered from 0. Empty: the last two."""
    rank: int = 8
    """r: how many of the largest singular values of a layer are scaled; the action has layers x rank numbers."""
    candidates: int = 16
    """M: actions that are evaluated together, in one batch."""
    prompts: int = 8
    """Pieces of training text that every candidate continues."""
    prompt_tokens: int = 16
    """Tokens of each."""
    new_tokens: int = 48
    """text: tokens that every candidate writes after each prompt."""
    temperature: float = 0.8
    """text: sampling temperature, above 0."""
    reward: Literal["text", "one_token"] = "text"
    """text: likelihood, diversity and repetition of what is written; one_token: log π of each prompt's next token."""
    diversity_weight: float = 0.5
    """text: nats per character that a wholly varied text (every pair of tokens once) is worth."""
    repetition_weight: float = 0.5
    """text: nats per character that a text costs in which every four tokens were there before."""
    judge: Literal["ngram", "mixed", "model"] = "ngram"
    """Whose likelihood counts: statistics of the training text (`critic.…` says of which length), or a model."""
    judge_run: str = ""
    """model: the run folder whose newest checkpoint judges. It must have read neither validation nor held-out text:
    train it with the student's data.val-fraction, and data.train-stop = 1 − accept.held-out."""

    def __post_init__(self) -> None:
        check_fields("surgery", self)
        for name in ("rank", "candidates", "prompts", "prompt_tokens", "new_tokens"):
            positive("surgery", self, name)
        require(self.temperature > 0, "surgery.temperature", self.temperature, "use a temperature above 0")
        for name in ("diversity_weight", "repetition_weight"):
            require(getattr(self, name) >= 0, flag("surgery", name), getattr(self, name), "use 0 or more")
        require(len(set(self.layers)) == len(self.layers), "surgery.layers", self.layers, "name every layer once")
        require(
            (self.judge == "model") == bool(self.judge_run),
            "surgery.judge-run",
            self.judge_run,
            "a model that judges needs --surgery.judge-run FOLDER, and only it takes one",
        )

    def operated(self, layer_count: int) -> tuple[int, ...]:
        """The blocks that are operated on in a model of `layer_count`. Raises ConfigError for one it lacks."""
        layers = self.layers or tuple(range(max(0, layer_count - 2), layer_count))
        for layer in layers:
            fix = f"the model has blocks 0 to {layer_count - 1}"
            require(0 <= layer < layer_count, "surgery.layers", layer, fix)
        return layers


@dataclass(frozen=True)
class AcceptConfig:
    """When an operation is committed to the weights in phase 3."""

    every: int = 15
    """Optimiser steps between operations."""
    held_out: float = 0.05
    """Share of the training text, at its end, that neither student, critic nor judge sees: what decides."""
    windows: int = 128
    """Windows of it, drawn anew for each decision."""
    z: float = 2.0
    """An edit is committed when its mean gain over the windows exceeds this many standard errors."""

    def __post_init__(self) -> None:
        check_fields("accept", self)
        positive("accept", self, "every")
        require(self.windows >= 2, "accept.windows", self.windows, "a standard error needs 2 or more")
        require(0 < self.held_out < 0.5, "accept.held-out", self.held_out, "use a share such as 0.05")
        require(self.z >= 0, "accept.z", self.z, "use 0 or more standard errors, such as 2")


@dataclass(frozen=True)
class AgentConfig:
    """The surgeon's learning, by stable-baselines3."""

    learning_rate: float = 1e-3
    """Adam's rate for all of its networks."""
    width: int = 64
    """Width of the two hidden layers of each."""
    gradient_steps: int = 16
    """sac, td3, ddpg: gradient steps after each round."""
    batch_size: int = 128
    """Evaluations per gradient step."""
    buffer_size: int = 4096
    """sac, td3, ddpg: evaluations that the replay buffer holds."""
    learning_starts: int = 64
    """sac, td3, ddpg: evaluations of uniformly random actions before learning."""
    reward_scale: float = 20.0
    """Factor on the rewards that the agent sees: they are hundredths of a nat, and its entropy term is of order 1."""
    entropy: str = "auto_0.1"
    """sac: auto (tuned, from 1), auto_0.1 (tuned, from 0.1) or a fixed weight."""
    noise: float = 0.2
    """td3, ddpg: standard deviation of the exploration noise, the action's range being −1 to 1."""

    def __post_init__(self) -> None:
        check_fields("agent", self)
        for name in ("width", "gradient_steps", "batch_size", "buffer_size"):
            positive("agent", self, name)
        for name in ("learning_rate", "reward_scale", "noise"):
            require(getattr(self, name) > 0, flag("agent", name), getattr(self, name), "use a positive number")
        require(self.learning_starts >= 0, "agent.learning-starts", self.learning_starts, "use 0 or more")
        number = self.entropy.removeprefix("auto_")
        fix = "use auto, auto_0.1 (its first value) or a number"
        require(self.entropy == "auto" or is_positive(number), "agent.entropy", self.entropy, fix)


@dataclass(frozen=True)
class HybridConfig:
    """The three phases, who operates in them, and what they are compared with."""

    phases: PhaseConfig = field(default_factory=PhaseConfig)
    surgery: SurgeryConfig = field(default_factory=SurgeryConfig)
    accept: AcceptConfig = field(default_factory=AcceptConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    surgeon: str = "sac"
    """The agent of stable-baselines3 that operates: sac, td3, ddpg, ppo or a2c."""
    arms: tuple[ArmName, ...] = ("surgeon", "none", "random")
    """What phase 3 is run with: the surgeon, nobody, and random edits under the same rule of acceptance."""
    same_time: bool = True
    """Besides the same tokens, give the arm without a surgeon the wall time that the surgeon's took."""

    def __post_init__(self) -> None:
        near = difflib.get_close_matches(self.surgeon, AGENTS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        fix = f"{hint}Use {', '.join(AGENTS)}: the agents of stable-baselines3 with continuous actions"
        require(self.surgeon in AGENTS, "surgeon", self.surgeon, fix)
        require(len(self.arms) > 0, "arms", self.arms, "name at least one of surgeon, none and random")
        require(len(set(self.arms)) == len(self.arms), "arms", self.arms, "name every arm once")
        for arm in self.arms:
            require(arm in typing.get_args(ArmName), "arms", arm, "use surgeon, none and random")
        fix = "ppo learns from the differences of at least 2 candidates"
        count = self.surgery.candidates
        require(self.surgeon != "ppo" or count > 1, "surgery.candidates", count, fix)
        fix = "add none: what a surgeon does means nothing without the same run that has none"
        require("none" in self.arms, "arms", self.arms, fix)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, for config.json."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "HybridConfig":
        """Inverse of `to_dict`. Raises ConfigError for what this version does not know."""
        hints = typing.get_type_hints(HybridConfig)

        def built(name: str, value: Any) -> Any:
            if isinstance(value, dict):
                return hints[name](**{k: built(k, v) for k, v in value.items()})
            return tuple(value) if isinstance(value, list) else value

        try:
            return HybridConfig(**{name: built(name, value) for name, value in values.items()})
        except (TypeError, KeyError) as error:
            raise ConfigError(f"the settings of the surgery are not this version's ({error})") from None


def positive(group: str, settings: object, name: str) -> None:
    """Require a field to be 1 or more."""
    require(getattr(settings, name) >= 1, flag(group, name), getattr(settings, name), "use a positive number")


def flag(group: str, name: str) -> str:
    return f"{group}.{name.replace('_', '-')}"


def is_positive(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


def student_config(name: str) -> Config:
    """The student's settings: those of preset `name`, or for "" a small character model under GRPO.

    The small one's rate stays constant, so that phase 1 stagnates because it has learnt what it can, not because a
    schedule ends; its entropy bonus keeps the exact policy gradient from collapsing onto one character.
    """
    if name:
        return preset(name)
    return override(
        preset("protocol-avatarl"),
        model={"n_layer": 3, "n_head": 3, "n_embd": 96},
        critic={"kind": "ngram"},
        method={
            "advantage": "group",
            "policy_weighting": "expected",
            "entropy_coef": 1.0,
            "reality_weight_schedule": "",
            "critic_weight_schedule": "",
            "reality_weight": 0.3,
            "critic_weight": 0.7,
        },
        optim={"name": "adamw", "lr": 3e-3, "min_lr_ratio": 1.0},
        eval={"every": 150},
        train={"checkpoint_every": 150},
    )


def shared_config(config: Config, hybrid: HybridConfig) -> Config:
    """The student's settings with what the hybrid run decides: its length, and the text that is held out."""
    data = config.data
    stop = data.train_start + (data.train_stop - data.train_start) * (1 - hybrid.accept.held_out)
    steps = hybrid.phases.grpo_steps + hybrid.phases.both_steps
    return override(config, train={"steps": steps}, data={"train_stop": stop})


def held_out_data(config: Config, hybrid: HybridConfig) -> DataConfig:
    """The settings whose training split is what `shared_config` took away from the student: for decisions on edits."""
    data = config.data
    whole = data.train_start + (data.train_stop - data.train_start) / (1 - hybrid.accept.held_out)
    return dataclasses.replace(data, train_start=data.train_stop, train_stop=min(1.0, whole))
