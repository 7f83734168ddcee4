"""What each kind of context looks at, and the mixed critic's formula, by going through a text token by token."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from avatarl import mixed, mixed_contexts
from avatarl.mixed import MixedCritic


def looked_at(history: Sequence[int], longest: int, strings: Sequence[str], reach: int) -> list[Any]:
    """What every kind of context sees of `history`, comparable; None where a context cannot be told."""
    seen = list(history[-reach:])
    views: list[Any] = [tuple(seen[-n:]) for n in range(1, longest + 1)]
    views.append(tuple(seen[-5:-1]))
    if not strings:
        return views
    if any(len(s) != 1 for s in strings):
        begin = last_begin(seen, strings, len(seen))
        return [*views, tuple(seen[begin:]), tuple(seen[last_begin(seen, strings, begin) :])]
    text, pair = [strings[i] for i in seen], tuple(seen[-2:])
    word, rest = split_word(text)
    one, rest = split_word(drop_gap(rest))
    two, _ = split_word(drop_gap(rest))
    current: Any = word or pair
    views += [current, (current, one), (current, one, two), (current, "-", two)]
    since = len(text) - 1 - max(i for i, c in enumerate(text) if c == "\n") if "\n" in text else None
    longest_line = (mixed_contexts.REACH - mixed_contexts.LINE_STEP) // mixed_contexts.LINE_STEP
    if since is None:
        views.append((longest_line, pair) if len(text) == reach else None)
    else:
        views.append((min(since // mixed_contexts.LINE_STEP, longest_line), pair))
    return views


def last_begin(seen: list[int], strings: Sequence[str], stop: int) -> int:
    """Where the last word begins that begins before `stop`, or the text itself."""
    begins = [i for i in range(stop) if not strings[seen[i]][:1].isalpha()]
    return begins[-1] if begins else 0


def split_word(text: list[str]) -> tuple[str, list[str]]:
    """The letters that the text ends with, in small letters, and what stands before them."""
    start = len(text)
    while start and (text[start - 1].isalpha() or text[start - 1] in "'’"):
        start -= 1
    return "".join(text[start:]).lower(), text[:start]


def drop_gap(text: list[str]) -> list[str]:
    """The text up to its last letter."""
    while text and not (text[-1].isalpha() or text[-1] in "'’"):
        text = text[:-1]
    return text


class Oracle:
    """Counts of every context of a corpus, all but those of the places in `without`."""

    def __init__(self, critic: MixedCritic, corpus: list[int], strings: Sequence[str]) -> None:
        self.critic, self.corpus, self.strings = critic, corpus, strings
        self.views = [self.of(corpus[:i]) for i in range(1, len(corpus))]  # of what stands before place 1, 2, …

    def of(self, history: Sequence[int]) -> list[Any]:
        return looked_at(history, self.critic.contexts.longest, self.strings, self.critic.reach)

    def experts(self, views: list[Any], without: range = range(0)) -> tuple[Tensor, Tensor]:
        """log p_j (J, V) and what is known of the contexts (2 J,)."""
        found: list[list[float]] = []
        totals, kinds = [], []
        share = Counter(self.corpus)
        vocab_size = self.critic.vocab_size
        unigram = [(share[w] + 1) / (len(self.corpus) + vocab_size) for w in range(vocab_size)]
        for j, (view, shorter) in enumerate(zip(views, self.critic.contexts.fallbacks, strict=True)):
            counts: Counter[int] = Counter()
            if view is not None:
                after = enumerate(self.views, 1)
                counts.update(self.corpus[i] for i, own in after if own[j] == view and i not in without)
            total, base = sum(counts.values()), found[shorter] if shorter >= 0 else unigram
            spread = mixed.BACKOFF * len(counts)
            p = [(counts[w] + spread * base[w]) / (total + spread) if total else base[w] for w in range(vocab_size)]
            found.append(p)
            totals.append(math.log1p(total))
            kinds.append(math.log1p(len(counts)))
        return torch.tensor(found).log(), torch.tensor([*totals, *kinds])

    def log_probs(self, history: Sequence[int], left_out: int | None = None) -> Tensor:
        """What the critic should think after `history`: (V,)."""
        log_p, known = self.experts(self.of(history), range(left_out, left_out + 1) if left_out else range(0))
        return self.critic.weigher.scores(log_p[:, None], known[None])[0].log_softmax(-1)
