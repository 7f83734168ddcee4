"""AvataRL against cross-entropy where tokens are pieces of words: BPE of 1,024, little text, read a few times.

    python -m experiments.words                          wikitext-2 below $AVATARL_DATA or data/: train on its test.txt
    python -m experiments.words --train A.txt --val B.txt --vocabulary 2048
    python -m experiments.words --judges suffix mixed --falls 0.9:0.6 0.8:0.1 0.93:0.7/0.1:0.4 --windows 0 2
    python -m experiments.words --steps 2040 --longer 3000 6000 --dropouts 0 0.1 --decays 1 10

The protocol's model, batches and lengths. Every judge is built from the training text alone; each is tried with every
hand-over of the vote (the critic's weight at the first and at the last step, and after a stroke reality's, where it is
not the rest) and with every number of windows that it writes beside each of the corpus's, which cost time, but no
tokens; all of them propose --top-k actions; all entries are tuned alike. --longer shows what cross-entropy makes of
such time: it is given more steps, with a schedule and a tuning of its own at every length.
`python -m experiments.judges --tokenizer bpe` says what the judges know by themselves. Writes results/words/:
record.json, runs.jsonl, table.md and figure.svg.
"""

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from cli import parse, run_main
from config import ConfigError, require
from data.corpora import DATA_FOLDER
from experiments.arms import ROOT
from experiments.figures import curves
from experiments.rivals import METHODS, ends, falling, optimizer, regularizers, rival, tuning
from experiments.study import Entry, Row, StudySettings, conduct, of_length, publish, stamp
from experiments.tables import gap_text, gaps, page, values_of, verdicts

JUDGES: dict[str, dict[str, Any]] = {
    "ngram": {"critic.kind": "ngram", "critic.ngram-context": 2},
    "mixed": {"critic.kind": "mixed", "critic.mixed-context": 4},
    "suffix": {"critic.kind": "suffix"},
}
"""Judges with the context, in tokens, that suits this little text."""


@dataclass(frozen=True)
class Settings(StudySettings):
    """Both methods on pieces of words."""

    train: str = "wikitext-2/test.txt"
    """Text to train on: a path, also one below $AVATARL_DATA or data/."""
    val: str = "wikitext-2/valid.txt"
    """Text to validate on, all of it."""
    vocabulary: int = 1024
    """Tokens of the BPE, learned from the training text."""
    judges: tuple[str, ...] = ("mixed",)
    """AvataRL's critics: ngram, mixed, suffix."""
    falls: tuple[str, ...] = ("1:0.9/0.1:0.4",)
    """Hand-overs tried: first:last weight of the critic, reality having the rest, or critic's/reality's."""
    windows: tuple[int, ...] = (1, 2)
    """Numbers of imagined windows tried, beside each window of the corpus."""
    top_k: int = 64
    """Actions that student and critic propose each: a thousand tokens have a longer tail than characters."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Optimiser of all."""
    longer: tuple[int, ...] = ()
    """Further numbers of steps that cross-entropy is given, which reads the text again meanwhile."""
    dropouts: tuple[float, ...] = ()
    """Dropout probabilities tried, after the rate. Unset: none is used."""
    decays: tuple[float, ...] = ()
    """Weight decays tried last, as multiples of the presets' (both optimisers' are scaled). Unset: the presets'."""
    evaluations: int = 4
    """Evaluations along a run, the last at its end: the points of its curve."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = len(self.judges) > 0 and set(self.judges) <= set(JUDGES)
        require(known, "judges", self.judges, f"use some of {', '.join(JUDGES)}")
        require(len(self.falls) > 0, "falls", self.falls, "name at least one, such as 0.9:0.6")
        possible = len(self.windows) > 0 and all(count >= 0 for count in self.windows)
        require(possible, "windows", self.windows, "use numbers from 0 on, such as 0 2")
        require(self.top_k >= 1, "top-k", self.top_k, "use a positive number, such as 64")
        require(
            all(n > self.steps for n in self.longer), "longer", self.longer, f"use numbers above --steps {self.steps}"
        )
        regularizers(self.dropouts, self.decays)
        for fall in self.falls:
            ends(fall)

    @property
    def further(self) -> dict[str, Any]:
        """Settings of every run: the texts and the tokens, and what --also says."""
        texts = {"data.corpus": self.train, "data.val-corpus": self.val}
        tokens = {"data.tokenizer": "bpe", "data.bpe-vocab": self.vocabulary}
        return {**{key: text_file(path) for key, path in texts.items()}, **tokens, **super().further}


def text_file(name: str) -> str:
    """Where a text lies, seen from the checkout: the path given, or one below $AVATARL_DATA or data/.

    A run's settings name it so, whatever the machine. Raises ConfigError where it is nowhere.
    """
    roots = [Path(), *([Path(os.environ["AVATARL_DATA"])] if os.environ.get("AVATARL_DATA") else []), DATA_FOLDER]
    for root in roots:
        if (root / name).is_file():
            return os.path.relpath((root / name).resolve(), ROOT)
    raise ConfigError(f"{name}: there is no such file here, below $AVATARL_DATA or below data/; use --train and --val")


def entries(settings: Settings) -> list[Entry]:
    """Cross-entropy, AvataRL with every judge and hand-over, and cross-entropy again for longer."""
    own = optimizer(settings.optimizer)
    made = [rival("cross-entropy", own)]
    for judge, fall, count in product(settings.judges, settings.falls, settings.windows):
        (first, last), *reality = weights = ends(fall)
        label = f"AvataRL, {judge}, w_c {first:g} → {last:g}"
        label += "".join(f", w_r {begin:g} → {end:g}" for begin, end in reality)
        label += f", {count} imagined" if count else ""
        ours = {**own, **JUDGES[judge], **falling(*weights), "method.imagined-windows": count}
        ours["method.top-k"] = settings.top_k
        made.append(rival("AvataRL", ours, label))
    return made + [longer(steps, settings) for steps in sorted(set(settings.longer))]


def longer(steps: int, settings: Settings) -> Entry:
    """Cross-entropy for `steps`, in a group of its own, so that it is tuned wherever baselines are."""
    length = of_length(METHODS["cross-entropy"], steps, settings.evaluations)
    own = {**optimizer(settings.optimizer), **length}
    return rival("cross-entropy", own, f"cross-entropy, {steps:,} steps", group=f"{steps:,} steps", baseline=True)


def against_longer(rows: Sequence[Row]) -> list[str]:
    """AvataRL minus every longer run of cross-entropy, with what either took, in sentences."""
    ours = [row for row in rows if not row.entry.baseline]
    later = [row for row in rows if row.entry.group]
    said = []
    for row, base in product(ours, later):
        time, error = (
            statistics.mean(values_of(row, key)) / statistics.mean(values_of(base, key))
            for key in ("seconds", "val/ece")
        )
        apart = f"{row.entry.label} − {base.entry.label} = {gap_text(gaps(row, base))}"
        said.append(f"- {apart}; in {time:.2f} times the time, at {error:.2f} times the calibration error.")
    return said


def main(words: Sequence[str]) -> int:
    """Run the study and write its figures; returns the exit code."""
    settings = parse(Settings, words, prog="python -m experiments.words", description=__doc__ or "")
    made = stamp("words", words)
    rows = conduct(entries(settings), settings, "words", tuning(settings, settings.dropouts, settings.decays))
    title = f"Pieces of words (BPE of {settings.vocabulary:,}), {settings.steps:,} steps of 768 tokens"
    text = page(title, made, settings, rows, after=[*verdicts(rows), *against_longer(rows)])
    publish(settings, made, rows, text, curves(rows))
    return 0


if __name__ == "__main__":
    run_main(main)
