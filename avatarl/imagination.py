"""Imagined windows: text that the critic writes and judges, learnt from beside the corpus's own.

    imagination = Imagination(critic, train_ids, block_size=64, batch_size=12, steps=2000, seed=1)
    tokens, written, opinion = imagination.windows(batch.first, batch.indices, count=3)     # (3 B, 64) int64 twice

A window of the corpus shows the student one context at each place, and reality speaks there once. A critic of counts
knows what follows contexts that the student has yet to meet: so it continues places of the training text in words of
its own, and the student learns there too. That is Dyna's division of labour (Sutton, 1991): real experience,
and simulated experience from a model of the world, which here is built from the training text in seconds.

Which text stands in a window depends on (seed, row of the run, number of the window) alone: draws are hashes
(contexts.py), so that resumed and divided runs read the same. Windows are written for many steps at a time, since it
goes token by token; what the critic thought while it wrote is its judgement, from contexts that reach back before the
window. Shapes: B rows of a batch, T positions, C tokens of context, N contexts, V vocabulary.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from avatarl.contexts import keyed_uniform
from avatarl.critics import CriticOpinion, DenseOpinion
from checks import require

# Windows written at a time, and log-probabilities of float16 that are kept for them, at most: on a CPU more are hardly
# cheaper; a GPU spends its time on starting small kernels, token by token, whatever the number of windows.
WINDOWS = {"cpu": 2**11, "cuda": 2**14}
ENTRIES = {"cpu": 2**24, "cuda": 2**28}
MAX_VOCABULARY = 4096  # all log-probabilities of every position are kept until they are read
TEXT, START = 2, 3  # streams of draws; 0 and 1 are those of contexts.py


class FullOpinion(CriticOpinion, Protocol):
    """An opinion that can list the whole vocabulary."""

    def full(self) -> Tensor:
        """All log-probabilities: (N, V)."""


@runtime_checkable
class Writer(Protocol):
    """A critic that can be asked about contexts alone, and so can write."""

    vocab_size: int

    @property
    def reach(self) -> int:
        """The longest context that it uses, at least 1."""

    def after(self, context: Tensor) -> FullOpinion:
        """What follows each of contexts (N, C), nothing left out of the counts."""


class Imagined(NamedTuple):
    """Windows of imagined text, and what their writer thought of every position."""

    tokens: Tensor
    """(n, T) int64."""
    written: Tensor
    """(n, T) int64: the token after each of `tokens`."""
    opinion: DenseOpinion
    """At the n · T positions, in row-major order."""


def written_at_once(block_size: int, vocab_size: int, device: str = "cpu") -> int:
    """How many windows of `block_size` tokens are written together, about, on a device of this type."""
    windows, entries = (limit.get(device, limit["cpu"]) for limit in (WINDOWS, ENTRIES))
    return min(windows, entries // (block_size * vocab_size))


class Imagination:
    """Windows of `block_size` tokens for every row of a run of `steps` batches of `batch_size`, in the writer's words.

    text (L,) is the training stream, of which every window continues a drawn place: its first token, too, is imagined.
    Raises ConfigError for a vocabulary of more than MAX_VOCABULARY tokens.
    """

    def __init__(
        self, writer: Writer, text: np.ndarray, *, block_size: int, batch_size: int, steps: int, seed: int
    ) -> None:
        fix = f"the writer's vocabulary has {writer.vocab_size:,} tokens, and {MAX_VOCABULARY:,} is the limit; use 0"
        require(writer.vocab_size <= MAX_VOCABULARY, "method.imagined-windows", "more than 0", fix)
        self._writer, self._text = writer, text
        self._block_size, self._batch_size, self._rows, self._seed = block_size, batch_size, batch_size * steps, seed
        self.at_once: int | None = None  # windows; None: what suits the device
        self._ready: dict[int, tuple[Tensor, Tensor]] = {}  # of rows, by the index of the first: as `_write` returns

    def windows(self, first: int, indices: Tensor, count: int, length: int | None = None) -> Imagined:
        """`count` windows for each of the rows `indices` (B,) in turn, which count up from `first`: n = count · B.

        Those of the same rows in later steps are written with them. `length`: only that many positions of each.
        """
        rows = len(indices)
        ready = self._ready.get(first)
        if ready is None or len(ready[0]) < rows or ready[0].shape[1] < count:
            ready = self._write_ahead(indices, first, count)
        text, log_probs = (part[:rows, :count].flatten(0, 1) for part in ready)
        here = slice(0, length or self._block_size)
        opinion = DenseOpinion(log_probs[:, here].flatten(0, 1).float())
        return Imagined(text[:, :-1][:, here], text[:, 1:][:, here], opinion)

    def write_anew(self, first: int, indices: Tensor, count: int) -> int:
        """As if nothing lay ready: write for these rows; returns for how many steps."""
        self._ready.clear()
        self._write_ahead(indices, first, count)
        return len(self._ready)

    def _write_ahead(self, indices: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Write for these rows in this step and the next ones, and forget what is past; what this step reads."""
        self._ready = {index: found for index, found in self._ready.items() if index > first - self._batch_size}
        most = written_at_once(self._block_size, self._writer.vocab_size, indices.device.type)
        most = min(self.at_once or most, most)
        starts = range(first, max(self._rows, first + 1), self._batch_size)[: max(1, most // (len(indices) * count))]
        later = torch.arange(len(starts), device=indices.device)[:, None] * self._batch_size
        parts = self._write((later + indices).flatten(), count)
        divided = zip(*(part.split(len(indices)) for part in parts), strict=True)
        self._ready.update(zip(starts, divided, strict=True))
        return self._ready[first]

    @torch.no_grad()
    def _write(self, indices: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """`count` windows for each of the rows `indices` (n,), (n, count, T + 1), and the log-probabilities that
        stood behind every token but the first: (n, count, T, V) float16."""
        length, reach = self._block_size + 1, min(self._writer.reach, len(self._text))
        start = [keyed_uniform(self._seed, j, indices, 1, START) for j in range(count)]
        uniform = torch.cat([keyed_uniform(self._seed, j, indices, length, TEXT) for j in range(count)])  # (N, T + 1)
        place = (torch.cat(start).double() * (len(self._text) - reach + 1)).long().cpu().numpy()  # (N, 1)
        before = torch.from_numpy(self._text[place + np.arange(reach)].astype(np.int64)).to(indices.device)
        text = torch.cat((before, torch.empty_like(uniform, dtype=torch.int64)), 1)
        thought = uniform.new_empty((len(text), self._block_size, self._writer.vocab_size), dtype=torch.float16)
        for t in range(length):
            log_p = self._writer.after(text[:, t : t + reach]).full()  # (N, V)
            ladder = log_p.exp().cumsum(-1)
            drawn = (ladder <= uniform[:, t, None] * ladder[:, -1:]).sum(-1)
            text[:, t + reach] = drawn.clamp_max(self._writer.vocab_size - 1)
            if t:
                thought[:, t - 1] = log_p
        shape = (count, len(indices))
        return text[:, reach:].unflatten(0, shape).transpose(0, 1), thought.unflatten(0, shape).transpose(0, 1)
