"""What is known of one key of metrics.jsonl; metrics.py has them all."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """How one key of metrics.jsonl is named, explained and drawn."""

    label: str
    unit: str
    """"%" marks a share, stored between 0 and 1; anything else is printed as it stands; "": no unit."""
    explanation: str
    better: Literal["lower", "higher", ""] = ""
    """Which direction is an improvement; "" where neither is one by itself."""
    log: bool = False
    """Draw on a logarithmic axis (if every value is positive)."""
    noisy: bool = False
    """One batch's value: long curves get a moving average on top."""
    settles: bool = False
    """Starts far from where it ends: the frame is fitted to what comes after the first steps."""
