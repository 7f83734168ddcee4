"""What a generated text is worth: likelihood under a judge, plus diversity, minus repetition (DESIGN section 9).

    quality = Σ_i log p_judge(x_i | what stands before it) / characters
              + diversity_weight · distinct-2 − repetition_weight · repetition-4

distinct-2 is the share of a text's pairs of tokens that are different ones (Li et al., 2016), repetition-4 the share
of its runs of four tokens that were there before in it. The judge is any critic (avatarl/critics.py) that was made
from the training split; likelihood alone would be greatest for the same few words over and over, hence the others.

Shapes: N texts, n tokens of the prompt, m new tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from avatarl.critics import Critic

PAIR, RUN = 2, 4


class Quality(NamedTuple):
    """The terms of N texts, (N,) float64 each, and their weighted sum."""

    likelihood: Tensor
    diversity: Tensor
    repetition: Tensor
    total: Tensor


class TextJudge:
    """Scores texts by `critic` and by what they repeat.

    lengths (V,): characters of every token, or None where each is one; so that judges of different tokens mean
    the same unit, nats per character.
    """

    def __init__(
        self,
        critic: Critic,
        *,
        diversity_weight: float = 0.5,
        repetition_weight: float = 0.5,
        lengths: Tensor | None = None,
    ) -> None:
        self.critic, self.lengths = critic, lengths
        self.diversity_weight, self.repetition_weight = diversity_weight, repetition_weight

    @torch.no_grad()
    def quality(self, prompts: Tensor, texts: Tensor) -> Quality:
        """Judge texts (N, m), each the continuation of prompts (N, n)."""
        likelihood = self.likelihood(prompts, texts)
        diversity, repetition = distinct_share(texts, PAIR), 1 - distinct_share(texts, RUN)
        total = likelihood + self.diversity_weight * diversity - self.repetition_weight * repetition
        return Quality(likelihood, diversity, repetition, total)

    def likelihood(self, prompts: Tensor, texts: Tensor) -> Tensor:
        """Mean log-likelihood per character of texts (N, m) after prompts (N, n): (N,)."""
        count, new = texts.shape
        whole = torch.cat((prompts, texts), dim=1)  # (N, n + m)
        opinion = self.critic.opinion(whole[:, :-1], None)
        gold = whole[:, 1:].reshape(-1, 1)
        log_p = opinion.log_probs(gold).view(count, -1)[:, -new:].double()  # (N, m)
        characters = new if self.lengths is None else self.lengths[texts].sum(1).clamp_min(1)
        return log_p.sum(1) / characters


def distinct_share(texts: Tensor, n: int) -> Tensor:
    """Of each text's runs of `n` tokens, how many are different ones: texts (N, m) → (N,) in (0, 1].

    A text shorter than a run counts as wholly distinct.
    """
    if texts.shape[1] < n:
        return torch.ones(len(texts), dtype=torch.float64, device=texts.device)
    runs = texts.unfold(1, n, 1)  # (N, m − n + 1, n)
    same = (runs[:, :, None] == runs[:, None]).all(-1)  # (N, r, r)
    seen_before = same.tril(-1).any(-1)  # (N, r)
    return 1 - seen_before.double().mean(1)
