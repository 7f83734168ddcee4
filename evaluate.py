"""Measure the model of a run: cross-entropy, perplexity, bits per byte, accuracy, calibration, n-gram ladder.

    python evaluate.py runs/NAME                       on the run's own validation split
    python evaluate.py runs/NAME --corpus other.txt    on the whole of another text
    python evaluate.py runs/NAME --json numbers.json   also as a file

The same numbers as `val/…` of the run's metrics.jsonl, and more of the calibration: how much of the error is chance
(the text drawn again, stretch by stretch), the error of the likeliest few tokens together, and what the best
temperature would gain. That is fit on the first half of the text and judged on the second.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from avatarl.ngram_ladder import ngram_ladder
from cli import parse, run_main
from config import ConfigError, require
from data.batches import validation_windows
from data.prepare import Dataset, check_length, prepare
from files import write_json
from training.calibration import Calibration, halves, survey
from training.evaluation import Tally
from training.hardware import choose, git_state, versions
from training.resampling import Gaps
from training.run_folder import LoadedRun, load_run


@dataclass(frozen=True)
class Settings:
    """Measure the model of a run."""

    run: tyro.conf.Positional[Path]
    """Folder of the run: runs/NAME."""
    checkpoint: str = "best"
    """best (by validation loss), latest, or a name such as step-000500."""
    corpus: str | None = None
    """Evaluate on all of this corpus (a name, a file or a folder) instead of the run's validation split."""
    ladder: int = 6
    """Longest context of the n-gram ladder, counted on the run's training text; 0: no ladder."""
    bins: int = 15
    """Equal-width confidence bins of the calibration error."""
    top: int = 5
    """How many of the likeliest tokens the second calibration error takes together."""
    batch_size: int | None = None
    """Windows per forward pass. Unset: the run's own eval.batch-size."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. auto takes a GPU when there is one."""
    json: Path | None = None
    """Also write the numbers to this file."""

    def __post_init__(self) -> None:
        for name in ("bins", "top", "batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, name.replace("_", "-"), value, "use a positive number")
        require(self.ladder >= 0, "ladder", self.ladder, "must not be negative")


def dataset_of(run: LoadedRun, corpus: str | None) -> Dataset:
    """The run's training split and the text to measure on, in the run's own tokens."""
    data = run.config.data
    dataset = prepare(replace(data, val_corpus=corpus or data.val_corpus), run.tokenizer)
    recorded = run.record.get("corpus", {}).get("sha256")
    if recorded not in (None, dataset.corpus_sha256):
        raise ConfigError(
            f"data.corpus: {dataset.corpus_source} is not the text this run was trained on "
            f"(sha256 {dataset.corpus_sha256[:12]}…, not {recorded[:12]}…); put the original back, or measure "
            "on another text with --corpus"
        )
    check_length(dataset, 1)
    return dataset


def reliability(tally: Tally) -> list[dict[str, float]]:
    """Per confidence bin that holds tokens: mean confidence, share that was right, tokens."""
    confidence, hits, tokens = (row.tolist() for row in tally.bins)
    rows = zip(confidence, hits, tokens, strict=True)
    return [{"confidence": c / n, "accuracy": h / n, "tokens": n} for c, h, n in rows if n]


def overconfidence(tally: Tally) -> float:
    """Mean probability of the likeliest token, minus how often it was right: below 0 the model is too modest."""
    confidence, hits, tokens = tally.bins.sum(-1).tolist()
    return (confidence - hits) / tokens


def calibration(parts: Sequence[Calibration]) -> dict[str, Any]:
    """Top-k calibration error of all parts, and what lies beyond the top k; of two halves also the first's best
    temperature, and what it does to the second's cross-entropy. A text of one window has no halves."""
    whole = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    mass, gold = whole.beyond()
    found: dict[str, Any] = {"top": whole.k, "ece": whole.top_k_error(), "mass_beyond": mass, "gold_beyond": gold}
    if len(parts) == 2:
        fit, judged = parts
        temperature = fit.best_temperature()
        before, after = judged.cross_entropy(), judged.cross_entropy(temperature)
        found |= {"temperature": temperature, "ce_before": before, "ce_after": after}
    return found


def chance(gaps: Gaps) -> dict[str, float]:
    """How much of the calibration error is chance; nothing of a text that is too short to say."""
    found = gaps.chance()
    return {} if found is None else found._asdict()


def measure(run: LoadedRun, settings: Settings) -> dict[str, Any]:
    """All numbers of one evaluation."""
    hardware = choose(replace(run.config.run, device=settings.device, compile="off"))
    dataset = dataset_of(run, settings.corpus)
    run.model.to(hardware.device)
    block, cut = run.config.model.block_size, halves(len(dataset.val), run.config.model.block_size)
    parts = [dataset.val[: cut + 1], dataset.val[cut:]] if cut else [dataset.val]
    gaps, (bins, top) = Gaps(settings.bins), (settings.bins, settings.top)
    rows = settings.batch_size or run.config.eval.batch_size
    texts = [validation_windows(part, block, rows) for part in parts]
    found = [survey(run.model, text, hardware, bins=bins, k=top, gaps=gaps) for text in texts]
    tally = Tally(torch.stack([t.nll for t, _ in found]).sum(0), torch.stack([t.bins for t, _ in found]).sum(0))
    numbers: dict[str, Any] = {
        "run": str(run.folder),
        "checkpoint": run.checkpoint.name,
        "text": settings.corpus or run.config.data.val_corpus or f"validation split of {dataset.corpus_name}",
        "tokens": len(dataset.val) - 1,
        **tally.metrics(dataset.val_bytes),
        "overconfidence": overconfidence(tally),
        "reliability": reliability(tally),
        "calibration": calibration([c for _, c in found]),
        "chance": chance(gaps),
        "versions": versions(),
        "git": git_state(),
    }
    if settings.ladder:
        numbers["ladder"] = ngram_ladder(dataset.train, dataset.val, run.tokenizer.vocab_size, longest=settings.ladder)
    return numbers


def by_chance(found: Mapping[str, float]) -> list[str]:
    """A line of the page, where the text was long enough to say it."""
    if not found:
        return []
    drawn = f"{found['stretches']} stretches of the text drawn again"
    return [f"    by chance        ± {found['spread']:.4f}; if it were right, {found['alone']:.4f} ({drawn})"]


def show(numbers: dict[str, Any]) -> str:
    """The numbers as a page of text."""
    of_top = numbers["calibration"]
    lines = [
        f"{numbers['run']} at {numbers['checkpoint']}, {numbers['tokens']:,} tokens of {numbers['text']}",
        f"  cross-entropy      {numbers['val/ce']:.4f} nats",
        f"  perplexity         {numbers['val/ppl']:.3f}",
        f"  bits per byte      {numbers['val/bpb']:.4f}",
        f"  accuracy           {numbers['val/accuracy']:.2%}",
        f"  calibration error  {numbers['val/ece']:.4f}; the likeliest token is "
        f"{'too sure' if numbers['overconfidence'] > 0 else 'too modest'} by {abs(numbers['overconfidence']):.4f}",
        *by_chance(numbers["chance"]),
        f"    of the top {of_top['top']:<2}      {of_top['ece']:.4f}; beyond them {of_top['mass_beyond']:.2%} of the "
        f"mass, and gold in {of_top['gold_beyond']:.2%}",
    ]
    if "temperature" in of_top:
        lines.append(
            f"  best temperature   {of_top['temperature']:.3f} on the first half; cross-entropy of the second "
            f"{of_top['ce_before']:.4f} → {of_top['ce_after']:.4f} nats"
        )
    lines += ["", "  confidence   right    tokens"]
    for row in numbers["reliability"]:
        lines.append(f"  {row['confidence']:9.1%} {row['accuracy']:8.1%} {row['tokens']:9,.0f}")
    if "ladder" in numbers:
        lines += ["", "  n-gram ladder on the same text (context: nats, accuracy)"]
        for rung in numbers["ladder"]:
            passed = "passed" if numbers["val/ce"] < rung["ce"] else "not passed"
            lines.append(f"  {rung['context']}: {rung['ce']:.4f}  {rung['accuracy']:6.1%}  {passed}")
    return "\n".join(lines)


def main(words: Sequence[str]) -> int:
    """Load, measure, print; returns the exit code."""
    settings = parse(Settings, words, prog="evaluate.py", description=__doc__ or "")
    numbers = measure(load_run(settings.run, settings.checkpoint), settings)
    print(show(numbers))
    if settings.json is not None:
        write_json(settings.json, numbers)
        print(f"written to {settings.json}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_main(main)
