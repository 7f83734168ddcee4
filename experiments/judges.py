"""How much every n-gram judge knows: cross-entropy on validation text and, leave-one-out, on its own training text.

    python -m experiments.judges
    python -m experiments.judges --share 0.1        built from the first tenth of the training split alone

Absolute discounting (--critic.kind ngram), the mixed critic (mixed) and the suffix array's (suffix) for several context
lengths; of the mixed critic also its longest expert alone, which is interpolation with three discounts. Writes
results/judges/table.md. A judge that knows more is not yet a better teacher: experiments/compare.py says that.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from avatarl.mixed import MixedCritic
from avatarl.ngram import NgramCritic
from avatarl.suffixes import SuffixCritic
from cli import parse, run_main
from config import DataConfig, require
from data.prepare import prepare
from experiments.arms import ROOT
from experiments.study import stamp
from experiments.tables import machine
from files import write_atomic

Built = TypeVar("Built")
Opinions = Callable[[Tensor, Tensor | None], Tensor]

WINDOW = 4096  # tokens judged at a time, besides the context before them


@dataclass(frozen=True)
class Settings:
    """Judges side by side."""

    corpus: str = "tinyshakespeare"
    """The corpus, by characters."""
    share: float = 1.0
    """Share of the training split, from its start, that the judges are built from."""
    ngram_contexts: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    """Longest contexts of absolute discounting, in characters."""
    mixed_contexts: tuple[int, ...] = (4, 6, 8, 10)
    """Longest contexts of the mixed critic."""
    suffix_contexts: tuple[int, ...] = (4, 8, 16, 32)
    """Longest contexts of the suffix array's critic."""
    out: Path = ROOT / "results" / "judges"
    """Folder of the table."""

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, "share", self.share, "use a share above 0, at most 1")


class Judged(NamedTuple):
    """One row: cross-entropies in nats, accuracy on validation, seconds to build."""

    name: str
    val_ce: float
    accuracy: float
    loo_ce: float
    seconds: float


def windows(tokens: np.ndarray, context: int):  # type: ignore[no-untyped-def]
    """Yields (tokens (1, n), targets (n,), how many of the first are context alone) that cover a text."""
    for start in range(0, len(tokens) - 1, WINDOW):
        begin, stop = max(0, start - context), min(start + WINDOW, len(tokens) - 1)
        yield torch.from_numpy(tokens[None, begin:stop]), torch.from_numpy(tokens[start + 1 : stop + 1]), start - begin


def measure(name: str, opinions: Opinions, train: np.ndarray, val: np.ndarray, context: int, seconds: float) -> Judged:
    """A judge by `opinions(tokens, positions)` → log-probabilities (N, V); on training text every fourth window."""
    nll = hits = count = 0.0
    for tokens, gold, skip in windows(val, context):
        log_p = opinions(tokens, None)[skip:]
        nll -= log_p.gather(1, gold[:, None]).sum().item()
        hits += (log_p.argmax(-1) == gold).sum().item()
        count += len(gold)
    own_nll = own_count = 0.0
    for start in range(context, len(train) - WINDOW - 1, 4 * WINDOW):
        tokens = torch.from_numpy(train[None, start : start + WINDOW])
        log_p = opinions(tokens, torch.tensor([start]))
        gold = torch.from_numpy(train[start + 1 : start + WINDOW + 1])
        own_nll -= log_p.gather(1, gold[:, None])[context:].sum().item()
        own_count += WINDOW - context
    return Judged(name, nll / count, hits / count, own_nll / max(own_count, 1), seconds)


def judged(settings: Settings) -> list[Judged]:
    """Every judge, measured."""
    dataset = prepare(DataConfig(corpus=settings.corpus, tokenizer="char"))
    val, vocab_size = dataset.val.astype(np.int64), dataset.tokenizer.vocab_size
    train = dataset.train[: int(len(dataset.train) * settings.share)].astype(np.int64)
    rows: list[Judged] = []

    def add(name: str, opinions: Opinions, context: int, seconds: float) -> None:
        rows.append(measure(name, opinions, train, val, context, seconds))
        print(rows[-1], flush=True)

    for context in settings.ngram_contexts:
        plain, seconds = timed(NgramCritic, train, vocab_size, context=context)
        add(f"absolute discounting, {context}", partial(whole, plain), context, seconds)
    for context in settings.mixed_contexts:
        mixed, seconds = timed(MixedCritic, train, vocab_size, context=context)
        add(f"three discounts, {context}", partial(longest_expert, mixed), context, seconds)
        add(f"mixed, 0 to {context}", partial(whole, mixed), context, seconds)
    for context in settings.suffix_contexts:
        chain, seconds = timed(SuffixCritic, train, vocab_size, max_context=context)
        add(f"suffix array, up to {context}", partial(whole, chain), context, seconds)
    return rows


def timed(build: Callable[..., Built], *given: Any, **named: Any) -> tuple[Built, float]:
    """What `build` makes of its arguments, and the seconds that it took."""
    begin = time.perf_counter()
    return build(*given, **named), time.perf_counter() - begin


def whole(critic: NgramCritic | MixedCritic | SuffixCritic, tokens: Tensor, positions: Tensor | None) -> Tensor:
    """All log-probabilities (N, V) of a judge."""
    return critic.opinion(tokens, positions).full()


def longest_expert(critic: MixedCritic, tokens: Tensor, positions: Tensor | None) -> Tensor:
    """log p_n (N, V) of the mixed critic's longest context alone."""
    return [log_p for _, log_p, _ in critic.judged_by_each(tokens, positions)][-1]


def main(words: Sequence[str]) -> int:
    """Build, measure, write; returns the exit code."""
    settings = parse(Settings, words, prog="python -m experiments.judges", description=__doc__ or "")
    made = stamp("judges", words)
    rows = judged(settings)
    lines = [
        f"# What n-gram judges know, built from {settings.share:.0%} of the training split",
        "",
        f"`{made['command']}` on {machine(made)}.",
        "",
        "Contexts in characters. Validation: the whole split, contexts running on through it. Leave-one-out: every "
        "fourth stretch of the judge's own training text, each position without its own occurrence. Seconds to build.",
        "",
        "| judge | validation CE, nats | accuracy | leave-one-out CE | seconds |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {r.name} | {r.val_ce:.4f} | {r.accuracy:.1%} | {r.loo_ce:.4f} | {r.seconds:.1f} |" for r in rows]
    name = "table.md" if settings.share == 1 else f"table-{settings.share:g}.md"
    settings.out.mkdir(parents=True, exist_ok=True)
    write_atomic(settings.out / name, "\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    run_main(main)
