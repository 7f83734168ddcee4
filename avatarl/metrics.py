"""What is logged about a step's decisions, summed chunk by chunk (DESIGN section 6, keys `train/…`).

The sums stay tensors on the device; they are divided here and copied to the host only when they are logged.
"""

import torch
from torch import Tensor

from avatarl.action_space import ActionSet


class MetricSums:
    """Sums over positions of every metric of the method; `means` turns them into the logged values."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.positions = 0

    @torch.no_grad()
    def add(self, logits: Tensor, actions: ActionSet, critic: Tensor, rewards: Tensor, settings) -> None:  # type: ignore[no-untyped-def]
        """Add n positions: student logits (n, V), their actions, critic log-probs and rewards (n, K)."""
        k = settings.top_k
        active_k = getattr(settings, "active_k", None)
        log_pi = logits.log_softmax(-1)  # (n, V)
        log_pi_a = log_pi.gather(-1, actions.ids)  # (n, K)
        pi_a = log_pi_a.exp() * actions.valid
        shared = actions.ids[:, k + 1 :, None] == actions.ids[:, None, 1 : k + 1]  # (n, k, k)
        if active_k is not None:
            active = torch.arange(k, device=logits.device) < active_k
            shared = shared & active & active[:, None]
        found = {
            "reward": (pi_a * rewards).sum(-1),
            "p_gold": pi_a[:, 0],
            "gold_rank": 1.0 + (log_pi > log_pi_a[:, :1]).sum(-1),
            "gold_kept": rewards[:, 0] > 0,
            "action_mass": pi_a.sum(-1),
            "action_count": actions.valid.sum(-1),
            "overlap": shared.any(-1).sum(-1) / (k if active_k is None else active_k),
            "entropy": -(log_pi.exp() * log_pi).sum(-1),
            "critic_kl": kl_over_actions(critic, log_pi_a, actions.valid),
            "reward_std": spread(rewards, actions.valid),
        }
        if getattr(settings, "proposals", "both") == "critic":
            del found["overlap"]  # with proposals that nobody made
        for name, values in found.items():
            total = values.sum(dtype=torch.float32)
            self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.positions += logits.shape[0]

    def means(self) -> dict[str, Tensor]:
        """{"train/reward": 0-d tensor, …}, each the mean over positions."""
        if not self.positions:
            return {}
        return {f"train/{name}": total / self.positions for name, total in self.sums.items()}


def spread(rewards: Tensor, valid: Tensor) -> Tensor:
    """Standard deviation of a position's rewards over its valid actions: (n, K) each → (n,)."""
    count = valid.sum(-1, keepdim=True)
    mean = rewards.sum(-1, keepdim=True) / count
    return ((rewards - mean).square() * valid).sum(-1).div(count[:, 0]).sqrt()


def policy_metrics(logits: Tensor, gold: Tensor) -> dict[str, Tensor]:
    """What can be said of a policy without actions and rewards: P(gold), gold's rank, entropy, 0-d each."""
    log_pi = logits.log_softmax(-1)  # (N, V)
    log_pi_gold = log_pi.gather(-1, gold[:, None])  # (N, 1)
    return {
        "train/p_gold": log_pi_gold.exp().mean(),
        "train/gold_rank": 1.0 + (log_pi > log_pi_gold).sum(-1).float().mean(),
        "train/entropy": -(log_pi.exp() * log_pi).sum(-1).mean(),
    }


def kl_over_actions(critic_log_probs: Tensor, student_log_probs: Tensor, valid: Tensor) -> Tensor:
    """KL(critic ‖ student), both renormalised over the valid actions: (n, K) each → (n,)."""
    hidden = ~valid
    critic = critic_log_probs.float().masked_fill(hidden, float("-inf")).log_softmax(-1)
    student = student_log_probs.float().masked_fill(hidden, float("-inf")).log_softmax(-1)
    difference = (critic - student).masked_fill(critic == float("-inf"), 0.0)  # 0 · log 0 = 0
    return (critic.exp() * difference).sum(-1)
