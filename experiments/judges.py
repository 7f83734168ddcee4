"""How much every n-gram judge knows: cross-entropy on validation text and, leave-one-out, on its own training text.

    python -m experiments.judges
    python -m experiments.judges --share 0.1        built from the first tenth of the training split alone
    python -m experiments.judges --tokenizer bpe --corpus TRAIN.txt --val-corpus VALID.txt

Absolute discounting (--critic.kind ngram), the mixed critic (mixed) and the suffix array's (suffix) for several context
lengths; the mixed critic with and without words and lines, where tokens are characters. Then where they are too sure
of themselves: the trust that --method.critic-trust known gives them (avatarl/trust.py). Writes results/judges/table.md.
A judge that knows more is not yet a better teacher: experiments/compare.py says that.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from avatarl.mixed import MAX_VOCABULARY, MixedCritic
from avatarl.ngram import NgramCritic
from avatarl.suffixes import SuffixCritic
from avatarl.trust import BUCKETS, FEWEST, Trust, fit_trust
from cli import parse, run_main
from config import DataConfig, require
from data.prepare import Dataset, prepare_real
from experiments.arms import ROOT
from experiments.study import stamp
from experiments.tables import machine
from files import write_atomic

Built = TypeVar("Built")
Counting = NgramCritic | MixedCritic | SuffixCritic

WINDOW = 4096  # tokens of a stretch, besides the context before them
ENTRIES = 2**24  # log-probabilities made at a time: a stretch is shorter for large vocabularies
TRUST_WINDOW = 64  # the protocol's: a longer one would hardly show how a window begins, with short contexts


@dataclass(frozen=True)
class Settings:
    """Judges side by side."""

    corpus: str = "tinyshakespeare"
    """The corpus: a name, or a path."""
    val_corpus: str | None = None
    """Validate on all of this corpus instead of on the last tenth of `corpus`."""
    tokenizer: Literal["char", "bpe", "gpt2"] = "char"
    """Tokens, as in --data.tokenizer. The mixed critic stops at a vocabulary of 4,096."""
    share: float = 1.0
    """Share of the training split, from its start, that the judges are built from."""
    val_tokens: int = 0
    """Judge the first so many validation tokens; 0: all."""
    ngram_contexts: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    """Longest contexts of absolute discounting, in tokens."""
    mixed_contexts: tuple[int, ...] = (4, 6, 8)
    """Longest contexts of the mixed critic."""
    suffix_contexts: tuple[int, ...] = (4, 8, 16, 32)
    """Longest contexts of the suffix array's critic."""
    out: Path = ROOT / "results" / "judges"
    """Folder of the table."""

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, "share", self.share, "use a share above 0, at most 1")
        positive = self.val_tokens == 0 or self.val_tokens > 1
        require(positive, "val-tokens", self.val_tokens, "use 0 (all) or at least 2")


class Judged(NamedTuple):
    """One row: cross-entropies in nats, accuracy and overconfidence on validation, seconds to build."""

    name: str
    val_ce: float
    accuracy: float
    sure: float
    """Mean probability of the likeliest token, minus how often it was right: below 0 the judge is too modest."""
    loo_ce: float
    seconds: float
    trust: Trust
    """Where it is too sure of itself."""


def windows(tokens: np.ndarray, context: int, size: int):  # type: ignore[no-untyped-def]
    """Yields (tokens (1, n), targets (n,), how many of the first are context alone) that cover a text."""
    for start in range(0, len(tokens) - 1, size):
        begin, stop = max(0, start - context), min(start + size, len(tokens) - 1)
        yield torch.from_numpy(tokens[None, begin:stop]), torch.from_numpy(tokens[start + 1 : stop + 1]), start - begin


def measure(
    name: str, critic: Counting, train: np.ndarray, val: np.ndarray, context: int, seconds: float, size: int = WINDOW
) -> Judged:
    """What a judge knows, `size` tokens at a time; on training text every fourth stretch."""

    def opinions(tokens: Tensor, positions: Tensor | None) -> Tensor:
        return critic.opinion(tokens, positions).full()  # (N, V)

    nll = hits = sure = count = 0.0
    for tokens, gold, skip in windows(val, context, size):
        log_p = opinions(tokens, None)[skip:]
        nll -= log_p.gather(1, gold[:, None]).sum().item()
        hits += (log_p.argmax(-1) == gold).sum().item()
        sure += log_p.amax(-1).exp().sum().item()
        count += len(gold)
    own_nll = own_count = 0.0
    for start in range(context, len(train) - size - 1, 4 * size):
        tokens = torch.from_numpy(train[None, start : start + size])
        log_p = opinions(tokens, torch.tensor([start]))
        gold = torch.from_numpy(train[start + 1 : start + size + 1])
        own_nll -= log_p.gather(1, gold[:, None])[context:].sum().item()
        own_count += size - context
    trust = fit_trust(critic, train, critic.vocab_size, TRUST_WINDOW)
    return Judged(name, nll / count, hits / count, (sure - hits) / count, own_nll / max(own_count, 1), seconds, trust)


def judged(settings: Settings, dataset: Dataset) -> list[Judged]:
    """Every judge, measured."""
    vocab_size = dataset.tokenizer.vocab_size
    val = dataset.val[: settings.val_tokens or None].astype(np.int64)
    size = min(WINDOW, ENTRIES // vocab_size)
    train = dataset.train[: int(len(dataset.train) * settings.share)].astype(np.int64)
    rows: list[Judged] = []

    def add(name: str, critic: Counting, context: int, seconds: float) -> None:
        row = measure(name, critic, train, val, context, seconds, size)
        rows.append(row)
        print(f"{name}: validation CE {row.val_ce:.4f}, leave-one-out {row.loo_ce:.4f}", flush=True)

    for context in settings.ngram_contexts:
        plain, seconds = timed(NgramCritic, train, vocab_size, context=context)
        add(f"absolute discounting, {context}", plain, context, seconds)
    for context in settings.mixed_contexts if vocab_size <= MAX_VOCABULARY else ():
        more = "tokens and words" if dataset.characters is None else "tokens, words and lines"
        for kinds, strings in (("tokens", []), (more, dataset.strings)):
            if strings or kinds == "tokens":
                mixed, seconds = timed(MixedCritic, train, vocab_size, context=context, strings=strings)
                add(f"mixed, up to {context} {kinds}", mixed, mixed.reach, seconds)
    for context in settings.suffix_contexts:
        chain, seconds = timed(SuffixCritic, train, vocab_size, max_context=context)
        add(f"suffix array, up to {context}", chain, context, seconds)
    return rows


def timed(build: Callable[..., Built], *given: Any, **named: Any) -> tuple[Built, float]:
    """What `build` makes of its arguments, and the seconds that it took."""
    begin = time.perf_counter()
    return build(*given, **named), time.perf_counter() - begin


def trusts(rows: Sequence[Judged]) -> list[str]:
    """Which exponent predicts the training text best, by what a judge knows about itself: in Markdown."""
    counted, mixed = ([r for r in rows if r.name.startswith("mixed") is m] for m in (False, True))
    seen = ["1", "2", *(f"{2 ** (i - 1) + 1:,}" for i in range(2, BUCKETS))]
    sure = [f"{i / BUCKETS:.0%}" for i in range(BUCKETS)]
    lines = [
        "## Where they are too sure",
        "",
        "The exponent up to 1 that, leave-one-out, makes a judge predict its training text best: 1 says "
        "that nothing is gained by flattening them. By how often the context that speaks was seen, or, for the mixed "
        f"critic, by the probability of its favourite; numbers name where a column begins. Windows of {TRUST_WINDOW}; "
        f"columns with under {FEWEST} positions show the exponent of all.",
    ]
    for title, from_, shown in (("judge \\ seen from", seen, counted), ("judge \\ favourite from", sure, mixed)):
        if shown:
            lines += ["", f"| {title} | {' | '.join(from_)} |", "|---" * (BUCKETS + 1) + "|"]
        for row in shown:
            lines.append(f"| {row.name} | {' | '.join(f'{t:.2f}' for t in row.trust.table.tolist())} |")
    return lines


def page(rows: Sequence[Judged], settings: Settings, made: Mapping[str, Any], dataset: Dataset) -> list[str]:
    """The study in Markdown."""
    validation = Path(settings.val_corpus).name if settings.val_corpus else "the held-out tenth"
    judged_on = f"{min(settings.val_tokens or len(dataset.val), len(dataset.val)):,} tokens"
    lines = [
        f"# What n-gram judges know, built from {settings.share:.0%} of the training split",
        "",
        f"`{made['command']}` on {machine(made)}.",
        "",
        f"Contexts in tokens ({dataset.tokenizer.kind}, {dataset.tokenizer.vocab_size:,} of them). Validation: "
        f"{validation}, {judged_on}, contexts running on through it. Leave-one-out: every "
        "fourth stretch of the judge's own training text, each position without its own occurrence. Too sure by: the "
        "mean probability of the likeliest token minus how often it was right, on validation. Seconds to build.",
        "",
        "| judge | validation CE, nats | accuracy | too sure by | leave-one-out CE | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        known = f"{r.val_ce:.4f} | {r.accuracy:.1%} | {r.sure:+.4f}"
        lines.append(f"| {r.name} | {known} | {r.loo_ce:.4f} | {r.seconds:.1f} |")
    return [*lines, "", *trusts(rows)]


def main(words: Sequence[str]) -> int:
    """Build, measure, write; returns the exit code."""
    settings = parse(Settings, words, prog="python -m experiments.judges", description=__doc__ or "")
    made = stamp("judges", words)
    texts = DataConfig(corpus=settings.corpus, val_corpus=settings.val_corpus, tokenizer=settings.tokenizer)
    dataset = prepare_real(texts, "studies")
    text = "\n".join(page(judged(settings, dataset), settings, made, dataset)) + "\n"
    parts: list[str] = [] if settings.tokenizer == "char" else [settings.tokenizer]
    parts += [] if settings.share == 1 else [f"{settings.share:g}"]
    settings.out.mkdir(parents=True, exist_ok=True)
    write_atomic(settings.out / f"{'-'.join(['table', *parts])}.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    run_main(main)
