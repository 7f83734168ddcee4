"""Batches: which windows of the token stream a step trains on, and how the validation split is covered.

Each epoch cuts the stream into windows of T tokens from a seeded offset and permutes them. Which window a row
of a step sees depends on (seed, step, row) alone: nothing has to be saved, and the global batch is the same
for any number of processes and micro-batches, which take slices of it. Source: DESIGN section 5.
"""

import functools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from config import ConfigError
from data.critic_cache import CriticCache

Job = TypeVar("Job")
Result = TypeVar("Result")


class Batch(NamedTuple):
    """Rows of one step's global batch."""

    tokens: Tensor
    """(B, T) int64."""
    targets: Tensor
    """(B, T) int64: the token after each of `tokens`."""
    positions: Tensor | None
    """(B,) int64: offset of tokens[b, 0] in the training stream."""
    indices: Tensor
    """(B,) int64: index of the row among all rows of the run, step * batch_size + row."""
    judged: tuple[Tensor, Tensor] | None = None
    """What a cached critic thinks: its top ids (B, T, M) int32, best first, and their log-probs, float16."""
    first: int = 0
    """indices[0], which the host may know without asking the device."""


def window_count(length: int, block_size: int) -> int:
    """Windows of `block_size` that an epoch cuts from `length` tokens, each with its last target."""
    return max(1, (length - block_size) // block_size)


class TrainingBatches:
    """The endless sequence of training batches over `tokens` (L,).

    An epoch has `window_count` windows whatever its offset; `fixed_offset` cuts every epoch from 0. A critic's
    `cache` implies that, and every batch then carries what it holds. Raises ConfigError when not even one window
    fits, or for a cache of other windows.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        block_size: int,
        batch_size: int,
        seed: int,
        fixed_offset: bool = False,
        cache: CriticCache | None = None,
    ) -> None:
        if len(tokens) <= block_size:
            raise ConfigError(
                f"model.block-size = {block_size}: {len(tokens)} training tokens are too few for one window "
                f"of {block_size + 1}"
            )
        self.block_size = block_size
        self.batch_size = batch_size
        self.windows_per_epoch = window_count(len(tokens), block_size)
        self.steps_per_epoch = self.windows_per_epoch / batch_size
        self._seed = seed % (1 << 64)
        spare = len(tokens) - self.windows_per_epoch * block_size
        self._offsets = 1 if fixed_offset or cache is not None else min(block_size, spare)
        self._cache = cache
        if cache is not None and (cache.layout.windows, cache.layout.block_size) != (
            self.windows_per_epoch,
            block_size,
        ):
            raise ConfigError(
                f"{cache.folder}: it holds {cache.layout.windows:,} windows of {cache.layout.block_size} tokens, and "
                f"this run has {self.windows_per_epoch:,} of {block_size}; make a cache for this run"
            )
        # Every window as a view: (L - T, T + 1), nothing copied.
        self._windows = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), block_size + 1)
        self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """Rows start..stop of the global batch of `step` (0-based); all of them by default."""
        stop = self.batch_size if stop is None else stop
        if not (step >= 0 and 0 <= start < stop <= self.batch_size):
            raise ValueError(f"no rows {start}..{stop} in step {step} of batches of {self.batch_size}")
        first = step * self.batch_size
        positions = self._positions(first + start, first + stop)
        windows = self._windows[positions]  # (B, T + 1)
        # One block for both: numpy backs blocks of 4 MB with huge pages, and small pages cost more than the copying.
        both = np.empty((2, len(positions), self.block_size), dtype=np.int64)
        both[0], both[1] = windows[:, :-1], windows[:, 1:]
        judged = None
        if self._cache is not None:
            ids, log_probs = self._cache.read(positions)
            judged = torch.from_numpy(ids), torch.from_numpy(log_probs)
        return Batch(
            tokens=torch.from_numpy(both[0]),
            targets=torch.from_numpy(both[1]),
            positions=torch.from_numpy(positions),
            indices=torch.from_numpy(np.arange(first + start, first + stop)),
            judged=judged,
            first=first + start,
        )

    def _positions(self, start: int, stop: int) -> np.ndarray:
        """Stream offsets of the samples start..stop, which may straddle epochs."""
        parts = list[np.ndarray]()
        while start < stop:
            epoch, begin = divmod(start, self.windows_per_epoch)
            parts.append(self._epoch(epoch)[begin : begin + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        """Stream offsets of an epoch's windows in the order of its samples."""
        random = np.random.default_rng((self._seed, epoch))
        offset = random.integers(self._offsets)
        positions = random.permutation(self.windows_per_epoch)  # one long array, changed in place
        positions *= self.block_size
        positions += offset
        return positions


def prefetch(
    batches: TrainingBatches,
    steps: Iterable[int],
    slices: Sequence[tuple[int, int]],
    device: torch.device | str,
) -> Generator[Batch, None, None]:
    """The row slices of every step in turn, on `device`.

    For CUDA one batch is always gathered, pinned and copied ahead by a worker thread, which ends with the
    generator, however soon that is closed.
    """
    device = torch.device(device)
    jobs = ((step, start, stop) for step in steps for start, stop in slices)
    if device.type != "cuda":
        for job in jobs:
            yield _moved(batches.batch(*job), device)
        return
    stream = torch.cuda.current_stream(device)

    def load(job: tuple[int, int, int]) -> Batch:
        # The consumer's stream (and with it the device), so that its kernels wait for the copy.
        with torch.cuda.stream(stream):
            return _moved(batches.batch(*job), device)

    yield from one_ahead(load, jobs)


def one_ahead(load: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
    """`map(load, jobs)` in a worker thread, one job ahead of the consumer; exceptions come through."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as worker:
        ahead: Future[Result] | None = None
        for job in jobs:
            current, ahead = ahead, worker.submit(load, job)
            if current is not None:
                yield current.result()
        if ahead is not None:
            yield ahead.result()


def validation_windows(
    tokens: np.ndarray, block_size: int, batch_size: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's batches of (tokens, targets), (b, T) int64 each, b <= batch_size; padded targets are -1.

    Together the ranks' batches hold every target of the split exactly once: windows of T from 0 on, the last
    one padded. All batches have one shape, and all ranks equally many (some may be padding throughout), so
    that collective calls inside a forward pass match and nothing recompiles.
    """
    tokens = np.asarray(tokens)
    last = len(tokens) - 1
    windows = math.ceil(last / block_size) if last > 0 else 0
    per_rank = math.ceil(windows / (batch_size * world))
    rows = math.ceil(windows / (per_rank * world)) if windows else 0
    for index in range(rank, per_rank * world, world):
        starts = block_size * np.arange(index * rows, (index + 1) * rows)
        at = starts[:, None] + np.arange(block_size)  # (b, T)
        inside = at < last
        inputs = tokens[np.minimum(at, last)].astype(np.int64)
        targets = tokens[np.minimum(at + 1, last)].astype(np.int64)
        yield torch.from_numpy(np.where(inside, inputs, 0)), torch.from_numpy(np.where(inside, targets, -1))


def _moved(batch: Batch, device: torch.device) -> Batch:
    def move(part: Tensor) -> Tensor:
        return part.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else part.to(device)

    positions = None if batch.positions is None else move(batch.positions)
    judged = None if batch.judged is None else (move(batch.judged[0]), move(batch.judged[1]))
    return Batch(move(batch.tokens), move(batch.targets), positions, move(batch.indices), judged, batch.first)
