"""The knobs of the method: who judges, and what becomes of it. The groups `critic` and `method` of config.py.

The defaults are the published settings (DESIGN section 3). Values are checked when a group is built, and the error
names the field, the value and the way out.
"""

import math
import struct
from dataclasses import dataclass
from typing import Literal

from checks import check_fields, parse_members, parse_schedule, require


@dataclass(frozen=True)
class CriticConfig:
    """Who judges the alternatives (DESIGN section 3, Critics)."""

    kind: Literal["model", "ngram", "mixed", "suffix", "self", "ensemble"] = "model"
    """model: a frozen GPT; ngram: interpolated counts of the training text; mixed: counts after all last tokens, words
    and lines, weighed by a small network (small vocabularies); suffix: all lengths blended along a suffix array (any
    vocabulary); self: the student's own past or a twin; ensemble: several."""
    ensemble: str = "mixed:0.5,self:0.5"
    """ensemble: whose probabilities are multiplied, each to the power of its weight, as kind:weight,kind:weight."""
    run: str = ""
    """model: a run folder to take the critic from. Empty: the critic of `preset`, trained when missing."""
    preset: str = ""
    """model: the pretraining preset that makes the critic. Empty: pretrain-char, or pretrain-30m for gpt2 tokens."""
    cross_fit: bool = False
    """model: two critics, each trained on one half of the text and judging the other half."""
    ngram_context: int = 4
    """ngram: longest context in tokens (1 = bigram)."""
    mixed_context: int = 6
    """mixed: longest context in tokens, besides words and lines."""
    suffix_context: int = 8
    """suffix: longest context in tokens."""
    ngram_discount: float = 0.75
    """ngram: absolute discount d, in (0, 1)."""
    leave_one_out: bool = True
    """ngram, mixed, suffix: take a training position's own occurrence out of the counts it is judged by."""
    past: Literal["ema", "ring", "twin"] = "ema"
    """self: a moving average of the student, a ring of its snapshots, or a twin trained beside it."""
    ema_decay: float = 0.999
    """self, ema: share of the average that survives one optimiser step."""
    ring_size: int = 4
    """self, ring: how many snapshots are kept; one of them, drawn per step, judges."""
    ring_every: int = 100
    """self, ring: optimiser steps between snapshots."""
    cache: bool = False
    """model, ngram: ask the critic once about every training window, keep its answers on disk and train from them."""
    cache_top: int = 0
    """cache: how many of the critic's likeliest tokens are kept for a position; 0: twice method.top-k."""

    def __post_init__(self) -> None:
        check_fields("critic", self)
        members = self.members
        fix = "two critics are trained for it; leave critic.run out"
        require(not (self.run and self.cross_fit), "critic.cross-fit", self.cross_fit, fix)
        require(
            self.kind != "ensemble" or not ("self" in members and self.past == "twin"),
            "critic.past",
            self.past,
            "a twin judges alone; use ema or ring in an ensemble",
        )
        require(
            not self.cache or "self" not in members,
            "critic.cache",
            self.cache,
            "the student's past changes while it trains; use --critic.kind model, ngram, mixed or suffix",
        )
        require(self.cache_top >= 0, "critic.cache-top", self.cache_top, "use 0 (twice method.top-k) or more tokens")
        require(1 <= self.mixed_context <= 16, "critic.mixed-context", self.mixed_context, "use 1 to 16 tokens")
        require(self.suffix_context >= 1, "critic.suffix-context", self.suffix_context, "use 1 token or more")
        require(0 <= self.ngram_context <= 16, "critic.ngram-context", self.ngram_context, "use 0 to 16 tokens")
        require(
            0 < self.ngram_discount < 1,
            "critic.ngram-discount",
            self.ngram_discount,
            "use a discount in (0, 1)",
        )
        require(0 <= self.ema_decay < 1, "critic.ema-decay", self.ema_decay, "use a decay in [0, 1)")
        for name in ("ring_size", "ring_every"):
            value = getattr(self, name)
            require(value >= 1, f"critic.{name.replace('_', '-')}", value, "use a positive number")

    @property
    def members(self) -> dict[str, float]:
        """Who judges, and with what weight: {kind: weight}; one alone with weight 1."""
        return parse_members(self.ensemble, "critic.ensemble") if self.kind == "ensemble" else {self.kind: 1.0}


@dataclass(frozen=True)
class MethodConfig:
    """Action set, experts, reward and loss (DESIGN section 3). A `…-schedule` overrides its constant.

    A schedule is written as progress:value knots with straight lines between them: "0:0.8,1:0.1" falls from
    0.8 at the first step to 0.1 at the last.
    """

    top_k: int = 16
    """k: the student and the critic propose this many actions each."""
    proposals: Literal["both", "critic"] = "both"
    """both: student and critic propose actions; critic: it alone, beside gold (to be studied)."""
    unproposed: Literal["consensus", "gold"] = "consensus"
    """Gold that neither side proposes: consensus: paid like every action; gold: paid alone, so that a small k does not
    starve the tail."""
    reality_weight: float = 0.7
    """w_r: weight of the reality expert in their mean."""
    critic_weight: float = 0.3
    """w_c: weight of the critic expert in their mean."""
    mean: Literal["geometric", "arithmetic"] = "geometric"
    """How the experts agree. geometric: as published; arithmetic: gold keeps reality's share whatever the critic
    thinks, and only the ratio of the weights counts."""
    critic_trust: Literal["constant", "known"] = "constant"
    """known: w_c falls, in favour of w_r, where training text shows that the critic is too sure (avatarl/trust.py)."""
    epsilon: float = 0.1
    """ε: mass that the reality expert spreads over the actions other than gold."""
    sparsify: Literal["above_mean", "none"] = "above_mean"
    """above_mean: actions whose consensus is at most 1/|A| get no reward; none: all keep theirs."""
    normalize: Literal["cap", "sum"] = "cap"
    """cap: scale by reward-scale, largest reward of a position at most reward-cap; sum: rewards sum to 1."""
    reward_scale: float = 100.0
    """Factor on the consensus before the cap (normalize = cap)."""
    reward_cap: float = 1.5
    """Largest reward of a position (normalize = cap)."""
    entropy_coef: float = 0.01
    """β: weight of the full-vocabulary entropy bonus."""
    policy_weighting: Literal["reinforce", "expected"] = "reinforce"
    """reinforce: −Σ r log π; expected: −Σ π r, the exact policy gradient, which collapses (to be studied)."""
    advantage: Literal["none", "group"] = "none"
    """none: rewards as they are; group: GRPO advantages within A with a clipped ratio (needs expected)."""
    clip_ratio: float = 0.2
    """group: the probability ratio is clipped to 1 ± this."""
    inner_epochs: int = 1
    """group: optimiser updates on each batch."""
    context: Literal["gold", "student"] = "gold"
    """gold: teacher-forced; student: a share of the context is replaced by the student's own picks."""
    student_context_share: float = 0.25
    """student: probability that a context token is replaced."""
    imagined_windows: int = 0
    """Windows written by the critic (ngram, mixed, suffix) that are learnt from beside each window of the corpus."""
    imagined_judge: Literal["critic", "consensus"] = "critic"
    """critic: it alone judges what it wrote; consensus: the token that it wrote counts as gold (to be studied)."""
    reality_weight_schedule: str = ""
    """Knots for reality-weight; empty: constant."""
    critic_weight_schedule: str = ""
    """Knots for critic-weight; empty: constant."""
    epsilon_schedule: str = ""
    """Knots for epsilon; empty: constant."""
    entropy_coef_schedule: str = ""
    """Knots for entropy-coef; empty: constant."""
    top_k_schedule: str = ""
    """Knots for the active k, rounded, at most top-k; empty: constant."""
    student_context_share_schedule: str = ""
    """Knots for student-context-share; empty: constant."""
    imagined_windows_schedule: str = ""
    """Knots for imagined-windows, rounded, at most imagined-windows; empty: constant."""

    SCHEDULED = (
        "reality_weight",
        "critic_weight",
        "epsilon",
        "entropy_coef",
        "top_k",
        "student_context_share",
        "imagined_windows",
    )

    def knots(self, name: str) -> tuple[tuple[float, float], ...]:
        """The schedule of field `name`: its knots, or its constant as the only one."""
        flag = f"method.{name}_schedule".replace("_", "-")
        return parse_schedule(getattr(self, f"{name}_schedule"), flag) or ((0.0, float(getattr(self, name))),)

    def __post_init__(self) -> None:
        check_fields("method", self)
        require(self.top_k >= 1, "method.top-k", self.top_k, "use a positive number")
        require(self.inner_epochs >= 1, "method.inner-epochs", self.inner_epochs, "use a positive number")
        require(self.clip_ratio > 0, "method.clip-ratio", self.clip_ratio, "use a positive number, such as 0.2")
        require(self.reward_scale > 0, "method.reward-scale", self.reward_scale, "use a positive number")
        require(self.reward_cap > 0, "method.reward-cap", self.reward_cap, "use a positive number")
        most = self.imagined_windows
        require(most >= 0, "method.imagined-windows", most, "use 0 or more windows")
        limits = {"top_k": (1, self.top_k), "student_context_share": (0, 1), "imagined_windows": (0, most)}
        for name in self.SCHEDULED:
            field_at_fault = f"{name}_schedule" if getattr(self, f"{name}_schedule") else name
            label = f"method.{field_at_fault}".replace("_", "-")
            for _, value in self.knots(name):
                if name == "epsilon":
                    inside = 0 < value < 1 and 0 < as_float32(value) < 1
                    require(inside, label, value, "ε must lie strictly between 0 and 1, also in float32")
                elif name in limits:
                    low, high = limits[name]
                    require(low <= value <= high, label, value, f"use a value from {low} to {high}")
                else:
                    require(0 <= value < math.inf, label, value, "use a finite value, 0 or more")
        require(
            self.advantage == "none" or self.policy_weighting == "expected",
            "method.advantage",
            self.advantage,
            "centred advantages times log π have no minimum; add --method.policy-weighting expected",
        )
        require(
            self.advantage == "group" or self.inner_epochs == 1,
            "method.inner-epochs",
            self.inner_epochs,
            "more than one needs the clipped ratio of --method.advantage group",
        )


def as_float32(value: float) -> float:
    """The nearest float32, in which the method computes."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def check_judging(critic: CriticConfig, method: MethodConfig) -> None:
    """Raise ConfigError where this critic cannot do what the method asks of it."""
    if method.critic_trust == "known":
        _check_trust(critic, method)
    if method.imagined_windows:
        _check_imagination(critic, method)


def _check_imagination(critic: CriticConfig, method: MethodConfig) -> None:
    """Only statistics of the text can write, and what they write is read as it stands."""
    label, many = "method.imagined-windows", method.imagined_windows
    writes = critic.kind in ("ngram", "mixed", "suffix") and not critic.cache
    require(writes, label, many, "they are written by --critic.kind ngram, mixed or suffix, without a cache")
    fix = "student contexts and group advantages belong to the corpus's own windows; leave one of them out"
    require(method.context == "gold" and method.advantage == "none", label, many, fix)


def _check_trust(critic: CriticConfig, method: MethodConfig) -> None:
    """What is known about a critic before training must hold throughout, and not come from reading gold."""
    label, members = "method.critic-trust", critic.members
    fix = "trust is an exponent of the critic's; use --method.mean geometric, or --method.critic-trust constant"
    require(method.mean == "geometric", label, "known", fix)
    fix = "the student's past changes while it trains; use another --critic.kind, or --method.critic-trust constant"
    require("self" not in members, label, "known", fix)
    counts = {"ngram", "mixed", "suffix"} & set(members)
    fix = "a critic that counts gold itself looks right everywhere; leave --critic.leave-one-out on"
    require(not counts or critic.leave_one_out, label, "known", fix)
