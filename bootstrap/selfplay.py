"""Self-play: a character is worth what it brings over an opponent in the same context (DESIGN section 8).

The opponent is the student's own past (an average or a ring of its snapshots) or a twin that trains beside it. Its
value v = Σ_b π_opponent(b) r(b) is exact, as every action's reward is known. A margin r(a) − v would cancel from
centred advantages and from the exact policy gradient, whose baselines cost nothing; so what pays is to *beat* it:

    r'(a) = (1 − w) r(a) + w max(0, r(a) − v)

With w = 1 nothing is paid where the opponent collects all that there is, and much where it fails: the student's own
past decides where it looks. What w < 1 leaves is credit for good actions that do not beat it. No reward is negative,
so that weights free of π stay allowed.

V is the vocabulary.
"""

from torch import Tensor, nn

from avatarl.critics import PastCritic
from avatarl.reward import Weight
from model import GPT


def value_of(log_pi: Tensor, rewards: Tensor) -> Tensor:
    """What a policy expects: Σ_a π(a) r(a), (…, V) both → (…)."""
    return (log_pi.exp() * rewards).sum(-1)


def beating(rewards: Tensor, value: Tensor, weight: Weight) -> Tensor:
    """(1 − w) r + w max(0, r − v): rewards (…, V) against an opponent's value v (…) → (…, V)."""
    return (1 - weight) * rewards + weight * (rewards - value[..., None]).clamp_min(0)


def judging_copy(past: PastCritic) -> GPT:
    """The snapshot, or the average, that the present step is played against."""
    copy: nn.Module = past.copies[past.judge_index()]
    assert isinstance(copy, GPT)
    return copy
