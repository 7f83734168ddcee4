"""How fast bootstrapping decides: its statistics, every preset with the same policy, and an epoch of exploration.

    python -m experiments.bootstrap_speed                                all of it, an epoch in both of its forms
    python -m experiments.bootstrap_speed --run.device cuda --epoch-steps 0    on a GPU, the whole epoch

Statistics are made from the training text, as a run makes them. Presets take turns, so that a machine that slows down
slows all of them; a speed is the median over rounds. The curriculum is timed in its last stage, where all of them
count; self-play also without what its opponent's forward passes take, which is timed apart; what critics remember of
positions is not yet there, as in a first epoch. An epoch decides every character of the training text once, by 20 M
parameters; of a long one only so many steps are timed, and the label says how many. Writes results/bootstrap-speed/:
record.json and table.md.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from avatarl.mixed import MixedCritic
from avatarl.suffixes import SuffixStatistics
from bootstrap.curriculum import StageStatistics
from bootstrap.ngrams import NgramTables, load_tables
from bootstrap.rewards import credit_table
from bootstrap.rollouts import log_policy_of
from bootstrap.selfplay import judging_copy
from cli import parse, run_main
from config import PRESETS, Config, RunConfig, override, preset, require
from data.batches import Batch, prefetch, window_count
from data.prepare import Dataset, prepare
from experiments.arms import ROOT
from experiments.study import stamp
from experiments.tables import machine
from files import write_atomic, write_json
from one_run import make_objective
from train_core import Job, learn
from training.distributed import World
from training.hardware import Hardware, choose, synchronise
from training.optim import build_optimizers, set_lr
from training.plan import duration, human, two_digits
from training.record import Recorder

NAMES = [name for name in PRESETS if name.startswith("bootstrap-")]
BASE = "bootstrap-exhaustive"
TWENTY_MILLION = {"n_layer": 6, "n_head": 8, "n_embd": 512, "bias": False}
"""18.9 M parameters in the blocks; with 65 characters and 256 positions 19.0 M."""


@dataclass(frozen=True)
class Settings:
    """Time rollouts, rewards and updates."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where: device, dtype, compile and threads as in train.py."""
    block_size: int = 8
    """Context of the policy that the presets share, 3 layers of width 128."""
    decisions: int = 2048
    """Tokens of a step of the presets, in rows of the context."""
    rounds: int = 7
    """How often every preset has its turn."""
    steps: int = 3
    """Steps of a turn."""
    statistics_rounds: int = 3
    """How often every statistic is made."""
    epoch_context: int = 256
    """Context of the 20 M policy where every position of a sequence decides."""
    epoch_batch: int = 4096
    """Tokens of a step of the epoch."""
    epoch_steps: int = 3
    """Steps that are timed for the epoch; 0: all of them."""
    out: Path = ROOT / "results" / "bootstrap-speed"
    """Folder of the figures."""

    def __post_init__(self) -> None:
        for name in ("block_size", "rounds", "steps", "statistics_rounds", "epoch_context"):
            require(getattr(self, name) >= 1, name.replace("_", "-"), getattr(self, name), "use a positive number")
        require(self.epoch_steps >= 0, "epoch-steps", self.epoch_steps, "use 0 (the whole epoch) or more")
        fix = "use at least one row of the context"
        require(self.decisions >= self.block_size, "decisions", self.decisions, fix)
        require(self.epoch_batch >= self.epoch_context, "epoch-batch", self.epoch_batch, fix)


class Timed:
    """A run in memory, whose steps are timed; nothing is written."""

    def __init__(self, config: Config, dataset: Dataset, hardware: Hardware) -> None:
        objective = make_objective(config, dataset, [], hardware)
        if getattr(objective, "curriculum", None) is not None:
            objective.curriculum.progress[0] = len(objective.curriculum.stages) - 1
        optimizers = build_optimizers(objective, config.optim, hardware.dtype)
        set_lr(optimizers, 0.1)
        recorder = Recorder(Path(), first=False, steps=1, start=0)  # writes nothing
        self.job = Job(config, dataset, objective, optimizers, hardware, World(), Path(), recorder)
        self.next = 0

    def batch(self) -> Batch:
        """The next batch, on the device."""
        job, self.next = self.job, self.next + 1
        (found,) = prefetch(job.batches, range(self.next - 1, self.next), job.slices, job.hardware.device)
        return found

    def seconds(self, steps: int) -> float:
        """Seconds of so many steps."""
        batches = [self.batch() for _ in range(steps)]
        synchronise(self.job.hardware.device)
        start = time.perf_counter()
        for batch in batches:
            learn(self.job, [batch], measure=False)
            self.job.objective.after_step(self.job.state.step)
        synchronise(self.job.hardware.device)
        return time.perf_counter() - start

    def opponent_seconds(self) -> float:
        """Seconds of the opponent's forward pass on one batch; 0 without one."""
        objective, batch = self.job.objective, self.batch()
        if objective.past is None:
            return 0.0
        start = time.perf_counter()
        log_policy_of(judging_copy(objective.past), batch.tokens, objective.autocast)
        synchronise(self.job.hardware.device)
        return time.perf_counter() - start

    @property
    def decisions_per_step(self) -> float:
        """Decisions of one step."""
        return self.job.objective.decisions_per_token() * self.job.tokens_per_step


def time_statistics(settings: Settings, dataset: Dataset) -> dict[str, float]:
    """Median seconds that each of the statistics takes, on the CPU, from the whole training text."""
    text, vocab_size, best = dataset.train, dataset.tokenizer.vocab_size, preset("bootstrap-best").bootstrap
    characters = dataset.characters or []
    tables, shares = NgramTables.build(text, vocab_size), best.order_weights
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        load_tables(text, vocab_size, tables.longest, folder)
        makers: dict[str, Callable[[], object]] = {
            "tables for contexts of 0 to 3, with the bigram reference": lambda: NgramTables.build(text, vocab_size),
            "the same, read from the cache": lambda: load_tables(text, vocab_size, tables.longest, folder),
            "partial credit after every context": lambda: credit_table(tables, shares, "relative"),
            "suffix array": lambda: SuffixStatistics.build(text, vocab_size),
            "all stages of the curriculum": lambda: StageStatistics.build(text, characters),
            "mixed contexts, fitted": lambda: MixedCritic(text, vocab_size, context=best.soft_context),
        }
        for label, make in makers.items():
            taken = []
            for _ in range(settings.statistics_rounds):
                start = time.perf_counter()
                make()
                taken.append(time.perf_counter() - start)
            found[label] = median(taken)
            print(f"{label}: {found[label]:.2f} s", flush=True)
    return found


def time_presets(settings: Settings, dataset: Dataset, hardware: Hardware) -> list[dict[str, Any]]:
    """Decisions per second of every preset, and over those of the exhaustive one."""
    rows = max(1, settings.decisions // settings.block_size)
    model = {"n_layer": 3, "n_head": 4, "n_embd": 128, "block_size": settings.block_size}
    base = preset(BASE)
    shared: dict[str, dict[str, Any]] = {"model": vars(base.model) | model, "optim": vars(base.optim)}
    runs = {}
    for name in NAMES:
        changed = override(preset(name), **shared, train={"batch_size": rows})
        runs[name] = Timed(override(changed, run=vars(settings.run)), dataset, hardware)
        runs[name].seconds(2)  # libraries prepare themselves
    taken: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(settings.rounds):
        for name, run in runs.items():
            taken[name].append(run.seconds(settings.steps) / settings.steps)
    found = []
    for name, run in runs.items():
        opponent = median(run.opponent_seconds() for _ in range(settings.rounds))
        step = median(taken[name])
        ratio = (run.decisions_per_step / (step - opponent)) / (runs[BASE].decisions_per_step / median(taken[BASE]))
        found.append(
            {
                "preset": name,
                "seconds_per_step": step,
                "fastest": min(taken[name]),
                "slowest": max(taken[name]),
                "opponent_seconds": opponent,
                "decisions_per_second": run.decisions_per_step / step,
                "ratio": ratio,
            }
        )
        print(f"{name:22} {two_digits(run.decisions_per_step / step)} decisions/s, {ratio:.2f}", flush=True)
    return found


def time_epoch(settings: Settings, dataset: Dataset, hardware: Hardware, form: str) -> dict[str, Any]:
    """Seconds of an epoch in one form of contexts, extrapolated where only some of its steps were timed.

    Windows are of 8 characters, over rows as long as the sequences.
    """
    length = settings.epoch_context
    windows = {"contexts": "windows", "row": length} if form == "windows" else {}
    config = override(
        preset(BASE),
        model=TWENTY_MILLION | {"block_size": 8 if windows else length},
        bootstrap=windows,
        train={"batch_size": settings.epoch_batch // length},
        run=vars(settings.run),
    )
    run = Timed(config, dataset, hardware)
    steps = -(-window_count(len(dataset.train), length) // config.train.batch_size)
    timed = min(settings.epoch_steps or steps, steps)
    run.seconds(1)
    taken = run.seconds(timed)
    found = {
        "form": form,
        "context": config.model.block_size,
        "parameters": run.job.objective.student.parameter_count(),
        "steps": steps,
        "timed_steps": timed,
        "seconds": taken / timed * steps,
        "decisions_per_second": run.decisions_per_step * timed / taken,
    }
    print(f"epoch, {form}: {duration(found['seconds'])} from {timed} of {steps} steps", flush=True)
    return found


def table(
    statistics: dict[str, float],
    presets: Sequence[dict[str, Any]],
    epochs: Sequence[dict[str, Any]],
    made: dict[str, Any],
    how: Settings,
) -> str:
    """The three tables in Markdown."""
    lines = [
        "# How fast bootstrapping decides",
        "",
        f"`{made['command']}` on {machine(made)}; {made['hardware']}.",
        "",
        "## Statistics",
        "",
        f"From the {made['tokens']:,} tokens of the training text, once a run; median of {how.statistics_rounds}.",
        "",
        "| what | s |",
        "|---|---|",
        *(f"| {label} | {seconds:.2f} |" for label, seconds in statistics.items()),
        "",
        "## Presets",
        "",
        f"The same policy for all, 3 layers of width 128 with a context of {how.block_size}, {how.decisions:,} tokens "
        f"a step; median of {how.rounds} turns of {how.steps} steps. The last column is over `{BASE}`, opponents' "
        "forward passes counted apart.",
        "",
        "| preset | decisions/s | s a step (fastest to slowest turn) | opponent, s | ratio |",
        "|---|---|---|---|---|",
    ]
    for p in presets:
        span = f"{p['seconds_per_step']:.4f} ({p['fastest']:.4f} to {p['slowest']:.4f})"
        lines.append(
            f"| `{p['preset']}` | {two_digits(p['decisions_per_second'])} | {span} | {p['opponent_seconds']:.4f} | "
            f"{p['ratio']:.2f} |"
        )
    lines += [
        "",
        "## One epoch of exhaustive exploration",
        "",
        "Every character of the training text is a decision, all actions are judged, weights are updated.",
        "",
        "| contexts | parameters | epoch | from | decisions/s |",
        "|---|---|---|---|---|",
    ]
    for e in epochs:
        what = "every position of a sequence of" if e["form"] == "sequence" else "sliding windows of"
        timed = f"{e['timed_steps']} of {e['steps']} steps" if e["timed_steps"] < e["steps"] else "all of its steps"
        lines.append(
            f"| {what} {e['context']} | {human(e['parameters'])} | {duration(e['seconds'])} | {timed} | "
            f"{two_digits(e['decisions_per_second'])} |"
        )
    return "\n".join(lines) + "\n"


def main(words: Sequence[str]) -> int:
    """Measure and write; returns the exit code."""
    settings = parse(Settings, words, prog="python -m experiments.bootstrap_speed", description=__doc__ or "")
    made = stamp("bootstrap_speed", words)
    hardware = choose(settings.run, 0, 1)
    dataset = prepare(override(preset(BASE), data={"corpus": "tinyshakespeare"}).data)
    torch.manual_seed(settings.run.seed)
    statistics = time_statistics(settings, dataset)
    presets = time_presets(settings, dataset, hardware)
    epochs = [time_epoch(settings, dataset, hardware, form) for form in ("sequence", "windows")]
    made |= {"hardware": ", ".join(hardware.notes), "tokens": len(dataset.train)}
    text = table(statistics, presets, epochs, made, settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    write_json(settings.out / "record.json", made | {"statistics": statistics, "presets": presets, "epochs": epochs})
    write_atomic(settings.out / "table.md", text)
    print(f"\n{text}\n{settings.out}")
    return 0


if __name__ == "__main__":
    run_main(main)
