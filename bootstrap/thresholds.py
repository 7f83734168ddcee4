"""Signs of an ill run: what is measured, from where on it is a warning or bad, and why there. No torch is needed.

The monitor (health.py) judges by these numbers while a run trains, and the report (reporting/) draws them.
Source: DESIGN section 8, Health.
"""

import math
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "bad"]
STATES: tuple[State, ...] = ("ok", "warn", "bad")
"""From best to worst; `health/status` logs the place in this list."""
STATUS = "health/status"


@dataclass(frozen=True)
class Sign:
    """One number that says whether a run is well, and where it stops being so."""

    name: str
    warn: float
    bad: float
    patience: int
    """The state is that of the median of so many last measurements: one odd batch is no illness."""
    advice: str
    """What it usually means, as a clause without a full stop."""

    @property
    def worse(self) -> Literal["above", "below"]:
        """On which side of the thresholds the illness lies."""
        return "above" if self.bad > self.warn else "below"

    def state(self, value: float) -> State:
        """The state that a value stands for. One that is not a number is bad, whatever is measured."""
        if math.isnan(value):
            return "bad"
        for state, threshold in (("bad", self.bad), ("warn", self.warn)):
            if value >= threshold if self.worse == "above" else value <= threshold:
                return state  # type: ignore[return-value]  # mypy widens the tuple's strings
        return "ok"


# Batches of a few hundred decisions have a calibration error of about 0.06 by chance alone (health.py chooses its bins
# so), and a student that learns well stays near that. The collapse of exhaustive exploration ends at 0.76. The gap is
# the same without bins: it has less noise, and counts over-confidence alone, hence the lower thresholds.
# English text has some 0.6 to 1.3 nats a character even for the best model: below 0.3 on average the policy has
# stopped to consider alternatives, below 0.1 it cannot explore any more.
# A gradient's norm doubles from step to step in any run; five times the median of the last is rare, twenty times what
# a broken batch or a diverging run does.
SIGNS: dict[str, Sign] = {
    "health/ece": Sign(
        "calibration error", 0.2, 0.35, 3, "the policy's probabilities no longer say how often it is right"
    ),
    "health/confidence_gap": Sign(
        "confidence over accuracy", 0.15, 0.3, 3, "the policy is surer than it is right: confidence collapse"
    ),
    "health/entropy": Sign("entropy", 0.3, 0.1, 3, "the policy hardly considers alternatives any more"),
    "health/grad_spike": Sign(
        "gradient norm over its median", 5.0, 20.0, 1, "a broken batch, or a learning rate that is too high"
    ),
}
"""What is watched, by the key of metrics.jsonl."""
