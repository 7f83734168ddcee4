"""The curriculum: five stages of what there is to know about a text, each a reward for every action at once.

    statistics = StageStatistics.build(train_ids, characters)
    stage_rewards("words", statistics, tokens)                  # tokens (B, T) -> (B, T, V)
    curriculum = Curriculum(statistics, ["frequencies", "bigrams", "words"])
    reward = curriculum.rewards(tokens); …; curriculum.observe(mean_expected_reward)

A stage is a way to look at the text before a position: its *state*. The reward of an action is the share of the
corpus's positions in that state that the action followed,

    r(a) = count(state, a) / count(state),

so that a stage's rewards lie in [0, 1] and sum to 1, and a policy whose weights are free of π ends at what the stage
knows, and no further. What the stages see:

    frequencies   nothing: −Σ r log π is then KL(corpus ‖ π) but for a constant
    bigrams       the last character
    words         the current word so far, or the character between two words
    punctuation   the last character; whether a sentence has ended; the word's case; how the line began
    patterns      a heading (a speaker's name) so far; else the last character, the line's column and its syllables

(patterns.py). What is not in sight is part of the state, so that the text is counted twice: as one long row, and in
short windows. States of `punctuation` and `patterns` are blended with bigrams, (c + U · bigram) / (C + U) with U
different actions among C (Witten and Bell, 1991); rare or unseen ones are bigrams. A word that the corpus doesn't have
earns nothing, whatever follows. A position's own occurrence is not left out.

Shapes: B rows of T tokens, V vocabulary, S states of a stage.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from avatarl.ngram_counts import Stream, checked_text
from avatarl.ngram_index import KeyIndex
from bootstrap.ngrams import NgramTables
from bootstrap.patterns import Alphabet, pattern_states, punctuation_states, word_states
from checks import require

STAGES = ("frequencies", "bigrams", "words", "punctuation", "patterns")
WINDOW = 8  # characters of the short windows that the text is counted in
LEAST_SEEN = 4  # a state that is blended with bigrams was seen so often: else a position would mostly see itself
TABLE_ENTRIES = 2**26  # rewards of one stage: 256 MB at most; the rarest states go first

SEEN_BY: dict[str, Callable[[Tensor, Alphabet], Tensor]] = {
    "words": word_states,
    "punctuation": punctuation_states,
    "patterns": pattern_states,
}


def check_stages(names: Sequence[str]) -> None:
    """Raise ConfigError unless `names` are stages, one at least and each once."""
    require(len(names) > 0, "bootstrap.stages", "", f"name one or more of {', '.join(STAGES)}")
    for name in names:
        nearest = difflib.get_close_matches(name, STAGES, n=1, cutoff=0.0)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        require(name in STAGES, "bootstrap.stages", name, f"no such stage; {hint}There are {', '.join(STAGES)}")
        require(list(names).count(name) == 1, "bootstrap.stages", ",".join(names), f"{name} is named twice")


@dataclass(frozen=True)
class StageTable:
    """The rewards of a stage that has states of its own."""

    states: KeyIndex
    rewards: Tensor  # (S + V, V) float32: a row a state; then for unseen states, a row for each last token

    @staticmethod
    def build(
        keys: np.ndarray, last: np.ndarray, following: np.ndarray, bigrams: np.ndarray, blend: bool
    ) -> "StageTable":
        """Count what follows the states `keys` (n,), whose last tokens are `last` (n,).

        bigrams (V, V): with `blend`, what states are blended with and unseen ones get; else they get nothing.
        """
        vocab_size = len(bigrams)
        states = np.unique(keys)
        number = np.searchsorted(states, keys)
        seen = np.bincount(number)
        kept = np.flatnonzero(seen >= (LEAST_SEEN if blend else 1))
        kept = np.sort(kept[np.argsort(-seen[kept], kind="stable")[: TABLE_ENTRIES // vocab_size]])
        row = np.full(len(states), -1)
        row[kept] = np.arange(len(kept))
        row = row[number]
        cell = (row * vocab_size + following)[row >= 0]
        counts = np.bincount(cell, minlength=len(kept) * vocab_size).reshape(-1, vocab_size).astype(np.float32)
        total = counts.sum(1, keepdims=True)
        rewards = np.zeros((len(kept) + vocab_size, vocab_size), np.float32)
        if blend:
            last_of = np.empty(len(states), np.int64)
            last_of[number] = last
            kinds = (counts > 0).sum(1, keepdims=True, dtype=np.float32)
            rewards[: len(kept)] = (counts + kinds * bigrams[last_of[kept]]) / (total + kinds)
            rewards[len(kept) :] = bigrams
        else:
            rewards[: len(kept)] = counts / total
        return StageTable(KeyIndex.build(states[kept]), torch.from_numpy(rewards))

    def to(self, device: torch.device | str) -> "StageTable":
        """The same on `device`."""
        return StageTable(self.states.to(device), self.rewards.to(device))

    def look_up(self, keys: Tensor, tokens: Tensor) -> Tensor:
        """The rewards after states `keys` (B, T), whose last tokens are `tokens` (B, T): (B, T, V)."""
        place, found = self.states.find(keys)
        unseen = len(self.rewards) - self.rewards.shape[1]
        rows = torch.where(found, place.long(), unseen + tokens)
        return self.rewards.index_select(0, rows.flatten()).view(*tokens.shape, -1)


@dataclass(frozen=True)
class StageStatistics:
    """What all stages know of a text (DESIGN section 8, Curriculum)."""

    alphabet: Alphabet
    tables: NgramTables
    stages: dict[str, StageTable]

    @staticmethod
    def build(tokens: Stream, characters: Sequence[str], stages: Sequence[str] = STAGES) -> "StageStatistics":
        """Count a text (L,) of tokens, each of which stands for one of `characters` (V), for these stages.

        Some seconds for a million characters. Raises ConfigError for tokens that are not single characters and
        for a text with nothing to learn.
        """
        alphabet, vocab_size = Alphabet.build(characters), len(characters)
        ids = checked_text(tokens, vocab_size, 0.5, least=2)
        tables = NgramTables.build(ids, vocab_size, 1)
        bigrams = tables.table[1:].numpy()
        stream, rows = torch.from_numpy(ids), (len(ids) - 1) // WINDOW
        whole, cut = stream[None, :-1], stream[: rows * WINDOW].view(rows, WINDOW)
        last = np.concatenate([ids[:-1], ids[: rows * WINDOW]])
        following = np.concatenate([ids[1:], ids[1 : rows * WINDOW + 1]])
        tables_of = {}
        for name in filter(SEEN_BY.__contains__, stages):
            states = SEEN_BY[name]
            keys = torch.cat([states(part, alphabet).flatten() for part in (whole, cut)]).numpy()
            tables_of[name] = StageTable.build(keys, last, following, bigrams, blend=name != "words")
        return StageStatistics(alphabet, tables, tables_of)

    @property
    def frequencies(self) -> Tensor:
        """How often each character occurs, as shares: (V,)."""
        return self.tables.table[0]

    def to(self, device: torch.device | str) -> "StageStatistics":
        """The same on `device`."""
        alphabet = Alphabet(*(kind.to(device) for kind in self.alphabet))
        stages = {name: table.to(device) for name, table in self.stages.items()}
        return StageStatistics(alphabet, self.tables.to(device), stages)


def stage_rewards(stage: str, statistics: StageStatistics, tokens: Tensor, average: Tensor | None = None) -> Tensor:
    """The rewards of every action after each of tokens (B, T), which is all that is in sight: (B, T, V) in [0, 1].

    `average` (V,), the policy's mean distribution over the batch, changes `frequencies` for losses whose weights are
    π's own: the corpus's share is then u / (u + average), a logistic of the derivative of −KL(average ‖ u), which is
    1/2 for what occurs as often as it should.
    """
    if stage == "frequencies":
        share = statistics.frequencies
        share = share if average is None else share / (share + average)
        return share.expand(*tokens.shape, -1)
    if stage == "bigrams":
        return statistics.tables.for_sequence(tokens, 1)
    return statistics.stages[stage].look_up(SEEN_BY[stage](tokens, statistics.alphabet), tokens)


def frequency_kl(log_pi: Tensor, statistics: StageStatistics) -> Tensor:
    """KL of the policy's mean distribution over decisions to the corpus's frequencies, nats: log π (N, V) → 0-d."""
    average = log_pi.exp().mean(0)
    return (torch.special.xlogy(average, average) - average * statistics.frequencies.log()).sum()


class Curriculum(nn.Module):
    """Stages in order, each kept until its reward no longer rises (DESIGN section 8, Curriculum).

    Rewards accumulate: a stage that is over counts on, `carry` times as much with every stage after it; all weights
    sum to 1. carry = 0 replaces. A stage ends when the mean of what is `observe`d over the last `window` steps exceeds
    that over as many before by less than `tolerance` times it; after `min_steps` at least, `max_steps` at most. The
    last one stays. Where it stands are buffers, on the CPU, of what it observed on the statistics' device: they travel
    in a checkpoint. Raises ConfigError for unknown stages and bounds that cannot be kept.
    """

    progress: Tensor
    """(2,) int64, on the CPU: the present stage, and the steps in it."""
    history: Tensor
    """(2 · window,) float32: what was observed in them, step after step, over and over."""

    def __init__(
        self,
        statistics: StageStatistics,
        stages: Sequence[str],
        *,
        window: int = 50,
        tolerance: float = 0.01,
        min_steps: int = 100,
        max_steps: int = 400,
        carry: float = 0.5,
    ) -> None:
        super().__init__()
        check_stages(stages)
        require(window >= 1, "bootstrap.stage-window", window, "use a positive number of steps")
        fix = f"use at most bootstrap.stage-max-steps = {max_steps}"
        require(min_steps <= max_steps, "bootstrap.stage-min-steps", min_steps, fix)
        require(0 <= carry <= 1, "carry of the curriculum", carry, "use a factor from 0 to 1")
        self.statistics, self.stages = statistics, tuple(stages)
        self.window, self.tolerance, self.carry = window, tolerance, carry
        self.min_steps, self.max_steps = min_steps, max_steps
        device = statistics.frequencies.device
        self.register_buffer("progress", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("history", torch.zeros(2 * window, device=device))

    def _apply(self, fn: Any, recurse: bool = True) -> "Curriculum":
        """Moves as any module does, with what the stages know; the counters stay, as the host reads them every step."""
        super()._apply(fn, recurse)
        self.progress, self.statistics = self.progress.cpu(), self.statistics.to(self.history.device)
        return self

    @property
    def stage(self) -> Tensor:
        """The number of the present stage, from 0: 0-d int64 on the statistics' device."""
        return self.progress[0].to(self.history.device)

    @property
    def current(self) -> str:
        """The name of the present stage."""
        return self.stages[int(self.progress[0])]

    def weights(self) -> dict[str, float]:
        """What every stage so far counts; they sum to 1."""
        present = int(self.progress[0])
        raw = [self.carry ** (present - i) for i in range(present + 1)]
        return {name: weight / sum(raw) for name, weight in zip(self.stages, raw, strict=False) if weight}

    def rewards(self, tokens: Tensor, average: Tensor | None = None) -> Tensor:
        """The weighted rewards of the stages so far: tokens (B, T) → (B, T, V) in [0, 1]; see stage_rewards."""
        parts = [w * stage_rewards(name, self.statistics, tokens, average) for name, w in self.weights().items()]
        return torch.stack(parts).sum(0)

    def own_rewards(self, tokens: Tensor, average: Tensor | None = None) -> Tensor:
        """The rewards of the present stage alone, whose mean is what to `observe`: (B, T) → (B, T, V)."""
        return stage_rewards(self.current, self.statistics, tokens, average)

    def observe(self, reward: Tensor | float) -> bool:
        """Take in a step's mean expected reward, equal on all processes; whether the next stage has begun with it.

        The host waits for a device once every `window` steps.
        """
        stage, steps = self.progress.tolist()
        self.history[steps % (2 * self.window)] = reward
        steps += 1
        over = stage + 1 < len(self.stages) and (steps >= self.max_steps or self._flat(steps))
        self.progress.copy_(torch.tensor([stage + 1, 0] if over else [stage, steps]))
        return over

    def _flat(self, steps: int) -> bool:
        """Whether the reward has stopped to rise after `steps` steps of the stage; looked at once a window."""
        if steps % self.window or steps < max(self.min_steps, 2 * self.window):
            return False
        halves = self.history.view(2, self.window).mean(1).tolist()
        recent = (steps // self.window - 1) % 2
        return halves[recent] - halves[1 - recent] < self.tolerance * abs(halves[1 - recent])
