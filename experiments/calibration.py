"""How well finished runs are calibrated: the likeliest token, the likeliest five together, and the best temperature.

    python -m experiments.calibration                              the runs of results/compare
    python -m experiments.calibration --study tokens               those of another study
    python -m experiments.calibration --runs runs/a runs/b         any runs, a row each

The temperature is fit on the first half of the validation split by its loss, and judged on the second half. Rows of a
study are means over its seeds. Writes results/calibration/: record.json, runs.jsonl, table.md and figure.svg, the
reliability of the likeliest token.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli import parse, run_main
from config import ConfigError, require
from evaluate import Settings as Evaluation
from evaluate import measure
from experiments.arms import ROOT
from experiments.figures import reliability
from experiments.study import stamp
from experiments.tables import machine, spread
from files import write_atomic, write_json
from training.run_folder import load_run

Measured = dict[str, list[dict[str, Any]]]
"""{label: evaluate.py's numbers of every seed}"""


@dataclass(frozen=True)
class Settings:
    """Calibration of runs that are there already."""

    runs: tuple[Path, ...] = ()
    """Run folders. Unset: the runs of a study, every seed."""
    study: str = "compare"
    """The study whose runs are measured, as results/<study>/runs.jsonl names them in runs/<study>/."""
    checkpoint: str = "latest"
    """latest, best (by validation loss), or a name such as step-000500."""
    top: int = 5
    """How many of the likeliest tokens are taken together."""
    bins: int = 15
    """Equal-width bins of both calibration errors."""
    batch_size: int | None = None
    """Windows per forward pass. Unset: each run's own eval.batch-size."""
    out: Path = ROOT / "results" / "calibration"
    """Folder of the figures."""

    def __post_init__(self) -> None:
        for name in ("top", "bins", "batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "use a positive number")


def folders(settings: Settings) -> dict[str, list[Path]]:
    """{label: run folders, a seed each}. Raises ConfigError where there are none."""
    if settings.runs:
        return {str(path): [path] for path in settings.runs}
    record = ROOT / "results" / settings.study / "runs.jsonl"
    if not record.is_file():
        raise ConfigError(f"{record} is not there: run python -m experiments.{settings.study} first, or use --runs")
    found: dict[str, list[Path]] = {}
    for line in map(json.loads, record.read_text().splitlines()):
        if line.get("role") == "row" and not line["diverged"]:
            label = f"{line['group']} · {line['label']}" if line["group"] else line["label"]
            found.setdefault(label, []).append(ROOT / "runs" / settings.study / line["run"])
    missing = sorted(str(path) for paths in found.values() for path in paths if not path.is_dir())
    if missing or not found:
        what = ", ".join(missing[:3]) or "no finished run"
        raise ConfigError(f"{record}: {what} is not there; run python -m experiments.{settings.study} again")
    return found


def measured(settings: Settings) -> Measured:
    """Every run evaluated."""
    numbers: Measured = {}
    for label, paths in folders(settings).items():
        for path in paths:
            how = Evaluation(path, top=settings.top, bins=settings.bins, batch_size=settings.batch_size, ladder=0)
            found = measure(load_run(path, settings.checkpoint), how)
            numbers.setdefault(label, []).append(found | {"run": path.name})
            print(f"{path.name}: CE {found['val/ce']:.4f}  ECE {found['val/ece']:.4f}", flush=True)
    return numbers


def row(label: str, seeds: Sequence[Mapping[str, Any]]) -> str:
    """One line of the table."""
    tops = [n["calibration"] for n in seeds]
    cells = [label, spread([n["val/ce"] for n in seeds]), spread([n["val/ece"] for n in seeds])]
    chance = [n["chance"] for n in seeds]
    cells.append(spread([c["alone"] for c in chance]) if all(chance) else "—")
    cells.append(spread([t["ece"] for t in tops]))
    cells += [spread([100 * t[what] for t in tops], 2) for what in ("mass_beyond", "gold_beyond")]
    if all("temperature" in t for t in tops):
        cells += [spread([t["temperature"] for t in tops], 3), spread([t["ce_before"] for t in tops])]
        cells += [spread([t["ce_after"] for t in tops]), spread([t["ce_after"] - t["ce_before"] for t in tops])]
    else:
        cells += ["—"] * 4
    return "| " + " | ".join(cells) + " |"


def table(numbers: Measured, settings: Settings, made: Mapping[str, Any]) -> str:
    """The rows in Markdown, under the command and the machine that made them."""
    most = max(map(len, numbers.values()))
    seeds = f"{most} seeds; mean ± standard deviation over seeds" if most > 1 else "One run a row"
    lines = [
        "# Calibration of finished runs",
        "",
        f"`{made['command']}` on {machine(made)}. {seeds}; checkpoint {settings.checkpoint}; whole validation split, "
        f"{settings.bins} bins. ECE: of the likeliest token; by chance: what a policy that is right would show on such "
        f"a text; top-{settings.top} ECE: the gap between the mass of the {settings.top} likeliest and how often the "
        "token that came next is among them; beyond them: the mass, and how often it came from there. T: the "
        "temperature with the lowest loss on the first half of the split; below 1 the model is too unsure of itself, "
        "above 1 too sure.",
        "",
        f"| runs | val CE, nats | ECE | by chance | top-{settings.top} ECE | beyond: mass, % | beyond: gold, % "
        "| best T | CE of the second half | with T | gain of T |",
        "|---" * 11 + "|",
        *(row(label, seeds) for label, seeds in numbers.items()),
    ]
    return "\n".join(lines) + "\n"


def pooled(seeds: Sequence[Mapping[str, Any]], bins: int) -> list[tuple[float, float]]:
    """Reliability over all seeds: (mean confidence, share that was right) of every bin that holds tokens."""
    sums = {i: [0.0, 0.0, 0.0] for i in range(bins)}
    for bucket in (b for numbers in seeds for b in numbers["reliability"]):
        of_bin = sums[min(int(bucket["confidence"] * bins), bins - 1)]
        for i, value in enumerate((bucket["confidence"], bucket["accuracy"], 1.0)):
            of_bin[i] += value * bucket["tokens"]
    return [(c / n, h / n) for c, h, n in sums.values() if n]


def main(words: Sequence[str]) -> int:
    """Evaluate, compare, write; returns the exit code."""
    settings = parse(Settings, words, prog="python -m experiments.calibration", description=__doc__ or "")
    made = stamp("calibration", words)
    numbers = measured(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    lines = [
        (f"{label} {statistics.mean(n['val/ece'] for n in seeds):.4f}", pooled(seeds, settings.bins))
        for label, seeds in numbers.items()
    ]
    runs = [{"label": label, **n} for label, seeds in numbers.items() for n in seeds]
    write_json(settings.out / "record.json", made)
    write_atomic(settings.out / "runs.jsonl", "".join(json.dumps(run) + "\n" for run in runs))
    write_atomic(settings.out / "table.md", table(numbers, settings, made))
    write_atomic(settings.out / "figure.svg", reliability(lines, "confidence in the likeliest token"))
    print(f"\n{table(numbers, settings, made)}\n{settings.out}")
    return 0


if __name__ == "__main__":
    run_main(main)
