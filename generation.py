"""Sampling from a GPT: batched prompts, KV cache, temperature, top-k and top-p, reproducible draws.

    rows = generate(model, [[1, 2, 3], [4]], 100, temperature=0.8, seed=1)     # two lists of new tokens

Which tokens the model sees is one rule, `context_start`, whether or not a cache saves the work. All rows
have the same length at every step: the batch starts at its shortest prompt, and a row whose prompt goes on
keeps its own next token where the others take a new one. No padding, no masks; prompts of very different
lengths cost a step per token of the difference.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from config import require
from model import GPT, KVCache


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits. Raises ConfigError for values that cannot work."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        warm = math.isfinite(self.temperature) and self.temperature >= 0
        require(warm, "temperature", self.temperature, "use 0 (the likeliest token) or a positive number")
        some = self.top_k is None or self.top_k >= 1
        require(some, "top-k", self.top_k, "keep at least 1 token, or leave it unset")
        share = self.top_p is None or 0 < self.top_p <= 1
        require(share, "top-p", self.top_p, "use a share above 0 and at most 1, or leave it unset")

    def keep_likely(self, logits: Tensor) -> Tensor:
        """Logits (B, V) with −inf outside the top-k and then outside the smallest set of mass top-p.

        The mass is that of the distribution over the top-k. Ties with the least likely token kept are kept.
        """
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -math.inf)
        if self.top_p is not None and self.top_p < 1:
            ranked = logits.sort(dim=-1, descending=True).values  # (B, V)
            mass = ranked.softmax(dim=-1)
            before = mass.cumsum(dim=-1) - mass  # mass of the likelier tokens
            least = ranked.masked_fill(before >= self.top_p, math.inf).amin(dim=-1, keepdim=True)  # (B, 1)
            logits = logits.masked_fill(logits < least, -math.inf)
        return logits

    def pick(self, logits: Tensor, draws: Tensor) -> Tensor:
        """One token per row (B,) from logits (B, V) and uniform numbers `draws` (B,), in their precision.

        Inverts the cumulative distribution in id order: a rounding error in the logits then moves a boundary
        by as little, where in an order by probability it could swap two tokens.
        """
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        scaled = (logits - logits.amax(dim=-1, keepdim=True)).to(draws.dtype) / self.temperature
        cumulative = self.keep_likely(scaled).softmax(dim=-1).cumsum(dim=-1)  # (B, V)
        total = cumulative[:, -1:]
        token = (cumulative <= draws[:, None] * total).sum(dim=-1)
        # Rounding must not step past the last token of any mass: the one at which the sum first is whole.
        return token.minimum((cumulative < total).sum(dim=-1))


def context_start(length: int, block_size: int) -> int:
    """Index of the first token in the context of a sequence of `length` tokens.

    0 while the sequence fits in a block. Beyond, the start moves on by a quarter of the block at a time: the
    context is always longer than three quarters of a block, and a cache is rebuilt once per quarter instead
    of at every token (a slide changes all positions, so nothing cached survives it).
    """
    hop = max(1, block_size // 4)
    return max(0, -(-(length - block_size) // hop) * hop)


def next_logits(model: GPT, tokens: Tensor, cache: KVCache | None) -> Tensor:
    """Logits (B, V) of the token after tokens (B, n); a `cache` holds the context's beginning, and grows."""
    length, block = tokens.shape[1], model.config.block_size
    start = context_start(length, block)
    if cache is not None:
        if start != context_start(length - 1, block):
            cache.length = 0
        start += cache.length
    # Past `model.hidden`, which training may have compiled: lengths change at every step here.
    hidden = GPT.hidden(model, tokens[:, start:], cache)[:, -1]  # (B, D)
    return hidden @ model.unembedding.T


def empty_cache(model: GPT, batch: int) -> KVCache:
    """A cache where the model's weights are, in the type its keys and values will have."""
    weight = model.wte.weight
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return KVCache.empty(model.config, batch, weight.device, dtype)


def uniform_draws(seed: int, first_row: int, lengths: Sequence[int], count: int) -> Tensor:
    """Uniform numbers in [0, 1), (B, longest + count): `count` per row from position lengths[row] on, else 0.

    Row i reads stream (seed, first_row + i) of a counter-based generator, and so depends on no other row.
    """
    draws = np.zeros((len(lengths), max(lengths) + count))
    for row, length in enumerate(lengths):
        stream = np.random.Philox(key=np.array([seed, first_row + row], dtype=np.uint64))
        draws[row, length : length + count] = np.random.Generator(stream).random(count)
    return torch.from_numpy(draws)


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raise ConfigError for an empty prompt or a token beyond the vocabulary."""
    for row, prompt in enumerate(prompts):
        require(len(prompt) > 0, "prompt", "", f"prompt {row + 1} is empty; give it something to continue")
        strange = [token for token in prompt if not 0 <= token < vocab_size]
        require(not strange, "prompt", strange[:1], f"no such token; the model has 0 to {vocab_size - 1}")


def steps(
    model: GPT, prompts: Sequence[Sequence[int]], draws: Tensor, sampling: Sampling, cache: KVCache | None
) -> Iterator[tuple[int, list[int]]]:
    """Write one column after another; yield its position n and the token that every row drew for it.

    A draw for a position inside a row's own prompt is thrown away. draws: (B, longest + new).
    """
    device = model.wte.weight.device
    draws = draws.to(torch.float32 if device.type == "mps" else torch.float64).to(device)
    begins = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens = torch.zeros(draws.shape, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    for n in range(int(begins.min()), tokens.shape[1]):
        picks = sampling.pick(next_logits(model, tokens[:, :n], cache), draws[:, n])  # (B,)
        tokens[:, n] = torch.where(n >= begins, picks, tokens[:, n])
        yield n, picks.tolist()


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    first_row: int = 0,
    end_of_text: int | None = None,
    use_cache: bool = True,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continue every prompt; return the new tokens only, at most `max_new_tokens` per row. DESIGN section 4.

    A row ends before `end_of_text`, which is not returned. `on_token(row, token)` hears each new token as it
    comes. Row i follows from the model, its prompt, the settings and (seed, first_row + i): other rows,
    `use_cache` and `max_new_tokens` change none of its tokens (up to rounding in the matrix products). Runs
    in evaluation mode and restores the mode it found. Raises ConfigError for settings or prompts that cannot
    work.
    """
    sampling = Sampling(temperature, top_k, top_p)
    check_prompts(prompts, model.vocab_size)
    require(max_new_tokens >= 0, "tokens", max_new_tokens, "must not be negative")
    require(0 <= seed < 2**64, "seed", seed, "use a whole number from 0 to 2**64 - 1")
    new: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts))) if max_new_tokens else set()
    if not unfinished:
        return new
    lengths = [len(prompt) for prompt in prompts]
    draws = uniform_draws(seed, first_row, lengths, max_new_tokens)
    cache = empty_cache(model, len(prompts)) if use_cache else None
    training = model.training
    model.eval()
    try:
        for n, picks in steps(model, prompts, draws, sampling, cache):
            for row in [row for row in sorted(unfinished) if n >= lengths[row]]:
                ended = picks[row] == end_of_text
                if not ended:
                    new[row].append(picks[row])
                    if on_token is not None:
                        on_token(row, picks[row])
                if ended or len(new[row]) == max_new_tokens:
                    unfinished.remove(row)
            if not unfinished:
                break
    finally:
        model.train(training)
    return new
