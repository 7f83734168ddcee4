"""M candidate operations in one forward pass: a low-rank correction for every sample instead of M operated models.

    logits = batched_logits(model, operator, actions, tokens)          # (M, L, r), (M, T) → (M, T, V)
    texts = batched_generate(model, operator, actions, prompts, 32)    # (M, L, r), (M, T) → (M, 32)

With right singular vectors V (r, D) of a QKV weight W, an operation by a is W' = W (1 + Vᵀ diag(a) V), so that
W' x = W (x + Vᵀ diag(a) V x): sample m's input to the projection is corrected by its own aₘ, and one product with W
serves all. This needs M · L · r numbers besides V. A hook in front of each projection does it, only within
`corrected`, only in this thread, and on the model's eager forward: torch.compile's code does not know hooks.

Shapes: M candidates, L layers, r directions, T positions, D width, V vocabulary.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from config import require
from generation import Sampling, check_prompts, empty_cache, uniform_draws
from generation import steps as columns
from model import GPT, KVCache
from surgery.operation import Operator
from surgery.theater import bare_model

Actions = Tensor | np.ndarray


class Correction:
    """What stands in front of one projection: rows a (M, r) in the directions `right` (r, D)."""

    def __init__(self, rows: Tensor, right: Tensor) -> None:
        self.rows, self.right = rows, right
        operated = rows.any(-1)  # (M,)
        self.operated = None if operated.all() else operated[:, None, None]
        self.calls = 0

    def __call__(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        (x,) = inputs  # (M, T, D)
        self.calls += 1
        require(len(x) == len(self.rows), "rows", len(x), f"the actions are for {len(self.rows)}, one for each")
        with torch.autocast(x.device.type, enabled=False):
            right = self.right.to(x.dtype)
            share = (x @ right.mT) * self.rows[:, None].to(x.dtype)  # (M, T, r)
            changed = torch.addmm(x.flatten(0, 1), share.flatten(0, 1), right).view_as(x)
        if self.operated is None:
            return (changed,)
        return (torch.where(self.operated, changed, x),)  # adding 0 would change the sign of −0


@contextlib.contextmanager
def in_front(module: nn.Module, change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Iterator[None]:
    """Within the block `change` maps the module's inputs, where this thread calls it."""
    here = threading.get_ident()

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return change(inputs) if threading.get_ident() == here else inputs

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def corrected(operator: Operator, actions: Actions) -> Iterator[list[Correction]]:
    """Within the block, row m of every batch runs through the weights that actions[m] (L, r) makes.

    A row of zeros runs through the weights as they are, to the last bit. Yields the corrections in place, none for a
    layer that no candidate touches. Raises ConfigError for actions that the operator refuses, or for a batch of
    another size than theirs.
    """
    values = operator.checked(actions, batch=True)  # (M, L, r)
    touched = values.any(-1).any(0).tolist()  # L of them
    known = operator.directions() if any(touched) else []
    placed = []
    with contextlib.ExitStack() as stack:
        for i in [i for i, some in enumerate(touched) if some]:
            placed.append(Correction(values[:, i].contiguous(), known[i].right))
            stack.enter_context(in_front(operator.projections[i], placed[-1]))
        yield placed


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block: candidates compared under different dropout masks are not compared at all."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def shared_start(model: GPT, operator: Operator, index: Tensor) -> Iterator[None]:
    """Within the block a batch of distinct contexts becomes x[index], (M, …), where the first operated block begins."""
    targets = {id(projection) for projection in operator.projections}
    first = next(block for block in model.blocks if any(id(m) in targets for m in block.modules()))

    def widen(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = inputs  # (distinct, T, D)
        return x[index], *rest

    with in_front(first, widen):
        yield


class SharedCache(KVCache):
    """A KV cache of M rows that also takes keys and values of distinct contexts, and gives row m those of index[m]."""

    def __init__(self, store: Tensor, index: Tensor) -> None:
        super().__init__(store)
        self.index = index

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if len(k) == len(self.index):
            return super().extend(layer, k, v)
        super().extend(layer, k[self.index], v[self.index])
        return k, v  # a beginning, which nothing precedes

    def follow(self, part: str, x: Tensor, count: int) -> Tensor:
        wide = super().follow(part, x, count)
        if len(x) < len(self.index):
            self.recent[part] = self.recent[part][self.index]
        return wide


def distinct_contexts(tokens: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
    """The different rows of tokens (M, T) or (1, T), and which of them each candidate has; None: its own."""
    if len(tokens) == 1 < count:
        return tokens, torch.zeros(count, dtype=torch.long, device=tokens.device)
    distinct, index = torch.unique(tokens, dim=0, return_inverse=True)
    return (distinct, index) if len(distinct) < count else (tokens, None)


def check_used(placed: Sequence[Correction]) -> None:
    """Raise RuntimeError where a correction was placed and passed by: its results would be the unoperated model's."""
    if not all(correction.calls for correction in placed):
        raise RuntimeError(
            "the operated layers did not run here: give the model that the operator was made for, with blocks that "
            "are not compiled one by one (compile the whole model, or its `hidden`)"
        )


def checked_model(model: nn.Module) -> GPT:
    """The GPT in a model that may be compiled, wrapped by DDP or an objective's."""
    bare = bare_model(model)
    require(isinstance(bare, GPT), "model", type(bare).__name__, "batched evaluation runs a GPT of this project")
    return cast(GPT, bare)


@torch.no_grad()
def batched_logits(
    model: nn.Module, operator: Operator, actions: Actions, tokens: Tensor, *, last_only: bool = False
) -> Tensor:
    """Logits of M operated models at once: (M, T, V), or with `last_only` those of the token to come, (M, V).

    actions (M, L, r); tokens (M, T), a context for each, or (T,) or (1, T), one for all. For equal contexts what lies
    in front of the first operated block is computed once. In evaluation mode, without gradients. Equals operating one
    by one up to rounding; for zero actions, all contexts different, it is the unoperated model's answer to that batch
    bit for bit.
    """
    gpt = checked_model(model)
    tokens = tokens.reshape(-1, tokens.shape[-1])  # (M, T) or (1, T)
    count = len(actions)
    require(len(tokens) in (1, count), "tokens", tuple(tokens.shape), f"give 1 context, or {count}: one per candidate")
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(gpt))
        placed = stack.enter_context(corrected(operator, actions))
        contexts, index = distinct_contexts(tokens, count)
        if index is not None:
            stack.enter_context(shared_start(gpt, operator, index))
        # Past `model.hidden`, which training may have compiled: it would not see the hooks.
        hidden = GPT.hidden(gpt, contexts)  # (M, T, D)
    check_used(placed)
    return (hidden[:, -1] if last_only else hidden) @ gpt.unembedding.T


@torch.no_grad()
def batched_generate(
    model: nn.Module,
    operator: Operator,
    actions: Actions,
    prompts: Tensor | Sequence[Sequence[int]],
    steps: int,
    *,
    seed: int = 0,
    streams: Sequence[int] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """What M operated models write, `steps` tokens each, with the same random numbers: (M, steps) int64.

    actions (M, L, r); prompts: M of them, of any lengths, or a tensor (T,) or (1, T), one for all. Row m reads the
    numbers of (seed, streams[m]) as row streams[m] of `generation.generate` does: a candidate that does nothing
    writes what the unoperated model writes. Without `streams`, equal prompts read the same stream, the first of them
    stream 0, the next new one stream 1. One batched pass per token with a KV cache; no end of text ends a row.
    """
    gpt = checked_model(model)
    rows = prompts.reshape(-1, prompts.shape[-1]).tolist() if isinstance(prompts, Tensor) else [*map(list, prompts)]
    count = len(actions)
    rows = rows * count if len(rows) == 1 else rows
    require(len(rows) == count, "prompts", len(rows), f"give 1 prompt, or {count}: one per candidate")
    require(steps >= 1, "steps", steps, "write at least 1 token")
    check_prompts(rows, gpt.vocab_size)
    streams = streams_by_prompt(rows) if streams is None else streams
    require(len(streams) == count, "streams", len(streams), f"give {count}, one per candidate")
    sampling, lengths = Sampling(temperature, top_k, top_p), [len(row) for row in rows]
    draws = torch.zeros(count, max(lengths) + steps, dtype=torch.float64)
    for row, (length, stream) in enumerate(zip(lengths, streams, strict=True)):
        draws[row, : length + steps] = uniform_draws(seed, stream, [length], steps)[0]
    new: list[list[int]] = [[] for _ in rows]
    with evaluating(gpt), corrected(operator, actions) as placed:
        cache = begun(gpt, operator, rows, draws.shape[1])
        for n, picks in columns(gpt, rows, draws, sampling, cache):
            for row, token in enumerate(picks):
                if lengths[row] <= n < lengths[row] + steps:
                    new[row].append(token)
    check_used(placed)
    return torch.tensor(new, device=gpt.wte.weight.device)


def streams_by_prompt(prompts: Sequence[Sequence[int]]) -> list[int]:
    """A number for each prompt, the same for equal ones, in order of appearance."""
    numbers: dict[tuple[int, ...], int] = {}
    return [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts]


def begun(model: GPT, operator: Operator, prompts: Sequence[Sequence[int]], longest: int) -> KVCache:
    """A KV cache for texts of up to `longest` tokens, filled as far as equal prompts can share the work.

    It is no longer than the texts: 32 whole blocks of GPT-2 would take 2.4 GB.
    """
    like = empty_cache(model, 0).store
    config = replace(model.config, block_size=min(longest, model.config.block_size))
    cache = KVCache.empty(config, len(prompts), like.device, like.dtype)
    lengths = {len(prompt) for prompt in prompts}
    if len(lengths) > 1 or not 1 < min(lengths) <= model.config.block_size:
        return cache
    contexts, index = distinct_contexts(torch.tensor(prompts, device=like.device), len(prompts))
    if index is None:
        return cache
    shared = SharedCache(cache.store, index)
    with shared_start(model, operator, index):
        GPT.hidden(model, contexts[:, :-1], shared)  # the last token is left for the first step
    return shared
