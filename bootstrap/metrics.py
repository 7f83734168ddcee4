"""What is logged about a step's decisions: `train/…` as everywhere, `bootstrap/…` beyond (DESIGN section 6).

Everything stays a tensor on its device until it is written. Shapes: N contexts, g rows of a context, V vocabulary,
G samples.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from avatarl.metrics import policy_metrics
from bootstrap.grpo import entropy_of, kl_to
from bootstrap.selfplay import value_of
from config_bootstrap import BootstrapConfig

Metrics = dict[str, Tensor]


@torch.no_grad()
def of_rewards(log_pi: Tensor, terms: Mapping[str, Tensor], reward: Tensor) -> Metrics:
    """What the policy expects of the reward and of each of its weighted terms, all (N, g, V).

    The plain mean over all actions stands beside it as `bootstrap/reward_mean`: it belongs to the corpus, and does
    not move while the policy learns.
    """
    by_term = {f"bootstrap/reward_{name}": value_of(log_pi, term).mean() for name, term in terms.items()}
    return {
        "train/reward": value_of(log_pi, reward).mean(),
        "train/reward_std": reward.std(-1, correction=0).mean(),
        "bootstrap/reward_mean": reward.mean(),
        **by_term,
    }


@torch.no_grad()
def of_policy(log_pi: Tensor, gold: Tensor, log_bigram: Tensor | None, settings: BootstrapConfig) -> Metrics:
    """What can be said of the policy (N, g, V) alone: how often it is right, how far from the bigram, how sure."""
    found = policy_metrics(log_pi.flatten(0, 1), gold.flatten())
    found["bootstrap/accuracy"] = (log_pi.argmax(-1) == gold).float().mean()
    if log_bigram is not None:
        found["bootstrap/kl"] = kl_to(log_pi, log_bigram).mean()
    entropy = entropy_of(log_pi)
    if settings.mask_entropy:
        found["bootstrap/masked"] = (entropy < settings.mask_entropy).float().mean()
    if settings.entropy_bonus or settings.entropy_penalty:
        high = settings.entropy_high or float("inf")
        found["bootstrap/outside_band"] = ((entropy < settings.entropy_low) | (entropy > high)).float().mean()
    return found


@torch.no_grad()
def of_samples(actions: Tensor, gold: Tensor, brought: Tensor) -> Metrics:
    """How often samples (N, G) are gold (N, g), and how far rewards `brought` (N, G) lie apart inside a group."""
    return {
        "bootstrap/sample_accuracy": (actions == gold).float().mean(),
        "bootstrap/group_std": brought.std(-1, correction=0).mean(),
    }


@torch.no_grad()
def of_selfplay(value: Tensor, opponent: Tensor) -> Metrics:
    """The student's and its opponent's expected rewards (N, g), and the share of decisions that the student wins."""
    return {
        "bootstrap/value": value.mean(),
        "bootstrap/opponent_value": opponent.mean(),
        "bootstrap/win_rate": (value > opponent).float().mean(),
    }
