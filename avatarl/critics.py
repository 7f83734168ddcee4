"""Critics: who judges the alternatives (DESIGN section 3, Critics).

A critic looks at a batch once and returns an opinion, which answers for any rows: its top-k, and its
log-probability of given tokens. Opinions of models keep hidden states and make logits only for the rows that
are asked for, so that chunks of a loss never hold (N, V) of the critic either. The n-gram critic stands in
ngram.py.

Shapes: B batch, T positions, N = B·T, V vocabulary, D the critic's width, K tokens asked for per position.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from avatarl.action_space import top_ids
from avatarl.softmax_gradient import log_partition, product_dtype
from config import require
from model import GPT

Autocast = Callable[[], AbstractContextManager]


class CriticOpinion(Protocol):
    """What a critic thinks at N positions."""

    def rows(self, start: int, stop: int) -> "CriticOpinion":
        """The opinion on positions start to stop alone."""

    def top_ids(self, k: int) -> Tensor:
        """The k likeliest tokens, best first, ties to the lowest id: (N, k) int64."""

    def log_probs(self, ids: Tensor) -> Tensor:
        """Log-probabilities over the full vocabulary of ids (N, K): (N, K)."""


class Critic(Protocol):
    """Whoever judges."""

    def opinion(self, tokens: Tensor, positions: Tensor | None) -> CriticOpinion:
        """Judge tokens (B, T); positions (B,) is the offset of tokens[b, 0] in the training stream, or None."""


class DenseOpinion:
    """An opinion held as log-probabilities (N, V), normalised."""

    def __init__(self, log_probs: Tensor) -> None:
        self._log_probs = log_probs

    def rows(self, start: int, stop: int) -> "DenseOpinion":
        return DenseOpinion(self._log_probs[start:stop])

    def top_ids(self, k: int) -> Tensor:
        return top_ids(self._log_probs, k)

    def log_probs(self, ids: Tensor) -> Tensor:
        return self._log_probs.gather(-1, ids)

    def full(self) -> Tensor:
        """All log-probabilities: (N, V)."""
        return self._log_probs


class HiddenOpinion:
    """A model's opinion, held as hidden states (N, D); logits exist for one chunk of rows at a time.

    The products run in the unembedding's type: bfloat16 where the model's own do. Log-probabilities are made
    only for the ids that are asked for.
    """

    def __init__(self, hidden: Tensor, unembedding: Tensor) -> None:
        self._hidden, self._unembedding = hidden, unembedding

    def rows(self, start: int, stop: int) -> "HiddenOpinion":
        return HiddenOpinion(self._hidden[start:stop], self._unembedding)

    @cached_property
    def _logits(self) -> Tensor:
        with torch.autocast(self._hidden.device.type, enabled=False):
            return self._hidden.to(self._unembedding.dtype) @ self._unembedding.T  # (N, V)

    @cached_property
    def _log_partition(self) -> Tensor:
        return log_partition(self._logits)  # (N, 1)

    @torch.no_grad()
    def top_ids(self, k: int) -> Tensor:
        return top_ids(self._logits, k)

    @torch.no_grad()
    def log_probs(self, ids: Tensor) -> Tensor:
        return self._logits.gather(-1, ids) - self._log_partition


class EitherOpinion:
    """Two opinions of which each position listens to one: the first where `first` (N,) is True."""

    def __init__(self, first: Tensor, one: CriticOpinion, other: CriticOpinion) -> None:
        self._first, self._one, self._other = first, one, other

    def rows(self, start: int, stop: int) -> "EitherOpinion":
        return EitherOpinion(self._first[start:stop], self._one.rows(start, stop), self._other.rows(start, stop))

    def top_ids(self, k: int) -> Tensor:
        return torch.where(self._first[:, None], self._one.top_ids(k), self._other.top_ids(k))

    def log_probs(self, ids: Tensor) -> Tensor:
        return torch.where(self._first[:, None], self._one.log_probs(ids), self._other.log_probs(ids))


class EnsembleOpinion:
    """A product of experts: p ∝ Π p_i^weight_i over the full vocabulary. Holds (n, V) once it is asked."""

    def __init__(self, opinions: Sequence[CriticOpinion], weights: Sequence[float], vocab_size: int, n: int) -> None:
        self._opinions, self._weights, self._vocab_size, self._n = opinions, weights, vocab_size, n

    def rows(self, start: int, stop: int) -> "EnsembleOpinion":
        parts = [opinion.rows(start, stop) for opinion in self._opinions]
        return EnsembleOpinion(parts, self._weights, self._vocab_size, len(range(self._n)[start:stop]))

    @cached_property
    def _log_probs(self) -> Tensor:
        score: Tensor | float = 0.0
        for opinion, weight in zip(self._opinions, self._weights, strict=True):
            score = score + weight * self._of_all(opinion)
        assert isinstance(score, Tensor)
        return score.log_softmax(-1)

    def _of_all(self, opinion: CriticOpinion) -> Tensor:
        """One member's log-probabilities of the whole vocabulary (n, V), in float32."""
        if isinstance(opinion, DenseOpinion):
            return opinion.full()
        device = opinion.top_ids(1).device
        return opinion.log_probs(torch.arange(self._vocab_size, device=device).expand(self._n, -1)).float()

    @torch.no_grad()
    def top_ids(self, k: int) -> Tensor:
        return top_ids(self._log_probs, k)

    @torch.no_grad()
    def log_probs(self, ids: Tensor) -> Tensor:
        return self._log_probs.gather(-1, ids)


def model_opinion(model: GPT, tokens: Tensor, autocast: Autocast = nullcontext) -> HiddenOpinion:
    """A model's opinion of tokens (B, T) at all N positions, without gradients and without dropout."""
    was_training = model.training
    model.eval()
    with torch.inference_mode(), autocast():
        hidden = model.hidden(tokens).flatten(0, 1)  # (N, D)
        unembedding = model.unembedding.to(product_dtype(hidden))
    torch.clear_autocast_cache()  # older PyTorch would reuse weights that were cast here, without their gradient
    model.train(was_training)
    return HiddenOpinion(hidden, unembedding)


class ModelCritic:
    """A frozen GPT. Raises ConfigError when its vocabulary or context does not fit the student's."""

    def __init__(self, model: GPT, vocab_size: int, block_size: int, autocast: Autocast = nullcontext) -> None:
        require(
            model.vocab_size == vocab_size,
            "the critic's vocabulary",
            model.vocab_size,
            f"the student's has {vocab_size} tokens; train the critic on the same corpus and tokenizer",
        )
        require(
            model.config.block_size >= block_size,
            "the critic's model.block-size",
            model.config.block_size,
            f"it must see at least the student's context; use --model.block-size <= that (now {block_size})",
        )
        self.model, self.autocast = model.eval().requires_grad_(False), autocast

    def opinion(self, tokens: Tensor, positions: Tensor | None) -> HiddenOpinion:
        return model_opinion(self.model, tokens, self.autocast)


class CrossFitCritic:
    """Two critics, each of which judges the half of the training stream that it was not trained on.

    A window belongs to the half that it starts in; `middle` is the offset of the second half. Where positions
    are unknown, the first critic judges. Both are asked at every position, so the critics cost twice.
    """

    def __init__(self, trained_on_first: Critic, trained_on_second: Critic, middle: int) -> None:
        self._of_first, self._of_second, self._middle = trained_on_first, trained_on_second, middle

    def opinion(self, tokens: Tensor, positions: Tensor | None) -> CriticOpinion:
        second = self._of_second.opinion(tokens, positions)
        if positions is None:
            return self._of_first.opinion(tokens, positions)
        in_second = (positions >= self._middle).repeat_interleave(tokens.shape[1])  # (N,)
        return EitherOpinion(in_second, self._of_first.opinion(tokens, positions), second)


class EnsembleCritic:
    """Several critics whose probabilities are multiplied, each to the power of its weight, and normalised.

    Every token of the vocabulary is scored at every position: (n, V) numbers per chunk of a loss.
    """

    def __init__(self, critics: Sequence[Critic], weights: Sequence[float], vocab_size: int) -> None:
        self._critics, self._weights, self._vocab_size = list(critics), list(weights), vocab_size

    def opinion(self, tokens: Tensor, positions: Tensor | None) -> EnsembleOpinion:
        opinions = [critic.opinion(tokens, positions) for critic in self._critics]
        return EnsembleOpinion(opinions, self._weights, self._vocab_size, tokens.numel())


class PastCritic(nn.Module):
    """The student's own past: an exponential moving average of it, or a ring of its snapshots.

    ema: one copy follows the student after every step. ring: a snapshot every `every` steps replaces the
    oldest of `size`; the one that judges a step is drawn from those taken so far, keyed by (seed, step). The
    copies are buffers of this module's state dict, so that resume continues with the same past.
    """

    def __init__(self, student: GPT, *, size: int, decay: float | None, every: int, seed: int) -> None:
        super().__init__()
        self.decay, self.every, self.seed = decay, every, seed
        self.copies = nn.ModuleList(student.clone().requires_grad_(False) for _ in range(size))
        self.step = 0
        self.autocast: Autocast = nullcontext

    def judge_index(self) -> int:
        """Which copy judges the present step."""
        taken = min(len(self.copies), self.step // self.every + 1) if self.decay is None else 1
        if taken == 1:
            return 0
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        return int(torch.randint(taken, (), generator=draw))

    def opinion(self, tokens: Tensor, positions: Tensor | None) -> HiddenOpinion:
        return model_opinion(self.copies[self.judge_index()], tokens, self.autocast)  # type: ignore[arg-type]

    @torch.no_grad()
    def follow(self, student: GPT, step: int) -> None:
        """Take in the student as it is after `step` optimiser steps."""
        self.step = step
        if self.decay is not None:
            mine: list[Tensor] = list(self.copies[0].parameters())
            new: list[Tensor] = list(student.parameters())
            torch._foreach_lerp_(mine, new, 1 - self.decay)
        elif step % self.every == 0:
            slot = step // self.every % len(self.copies)
            self.copies[slot].load_state_dict(student.state_dict())
