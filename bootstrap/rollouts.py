"""Rollouts: what the policy reads at each decision, and which actions it then takes (DESIGN section 8).

A row of at most the model's context is read in one forward pass, every position a decision on what stands before
it. Over a longer row a window of the model's context slides with stride 1: a position is then decided on its own
window alone, and reads the same tokens at the same places as the last position of such a row would.

Samples are drawn by the acting policy

    μ_g(a) ∝ π(a)^((1 − γ) / τ_g) · bigram(a)^γ

with a temperature τ_g for each of the G samples of a group and guidance γ. What learns later is μ itself, as a
function of π: probabilities of the policy that acted are in the ratio, not those of a policy that never did.
Draws are keyed by (seed, step, row, position, sample), hence the same after a resume and on any number of processes.

Shapes: B rows of L tokens, M contexts of C tokens, N decisions, V vocabulary, G samples, H horizon, D width.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from avatarl.contexts import keyed_uniform
from avatarl.critics import Autocast
from config_bootstrap import BootstrapConfig
from data.batches import Batch
from generation import empty_cache
from model import GPT, KVCache

DRAWS = 2  # stream of the keyed draws; 0 and 1 are those of AvataRL's student contexts


class Acting(NamedTuple):
    """How the acting policy differs from π: a temperature for each sample (G,), and the guidance, 0-d."""

    temperatures: Tensor
    guidance: Tensor


class Decisions(NamedTuple):
    """What the policy reads, and where in it decisions are taken. g is 1, or G where every sample has its own row."""

    rows: Tensor
    """(R, L) int64."""
    targets: Tensor
    """(R, L) int64: the corpus's token after each place; after a character that was drawn, the one at its place."""
    positions: Tensor | None
    """(R,) int64: offset of each row in the training stream."""
    first: int = 0
    """Places before this one are read, and decide nothing."""
    samples: int = 1
    """g: rows that follow one context."""

    def arrange(self, values: Tensor) -> Tensor:
        """Values at every place (R, L, …) as those of the decisions: (N, g, …)."""
        values = values[:, self.first :]
        if self.samples == 1:
            return values.flatten(0, 1)[:, None]
        return values.unflatten(0, (-1, self.samples)).transpose(1, 2).flatten(0, 1)  # N = M · H


class Starts(NamedTuple):
    """Where samples of several characters begin, and what the corpus holds there. P = C + H − 1."""

    tokens: Tensor
    """(M, P) int64: the context of C tokens, and the corpus's own continuation."""
    targets: Tensor
    """(M, P) int64: the token after each of `tokens`."""
    positions: Tensor | None
    """(M,) int64: offset of each context in the training stream."""
    draws: Tensor
    """(M, G, H): uniform in [0, 1)."""
    context: int
    """C."""


def read(model: GPT, tokens: Tensor) -> Tensor:
    """Hidden states at every position of tokens (B, L), each on at most the model's context: (B, L, D)."""
    block, (rows, length) = model.config.block_size, tokens.shape
    if length <= block:
        return model.hidden(tokens)
    windows = tokens.unfold(1, block, 1)  # (B, L − C + 1, C)
    hidden = model.hidden(windows.flatten(0, 1)).view(rows, length - block + 1, block, -1)
    return torch.cat((hidden[:, 0], hidden[:, 1:, -1]), dim=1)  # before a window is full, the first one's places


def log_policy(model: GPT, hidden: Tensor) -> Tensor:
    """log π over the true vocabulary at hidden states (…, D), in float32 or better: (…, V)."""
    logits = hidden @ model.unembedding.to(hidden.dtype).T
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


@torch.no_grad()
def log_policy_of(model: GPT, tokens: Tensor, autocast: Autocast = nullcontext) -> Tensor:
    """What another model would do at every position of tokens (B, L), without its dropout: (B, L, V)."""
    was_training = model.training
    model.eval()
    with autocast():
        log_pi = log_policy(model, read(model, tokens))
    model.train(was_training)
    return log_pi


def windows_read(length: int, block_size: int) -> int:
    """Tokens that `read` puts through the model for a row of `length`."""
    return length if length <= block_size else (length - block_size + 1) * block_size


def passes_per_token(settings: BootstrapConfig, block_size: int) -> tuple[int, tuple[float, float]]:
    """Players that learn, and the forward passes' worth of work that each causes per token of a row.

    Those are of learning and acting (a backward pass counts twice), and of its opponent.
    """
    s, length, acting = settings, settings.row_length(block_size), 0.0
    if s.horizon == 1:
        update = windows_read(length, block_size) / length
    else:
        context = min(block_size, length - s.horizon + 1)
        span = context + s.horizon - 1
        begun, went_on = length - span + 1, s.samples * (s.horizon - 1) * (1 if span <= block_size else block_size)
        update = begun * s.samples * windows_read(span, block_size) / length
        acting = begun * (context + went_on) / length
    judging = 0.0 if s.opponent == "none" else update
    return 1 + (s.opponent == "twin"), (3 * s.inner_epochs * update + acting, judging)


def decisions_per_token(settings: BootstrapConfig, block_size: int) -> float:
    """Decisions that a step judges for each token of a row; every player's count."""
    s, length = settings, settings.row_length(block_size)
    players = 2.0 if s.opponent == "twin" else 1.0
    if s.horizon == 1:
        return players
    begun = length - (min(block_size, length - s.horizon + 1) + s.horizon - 1) + 1
    return players * begun * s.samples * s.horizon / length


def temperatures(low: float, high: float, samples: int, device: torch.device | str) -> Tensor:
    """One for each sample, on a straight line from low to high: (G,)."""
    return torch.linspace(low, high, samples, device=device)


def acting_scores(log_pi: Tensor, log_bigram: Tensor | None, acting: Acting) -> Tensor:
    """log μ_g before its normalisation, from log π (N, G or 1, V) and the bigram's (the same shape): (N, G, V)."""
    power = ((1 - acting.guidance) / acting.temperatures)[:, None].to(log_pi.dtype)  # (G, 1)
    scores = log_pi * power
    return scores if log_bigram is None else scores + acting.guidance.to(log_pi.dtype) * log_bigram


def draw(mu: Tensor, uniform: Tensor) -> Tensor:
    """An action from each row of probabilities mu (…, V) by inverting its distribution; uniform (…): (…) int64."""
    ladder = mu.cumsum(-1)
    total = ladder[..., -1:].contiguous()
    action = torch.searchsorted(ladder, (uniform[..., None] * total).to(ladder.dtype), right=True)
    last = torch.searchsorted(ladder, total)  # rounding must not step past the last action of any mass
    return action.minimum(last)[..., 0].clamp_max(mu.shape[-1] - 1)  # of NaN, whose step is skipped, any action


class _ActingLogProbs(torch.autograd.Function):
    """log μ_g(a_g) as a function of log π; μ is kept from the forward pass, so that backward is one product."""

    @staticmethod
    def forward(ctx: Any, log_pi: Tensor, log_bigram: Tensor | None, actions: Tensor, acting: Acting) -> Tensor:
        log_mu = acting_scores(log_pi, log_bigram, acting).log_softmax(-1)  # (N, G, V)
        chosen = log_mu.gather(-1, actions[..., None])[..., 0]  # (N, G)
        ctx.save_for_backward(log_mu.exp_(), actions, *acting)
        ctx.shared = log_pi.shape[1] == 1
        return chosen

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        mu, actions, temperatures, guidance = ctx.saved_tensors
        pull = grad_output * ((1 - guidance) / temperatures).to(grad_output.dtype)  # (N, G)
        if ctx.shared:  # the same π for all samples of a context
            gradient = -torch.bmm(pull[:, None], mu)  # (N, 1, V)
            gradient[:, 0].scatter_add_(-1, actions, pull)
        else:
            gradient = -pull[..., None] * mu  # (N, G, V)
            gradient.scatter_add_(-1, actions[..., None], pull[..., None])
        return gradient, None, None, None


def acting_log_probs(log_pi: Tensor, log_bigram: Tensor | None, actions: Tensor, acting: Acting) -> Tensor:
    """log μ_g(a_g) of actions (N, G), differentiable by log π (N, G or 1, V): (N, G)."""
    return _ActingLogProbs.apply(log_pi, log_bigram, actions, acting)


@torch.no_grad()
def sample(log_pi: Tensor, log_bigram: Tensor | None, acting: Acting, uniform: Tensor) -> Tensor:
    """G actions for each of N contexts: log π (N, G or 1, V), uniform (N, G) in [0, 1) → (N, G) int64."""
    return draw(acting_scores(log_pi, log_bigram, acting).softmax(-1), uniform)


def uniform_draws(seed: int, step: int, batch: Batch, samples: int) -> Tensor:
    """A draw for every position of a batch and sample: (B, L, G)."""
    length = batch.tokens.shape[1]
    return keyed_uniform(seed, step, batch.indices, length * samples, DRAWS).view(-1, length, samples)


def starts(batch: Batch, block_size: int, horizon: int, samples: int, seed: int, step: int) -> Starts:
    """The contexts of a batch after which `horizon` ≥ 1 characters follow in its rows.

    A row of at most the model's context has one, as long as fits: C = L − H + 1. A longer row has one for every
    full window, C = block_size.
    """
    tokens, length = batch.tokens, batch.tokens.shape[1]
    context = min(block_size, length - horizon + 1)
    span = context + horizon - 1
    count = length - span + 1
    positions = None
    if batch.positions is not None:
        positions = (batch.positions[:, None] + torch.arange(count, device=tokens.device)).flatten()
    draws = keyed_uniform(seed, step, batch.indices, count * samples * horizon, DRAWS)
    return Starts(
        tokens.unfold(1, span, 1).flatten(0, 1),
        batch.targets.unfold(1, span, 1).flatten(0, 1),
        positions,
        draws.view(-1, samples, horizon),
        context,
    )


class Continuations(NamedTuple):
    """Samples of H characters after M contexts, and the rows that the policy read for them."""

    rows: Tensor
    """(M · G, C + H − 1) int64: the context, and the characters that were drawn, without the last."""
    actions: Tensor
    """(M, G, H) int64."""
    log_probs: Tensor
    """(M, G, H): log μ of every character when it was drawn."""


@torch.no_grad()
def continue_contexts(player: GPT, start: Starts, acting: Acting, log_bigram: Any) -> Continuations:
    """Draw H characters for each of G samples of every context, all of them at once, one character after the other.

    log_bigram: a function from tokens (N,) to the reference's log-probabilities after them (N, V). The policy reads
    what `read` will read in the update, in the same mode; keys and values are cached while all fits in its context.
    """
    m, samples, horizon = start.draws.shape
    rows = start.tokens[:, None].repeat(1, samples, 1).flatten(0, 1)  # (M G, P)
    actions = rows.new_empty((m, samples, horizon))
    log_probs = start.draws.new_empty((m, samples, horizon))
    fits = rows.shape[1] <= player.config.block_size
    cache = empty_cache(player, m) if fits else None
    for h in range(horizon):
        end = start.context + h
        read_by = start.tokens if h == 0 else rows  # all samples share their context
        hidden = _last_hidden(player, read_by, end, cache)  # (M or M G, D)
        if h == 0 and cache is not None:
            cache = cache.repeated(samples)
        log_pi = log_policy(player, hidden).unflatten(0, (m, -1))  # (M, 1 or G, V)
        reference = log_bigram(read_by[:, end - 1]).unflatten(0, (m, -1))
        actions[..., h] = sample(log_pi, reference, acting, start.draws[..., h])
        log_probs[..., h] = acting_log_probs(log_pi, reference, actions[..., h], acting)
        if end < rows.shape[1]:
            rows[:, end] = actions[..., h].flatten()
    return Continuations(rows, actions, log_probs)


def _last_hidden(player: GPT, rows: Tensor, end: int, cache: KVCache | None) -> Tensor:
    """The hidden state of position end − 1 of rows (R, P), on at most the player's context: (R, D)."""
    begin = max(0, end - player.config.block_size) if cache is None else cache.length
    hidden = GPT.hidden(player, rows[:, begin:end], cache)  # past the compiled one: lengths change
    return hidden[:, -1]
