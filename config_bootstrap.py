"""Every knob of the bootstrapping experiments: the group `bootstrap` of config.py (DESIGN section 8).

    python train.py bootstrap-best --bootstrap.soft-weight-schedule 0:0.9,1:0.3

The defaults are exhaustive exploration with a reward for gold alone, the weights free of π. What the experiments
change is in presets_bootstrap.py.
"""

import math
from dataclasses import dataclass
from typing import Literal

from checks import ConfigError, check_fields, parse_schedule, require

ORDERS = 4
"""n-gram orders 1 to 4 may give partial credit: contexts of 0 to 3 tokens."""


@dataclass(frozen=True)
class BootstrapConfig:
    """Learning from nothing, at character level (train.objective = bootstrap). A `…-schedule` overrides its constant.

    A reward is a weighted sum of terms over all V actions; a term of weight 0 costs nothing. Schedules are written
    as those of `method`: "0:0.9,1:0.3".
    """

    contexts: Literal["sequence", "windows"] = "sequence"
    """sequence: every position of a row at once, each reading what stands before it in the row; windows: every
    position reads its own window of the last model.block-size tokens, at that many times the cost."""
    row: int = 0
    """windows: tokens of a row, over which the window slides with stride 1; 0: model.block-size, hence one window."""
    rollout: Literal["sampled", "exhaustive"] = "exhaustive"
    """sampled: the policy draws some actions and learns from their advantages; exhaustive: all V are judged."""
    samples: int = 8
    """sampled: G, how many actions are drawn in a context; the group that advantages are normalised in."""
    temperature_low: float = 1.0
    """sampled: temperature of the first sample of a group."""
    temperature_high: float = 1.0
    """sampled: temperature of the last; those between lie on a straight line."""
    guidance: float = 0.0
    """sampled: g in [0, 1]; actions are drawn from π^(1−g) · bigram^g, normalised."""
    horizon: int = 1
    """sampled: H, how many characters a sample goes on for, each a decision of its own."""
    discount: float = 1.0
    """sampled, horizon > 1: factor per character on the rewards that come later in a sample."""
    policy_weighting: Literal["reinforce", "expected"] = "reinforce"
    """exhaustive: −Σ r log π, weights free of π; or −Σ π r, the exact policy gradient (to be studied)."""
    advantage: Literal["none", "group"] = "none"
    """exhaustive: rewards as they are, or normalised over the V actions with a clipped ratio (needs expected)."""
    clip_ratio: float = 0.2
    """The probability ratio is clipped to 1 ± this."""
    inner_epochs: int = 1
    """Optimiser updates on each batch, by the clipped ratio against the policy that acted."""
    exact_weight: float = 1.0
    """Weight of the hard signal: 1 for the character that really came next."""
    ngram_weight: float = 0.0
    """Weight of the n-gram partial credit."""
    ngram_orders: str = "0.1,0.2,0.3,0.4"
    """Shares of the orders 1, 2, 3 and 4 (contexts of 0 to 3 characters) in the partial credit."""
    credit: Literal["relative", "raw"] = "relative"
    """An order's credit of an action: its probability over that of the likeliest action, or as it is."""
    confidence_weight: float = 0.0
    """Weight of the confidence bonus: π(gold), paid for gold alone."""
    soft_weight: float = 0.0
    """Weight of the soft signal: the probability of every action by n-grams, the position's own occurrence left out."""
    soft: Literal["ngram", "mixed", "suffix"] = "ngram"
    """Who gives the soft signal: interpolated n-grams, all context lengths as a product of experts (no words: those
    are left to the curriculum), or the longest contexts seen, by a suffix array."""
    soft_context: int = 5
    """Longest context of the soft signal, in characters."""
    stages: str = ""
    """Stages of the curriculum, in order: frequencies,bigrams,words,punctuation,patterns. Empty: no curriculum."""
    stage_weight: float = 1.0
    """Weight of the present stage's reward."""
    stage_window: int = 50
    """Steps whose mean reward is compared with that of as many before, to see a plateau."""
    stage_tolerance: float = 0.01
    """A stage is over when its reward rose by less than this share from one such window to the next."""
    stage_min_steps: int = 100
    """Steps that a stage lasts at least."""
    stage_max_steps: int = 400
    """Steps after which the next stage begins in any case."""
    opponent: Literal["none", "ema", "ring", "twin"] = "none"
    """Self-play against the student's moving average, a ring of its snapshots (critic.ema-decay, critic.ring-size,
    critic.ring-every), or a twin trained in parallel."""
    opponent_weight: float = 1.0
    """Self-play: share of the reward that is the margin over the opponent; the rest is the reward as it is."""
    kl_coef: float = 0.0
    """Weight of KL(π ‖ bigram), exact over the vocabulary."""
    entropy_low: float = 0.0
    """Lower edge of the entropy band, in nats."""
    entropy_high: float = 0.0
    """Upper edge of the entropy band, in nats; 0: none."""
    entropy_bonus: float = 0.0
    """Weight of what a decision's entropy lacks to the lower edge."""
    entropy_penalty: float = 0.0
    """Weight of what a decision's entropy has above the upper edge."""
    mask_entropy: float = 0.0
    """Decisions with less entropy than this, in nats, are left out of the policy's loss; 0: none."""
    guidance_schedule: str = ""
    """Knots for guidance; empty: constant."""
    exact_weight_schedule: str = ""
    """Knots for exact-weight; empty: constant."""
    ngram_weight_schedule: str = ""
    """Knots for ngram-weight; empty: constant."""
    confidence_weight_schedule: str = ""
    """Knots for confidence-weight; empty: constant."""
    soft_weight_schedule: str = ""
    """Knots for soft-weight; empty: constant."""
    opponent_weight_schedule: str = ""
    """Knots for opponent-weight; empty: constant."""
    kl_coef_schedule: str = ""
    """Knots for kl-coef; empty: constant."""

    SCHEDULED = (
        "guidance",
        "exact_weight",
        "ngram_weight",
        "confidence_weight",
        "soft_weight",
        "opponent_weight",
        "kl_coef",
    )

    def knots(self, name: str) -> tuple[tuple[float, float], ...]:
        """The schedule of field `name`: its knots, or its constant as the only one."""
        label = f"bootstrap.{name}_schedule".replace("_", "-")
        return parse_schedule(getattr(self, f"{name}_schedule"), label) or ((0.0, float(getattr(self, name))),)

    def ever(self, name: str) -> bool:
        """Whether the scheduled field `name` is above 0 anywhere."""
        return any(value > 0 for _, value in self.knots(name))

    @property
    def order_weights(self) -> tuple[float, ...]:
        """Shares of the n-gram orders, the unigram first."""
        try:
            shares = tuple(float(part) for part in self.ngram_orders.split(","))
        except ValueError:
            shares = ()
        require(
            0 < len(shares) <= ORDERS and all(0 <= s < math.inf for s in shares) and sum(shares) > 0,
            "bootstrap.ngram-orders",
            self.ngram_orders,
            f"write up to {ORDERS} shares of 0 or more, such as 0.1,0.2,0.3,0.4",
        )
        return shares

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The stages of the curriculum, as they are written; whoever builds it knows which there are."""
        return tuple(part.strip() for part in self.stages.split(",") if part.strip())

    @property
    def uses_ratio(self) -> bool:
        """Whether the loss compares the policy with the one that acted."""
        return self.rollout == "sampled" or self.advantage == "group"

    def __post_init__(self) -> None:
        check_fields("bootstrap", self)
        self._check_numbers()
        sampled = self.rollout == "sampled"
        fix = "a group of one has no spread to normalise over; use at least 2"
        require(not sampled or self.samples >= 2, "bootstrap.samples", self.samples, fix)
        fix = "all V^H continuations cannot be judged; use 1, or --bootstrap.rollout sampled"
        require(sampled or self.horizon == 1, "bootstrap.horizon", self.horizon, fix)
        fix = "centred advantages times log π have no minimum; add --bootstrap.policy-weighting expected"
        reinforce = not sampled and self.policy_weighting == "reinforce"
        require(self.advantage == "none" or not reinforce, "bootstrap.advantage", self.advantage, fix)
        fix = "more than one needs a clipped ratio: --bootstrap.rollout sampled, or --bootstrap.advantage group"
        require(self.inner_epochs == 1 or self.uses_ratio, "bootstrap.inner-epochs", self.inner_epochs, fix)
        paid = ["exact_weight", "ngram_weight", "confidence_weight", "soft_weight"]
        if not any(self.ever(name) for name in paid) and not (self.stage_names and self.stage_weight > 0):
            raise ConfigError("bootstrap.exact-weight = 0: nothing is rewarded; give a term of the reward a weight")

    def _check_numbers(self) -> None:
        """Raise ConfigError for a number outside its range."""
        whole = ("samples", "horizon", "inner_epochs", "stage_window", "stage_min_steps", "stage_max_steps")
        for name in whole:
            value = getattr(self, name)
            require(value >= 1, f"bootstrap.{name}".replace("_", "-"), value, "use a positive number")
        for name in ("temperature_low", "temperature_high", "clip_ratio"):
            value = getattr(self, name)
            require(value > 0, f"bootstrap.{name}".replace("_", "-"), value, "use a number above 0")
        zero = ("row", "stage_weight", "stage_tolerance", "entropy_low", "entropy_high", "entropy_bonus")
        for name in (*zero, "entropy_penalty", "mask_entropy"):
            value = getattr(self, name)
            require(value >= 0, f"bootstrap.{name}".replace("_", "-"), value, "use 0 or more")
        require(0 <= self.discount <= 1, "bootstrap.discount", self.discount, "use a factor from 0 to 1")
        require(0 <= self.soft_context <= 16, "bootstrap.soft-context", self.soft_context, "use 0 to 16 characters")
        require(
            self.stage_min_steps <= self.stage_max_steps,
            "bootstrap.stage-min-steps",
            self.stage_min_steps,
            f"use at most bootstrap.stage-max-steps = {self.stage_max_steps}",
        )
        require(
            self.entropy_high == 0 or self.entropy_low <= self.entropy_high,
            "bootstrap.entropy-low",
            self.entropy_low,
            f"the band is empty; use at most bootstrap.entropy-high = {self.entropy_high:g}",
        )
        self.order_weights  # noqa: B018  # checked by looking at them
        for name in self.SCHEDULED:
            scheduled = f"{name}_schedule" if getattr(self, f"{name}_schedule") else name
            label = f"bootstrap.{scheduled}".replace("_", "-")
            most = 1.0 if name in ("guidance", "opponent_weight") else math.inf
            for _, value in self.knots(name):
                fits = 0 <= value <= most and math.isfinite(value)
                require(fits, label, value, "use a share from 0 to 1" if most == 1 else "use a finite value, 0 or more")

    def row_length(self, block_size: int) -> int:
        """Tokens of a training row, where the model reads `block_size`."""
        return self.row or block_size if self.contexts == "windows" else block_size

    def check_model(self, block_size: int, dropout: float) -> None:
        """Raise ConfigError for what does not go together with the model."""
        fix = f"a window has model.block-size = {block_size} tokens; use at least as many, or 0"
        require(self.row == 0 or self.row >= block_size, "bootstrap.row", self.row, fix)
        fix = "rows of --bootstrap.contexts sequence have model.block-size tokens; add --bootstrap.contexts windows"
        require(self.row in (0, block_size) or self.contexts == "windows", "bootstrap.row", self.row, fix)
        length = self.row_length(block_size)
        fix = f"a row has {length} tokens, and a sample needs one to start from; use at most that"
        require(self.horizon <= length, "bootstrap.horizon", self.horizon, fix)
        fix = "another mask would decide than the one that acted: use 0, or one inner epoch and a horizon of 1"
        several = self.inner_epochs > 1 or self.horizon > 1
        require(dropout == 0 or not several, "model.dropout", dropout, fix)
