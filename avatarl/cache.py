"""Cached critics: asked once about every training window, then read from disk (DESIGN section 3, Critics).

    write_cache(CacheWriter(folder, layout, identity), lambda: critic, tokens, device)
    opinion = CachedCritic(CriticCache(folder, layout, identity), device).opinion(tokens, positions)

A training step needs no lookup at all: TrainingBatches sends the cached rows along with the batch, so that they
are pinned and copied ahead like the tokens. Shapes: B windows, T positions, N = B·T, M tokens that are kept.
"""

from collections.abc import Callable
from functools import cache, cached_property, partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from avatarl.critics import Critic
from data.critic_cache import CacheLayout, CacheWriter, CriticCache

# The least probability of a token that is not kept: its logarithm must be finite. The method sees 1e-9 for less.
LEAST = 1e-12
# Up to so many log-probabilities (N·V) a dense row a position beats a search: 0.1 against 1.9 ms for 1,024
# positions at V = 1,024, but 36 against 0.6 ms for 333 at V = 50,304 (one core, k = 16).
DENSE_ENTRIES = 2**22
# What a pass asks for at a time: positions of one forward pass, and log-probabilities of one chunk of it.
PASS_POSITIONS = 2**14
CHUNK_ENTRIES = 2**23

Turn = Callable[[Callable[[], object]], object]


class CachedOpinion:
    """What a cache holds of N positions, as a CriticOpinion: ids (N, M) integer, best first, log_probs (N, M).

    The mass that the M tokens leave is spread evenly over the other V − M. Nothing here waits for the device.
    """

    def __init__(self, ids: Tensor, log_probs: Tensor, vocab_size: int) -> None:
        self._ids, self._log_probs, self._vocab_size = ids, log_probs, vocab_size

    def rows(self, start: int, stop: int) -> "CachedOpinion":
        return CachedOpinion(self._ids[start:stop], self._log_probs[start:stop], self._vocab_size)

    def top_ids(self, k: int) -> Tensor:
        """The k likeliest tokens, best first: (N, k) int64. Raises ValueError for more than are kept."""
        if k > self._ids.shape[1]:
            raise ValueError(f"the cache keeps {self._ids.shape[1]} tokens a position, not {k}")
        return self._ids[:, :k].long()

    def log_probs(self, ids: Tensor) -> Tensor:
        """Log-probabilities over the full vocabulary of ids (N, K), as (N, K) float32."""
        if len(self._ids) * self._vocab_size <= DENSE_ENTRIES:
            return self._dense.gather(1, ids)
        kept, order = self._sorted
        ids = ids.to(kept.dtype)
        place = torch.searchsorted(kept, ids).clamp_max_(kept.shape[1] - 1)  # (N, K)
        found = kept.gather(1, place) == ids
        return torch.where(found, self._kept.gather(1, order.gather(1, place)), self._tail)

    @cached_property
    def _kept(self) -> Tensor:
        return self._log_probs.float()  # (N, M)

    @cached_property
    def _tail(self) -> Tensor:
        """Log-probability of each token that is not kept: (N, 1)."""
        others = max(1, self._vocab_size - self._ids.shape[1])
        left = 1 - self._kept.exp().sum(-1, keepdim=True)
        return left.div_(others).clamp_min_(LEAST).log_()

    @cached_property
    def _dense(self) -> Tensor:
        """(N, V)."""
        return self._tail.repeat(1, self._vocab_size).scatter_(1, self._ids.long(), self._kept)

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        """The kept ids of every position in rising order, and where each stands in the cache: (N, M)."""
        return self._ids.sort(-1)


class CachedCritic:
    """Judges training windows by a cache, which it reads on the host at every call."""

    def __init__(self, cache: CriticCache, device: torch.device | str = "cpu") -> None:
        self.cache, self._device = cache, device

    def opinion(self, tokens: Tensor, positions: Tensor | None) -> CachedOpinion:
        """The opinion on the windows at positions (B,). Raises ValueError without, or for windows not cached."""
        if positions is None or tokens.shape[1] != self.cache.layout.block_size:
            raise ValueError(f"a cached critic judges training windows of {self.cache.layout.block_size} tokens alone")
        ids, log_probs = (torch.from_numpy(a).to(self._device) for a in self.cache.read(positions.cpu().numpy()))
        return CachedOpinion(ids.flatten(0, 1), log_probs.flatten(0, 1), self.cache.layout.vocab_size)


def write_cache(
    writer: CacheWriter,
    critic: Callable[[], Critic],
    tokens: np.ndarray,
    device: torch.device | str = "cpu",
    *,
    turn: Turn = lambda work: work(),
    quiet: bool = False,
) -> None:
    """Complete a cache over the training stream `tokens` (L,): begin, then every part that is missing or broken.

    `critic()` is called when the first such part comes, so never for a cache that is whole. `turn` is handed the
    beginning and every part in order: under torchrun it lets the first process work while the others wait, part
    by part, so that no wait gets long. Raises what `CacheWriter` raises.
    """
    turn(writer.begin)
    asked = cache(critic)

    def complete(part: int) -> None:
        if not writer.holds(part):
            writer.write(part, *judge_windows(asked(), tokens, writer.layout, writer.layout.parts[part], device))

    parts = writer.layout.parts
    with tqdm(total=writer.layout.windows, unit="window", desc="critic cache", delay=2, disable=quiet or None) as bar:
        for part, windows in enumerate(parts):
            turn(partial(complete, part))
            bar.update(len(windows))


@torch.inference_mode()
def judge_windows(
    critic: Critic, tokens: np.ndarray, layout: CacheLayout, windows: range, device: torch.device | str
) -> tuple[np.ndarray, np.ndarray]:
    """What `critic` thinks of a range of windows of tokens (L,): its top ids (w, T, M), float16 log-probs."""
    length, lowest = layout.block_size, torch.finfo(torch.float16).min
    rows, chunk = max(1, PASS_POSITIONS // length), max(1, CHUNK_ENTRIES // layout.vocab_size)
    found: list[tuple[Tensor, Tensor]] = []
    for start in range(windows.start, windows.stop, rows):
        stop = min(start + rows, windows.stop)
        stream = torch.from_numpy(tokens[start * length : stop * length].astype(np.int64))
        opinion = critic.opinion(
            stream.view(-1, length).to(device), torch.arange(start * length, stop * length, length, device=device)
        )
        for first in range(0, len(stream), chunk):
            part = opinion.rows(first, min(first + chunk, len(stream)))
            ids = part.top_ids(layout.top)  # (n, M)
            log_probs = part.log_probs(ids).float().clamp_min(lowest)  # finite in float16 too
            found.append((ids.int().cpu(), log_probs.half().cpu()))
    shape = (len(windows), length, layout.top)
    all_ids, all_log_probs = (torch.cat(parts).view(shape).numpy() for parts in zip(*found, strict=True))
    return all_ids, all_log_probs
