"""One run in its folder: its objective, the record of what it is, training, and what it leaves behind."""

import hashlib
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import torch

from avatarl.build import build_objective
from avatarl.ngram_ladder import NOT_SCORED, ngram_ladder
from bootstrap.build import build_bootstrap
from config import Config, DataConfig, require
from data.critic_cache import CriticCache
from data.prepare import Dataset
from files import write_json
from model import GPT
from report import write_report
from train_core import Job, fit
from training import checkpoint as checkpoints
from training.checkpoint import TrainState
from training.distributed import World
from training.hardware import Hardware, describe, git_state, peak_memory_gb, prepare_model, versions
from training.optim import build_optimizers
from training.parallel import shard
from training.plan import announce
from training.record import Recorder, start_wandb
from training.run_folder import load_run, read_config, trim_metrics, trim_samples


def make_objective(
    config: Config, dataset: Dataset, critics: list[Path], hardware: Hardware, cache: CriticCache | None = None
) -> Any:
    """The objective of `config`, with the student's first weights, judged by the models of the runs `critics`.

    With a cache of what they think, none of them is loaded.
    """
    torch.manual_seed(config.run.seed)
    model = GPT(config.model, dataset.tokenizer.vocab_size)
    student = prepare_model(model, hardware, all_there=config.run.parallel != "fsdp")
    if config.train.objective == "bootstrap":
        return build_bootstrap(student, config, dataset.train, dataset.characters, hardware.autocast)
    frozen = [] if cache is not None else load_critics(critics, dataset, hardware)
    return build_objective(student, config, dataset.train, frozen, hardware.autocast, cache, dataset.strings)


def load_critics(critics: list[Path], dataset: Dataset, hardware: Hardware) -> list[GPT]:
    """The models of the runs `critics`, on their device."""
    return [prepare_model(load_critic(c, dataset), hardware) for c in critics]


def load_critic(folder: Path, dataset: Dataset) -> GPT:
    """The model of the run in `folder`. Raises ConfigError when its tokens mean something else than the student's."""
    run, tokenizer = load_run(folder, "latest"), dataset.tokenizer
    require(
        run.tokenizer.fingerprint == tokenizer.fingerprint,
        "critic.run",
        str(folder),
        f"its vocabulary ({run.tokenizer.kind}, {run.tokenizer.vocab_size} tokens) is not this run's "
        f"({tokenizer.kind}, {tokenizer.vocab_size} tokens); train the critic on the same corpus and tokenizer",
    )
    return run.model


Span = tuple[float, float]
"""From where to where in a corpus, as shares of its length."""


def training_span(data: DataConfig) -> Span:
    """The part of the corpus that such settings train on."""
    whole = 1.0 if data.val_corpus else 1 - data.val_fraction
    return whole * data.train_start, whole * data.train_stop


def require_unread(folder: Path, dataset: Dataset, span: Span, what: str, flag: str) -> None:
    """Raise ConfigError where the run in `folder` was trained on some of `span`, `what` of this run's corpus."""
    theirs, record = read_config(folder)
    begin, end = training_span(theirs.data)
    tolerance = 1e-9  # of shares that were multiplied
    read = begin < span[1] - tolerance and end > span[0] + tolerance
    where = f"it read {begin:.4g} to {end:.4g} of the corpus, and that is {span[0]:.4g} on"
    fix = f"it was trained on {what}: {where}; train one that stops before"
    require(not read or record.get("corpus", {}).get("sha256") != dataset.corpus_sha256, flag, str(folder), fix)


def require_fair(folder: Path, config: Config, dataset: Dataset, flag: str) -> None:
    """Raise ConfigError where the run in `folder` was trained on what a run with `config` validates on."""
    if not config.data.val_corpus:
        require_unread(folder, dataset, (1 - config.data.val_fraction, 1.0), "validation text", flag)


def weight_digests(runs: list[Path]) -> list[str]:
    """SHA-256 of every run's newest weights, in hexadecimal."""
    digests = []
    for run in runs:
        with open(checkpoints.find(run / "checkpoints") / checkpoints.WEIGHTS, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests


def new_record(
    config: Config,
    name: str,
    dataset: Dataset,
    hardware: Hardware,
    critics: list[Path],
    cache: CriticCache | None = None,
) -> dict[str, Any]:
    """What config.json says of a run: the settings, and all that decides what they meant here."""
    with torch.device("meta"):
        parameters = GPT(config.model, dataset.tokenizer.vocab_size).parameter_count()
    return {
        "id": secrets.token_hex(4),
        "preset": name,
        "config": config.to_dict(),
        "command": " ".join(["python", *sys.argv]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "corpus": {
            "name": dataset.corpus_name,
            "sha256": dataset.corpus_sha256,
            "source": dataset.corpus_source,
            "fallback": dataset.fallback,
        },
        "tokenizer": dataset.tokenizer.fingerprint,
        "vocab_size": dataset.tokenizer.vocab_size,
        "parameters": parameters,
        "critics": [c.name for c in critics],
        **({"critic_cache": cache.folder.name} if cache is not None else {"critic_weights": weight_digests(critics)}),
        "versions": versions(),
        "git": git_state(),
        "hardware": describe(hardware),
    }


def train_in(
    folder: Path,
    config: Config,
    record: dict[str, Any],
    dataset: Dataset,
    objective: Any,
    hardware: Hardware,
    world: World,
    place: Path | None = None,
    cache: CriticCache | None = None,
) -> int:
    """Train the run in `folder`, from scratch or from the checkpoint `place`; returns the exit code."""
    if config.run.parallel == "fsdp":
        shard(objective, world, hardware.device)
    optimizers = build_optimizers(objective, config.optim, hardware.dtype)
    state = checkpoints.load(place, objective, optimizers) if place else TrainState()
    if world.first:
        trim_metrics(folder / "metrics.jsonl", state.step if place else -1)
        trim_samples(folder / "samples.txt", state.step if place else -1)
        if state.step == config.train.steps:
            print(f"{folder} is complete at step {state.step}; a larger --train.steps continues it")
        elif place:
            print(f"resuming {folder} at step {state.step} of {config.train.steps}")
        announce(config, record, dataset, objective, hardware, world, folder)
        print(f"ladder     {ladder_of(folder, config, dataset)}", flush=True)
    wandb = start_wandb(config, folder, record, resume=place is not None) if world.first else None
    recorder = Recorder(folder, first=world.first, steps=config.train.steps, start=state.step, wandb=wandb)
    with recorder:
        job = Job(config, dataset, objective, optimizers, hardware, world, folder, recorder, state, cache)
        code = fit(job)
    if world.first:
        finish(job, code)
    return code


def ladder_of(folder: Path, config: Config, dataset: Dataset) -> str:
    """Write ladder.json, what n-grams reach on the same validation text; returns it in one line."""
    if not config.eval.ladder:
        return "off"
    if len(dataset.val) <= NOT_SCORED:
        return f"off: {len(dataset.val)} validation tokens are too few"
    vocab_size, longest = dataset.tokenizer.vocab_size, config.eval.ladder
    rungs = ngram_ladder(dataset.train, dataset.val, vocab_size, longest=longest)
    write_json(folder / "ladder.json", rungs)
    return "  ".join(f"{r['context']}: {r['ce']:.3f} ({r['accuracy']:.1%})" for r in rungs)


def write_result(job: Job) -> None:
    """Write result.json: the run is complete."""
    state = job.state
    result = {
        "steps": state.step,
        "tokens": state.step * job.tokens_per_step,
        "seconds": state.seconds,
        "val_ce": state.val_ce,
        "best_val_ce": state.best_ce,
        "skipped_steps": state.bad_steps,
        "peak_memory_gb": peak_memory_gb(job.hardware.device),
    }
    write_json(job.folder / "result.json", result)


def finish(job: Job, code: int) -> None:
    """Leave the folder complete: result.json for a whole run, the report for any."""
    folder, state = job.folder, job.state
    if code == 0:
        write_result(job)
    try:
        page = write_report([folder], folder / "report.html")
        print(f"report: {page}")
    except Exception as error:  # a report that cannot be drawn costs no run
        print(f"warning: no report ({type(error).__name__}: {error})", file=sys.stderr)
    if code == 0:
        print(f"sample: python sample.py {folder}")
    else:
        print(f"stopped at step {state.step}; continue with: python train.py --resume {folder}", file=sys.stderr)
