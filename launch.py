"""From a Config to a finished run: data, critic, objective, folder, training, report.

train.py, and whoever wants runs without a command line, call `start` or `resume`. All of it works on one
process or on all those of torchrun; files are written by the first.
"""

import dataclasses
import hashlib
import json
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import torch

from avatarl.build import build_objective
from avatarl.ngram import ngram_ladder
from config import Config, ConfigError, critic_preset, differences, override, preset, require
from data.prepare import Dataset, check_length, prepare
from data.tokenizers import load_tokenizer
from files import write_json
from model import GPT
from report import write_report
from train_core import Job, fit
from training import checkpoint as checkpoints
from training.checkpoint import TrainState
from training.distributed import World, from_first
from training.hardware import Hardware, choose, describe, git_state, peak_memory_gb, prepare_model, versions
from training.optim import build_optimizers
from training.plan import announce
from training.record import Recorder, require_wandb, start_wandb
from training.run_folder import load_run, new_run_folder, read_config, trim_metrics, trim_samples

# What --resume may change: none of it touches what the remaining steps compute, but for train.steps.
CHANGEABLE = (
    "run.device",
    "run.compile",
    "run.threads",
    "train.steps",
    "train.keep",
    "train.checkpoint_every",
)
CHANGEABLE_GROUPS = ("log", "eval")


def start(config: Config, name: str, world: World, hardware: Hardware) -> tuple[int, Path]:
    """Train a new run of preset `name`; returns its exit code and folder.

    Raises ConfigError for settings that cannot work with this corpus and machine.
    """
    dataset = load_data(config, world)
    check_settings(config, dataset)
    critics, code = critic_runs(config, dataset, world, hardware)
    if code:
        return code, Path(config.run.out_dir)
    objective = make_objective(config, dataset, critics, hardware)
    folder = Path(from_first(world, lambda: new_run_folder(config.run.out_dir, config.run.name or name)))
    record = new_record(config, name, dataset, hardware, critics)
    if world.first:
        dataset.tokenizer.save(folder / "tokenizer.json")
        write_json(folder / "config.json", record)
    return train_in(folder, config, record, dataset, objective, hardware, world), folder


def resume(folder: Path, config: Config, world: World, hardware: Hardware) -> tuple[int, Path]:
    """Continue the run in `folder` from its newest whole checkpoint, with the changes that `config` makes.

    Raises ConfigError for a change that would alter the run, or another corpus than the run's.
    """
    saved, record = read_config(folder)
    changed = differences(saved, config)
    for name, (old, new) in changed.items():
        allowed = name in CHANGEABLE or name.split(".")[0] in CHANGEABLE_GROUPS
        flag = name.replace("_", "-")
        require(allowed, flag, new, f"--resume cannot change it from {old!r}; start a new run instead")
    place = from_first(world, lambda: checkpoints.find(folder / "checkpoints"))
    step = checkpoints.check(place)["state"]["step"]
    require(step <= config.train.steps, "train.steps", config.train.steps, f"the run stands at step {step}; use more")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    require(
        tokenizer.fingerprint == record["tokenizer"],
        str(folder / "tokenizer.json"),
        tokenizer.fingerprint[:12],
        "not the tokenizer that this run was trained with; restore the original file",
    )
    dataset = load_data(config, world, tokenizer)
    require(
        dataset.corpus_sha256 == record["corpus"]["sha256"],
        "data.corpus",
        dataset.corpus_source,
        f"its text is not the one that {folder.name} was trained on (sha256 {record['corpus']['sha256'][:12]}…)",
    )
    check_settings(config, dataset)
    critics, code = critic_runs(config, dataset, world, hardware)
    if code:
        return code, folder
    expected = record["critics"]
    found = [c.name for c in critics]
    require(found == expected, "critic", found, f"the run was trained with {expected}; restore that critic")
    objective = make_objective(config, dataset, critics, hardware)
    if world.first and changed:
        write_json(folder / "config.json", record | {"config": config.to_dict()})
    return train_in(folder, config, record, dataset, objective, hardware, world, place), folder


def load_data(config: Config, world: World, tokenizer: Any = None) -> Dataset:
    """The dataset on every process; the first one downloads and caches. Checked against the block size."""

    def ready() -> None:
        check_length(prepare(config.data, tokenizer), config.model.block_size)

    if world.size > 1:
        from_first(world, ready)
    dataset = prepare(config.data, tokenizer)
    check_length(dataset, config.model.block_size)
    parts = world.size * config.train.grad_accum
    require(
        config.train.batch_size % parts == 0,
        "train.batch-size",
        config.train.batch_size,
        f"must be divisible by processes x grad-accum = {world.size} x {config.train.grad_accum}",
    )
    return dataset


def check_settings(config: Config, dataset: Dataset) -> None:
    """Raise ConfigError for what can only be checked against the data and this machine, before any folder is made."""
    if config.train.objective == "avatarl":
        k, vocab_size = config.method.top_k, dataset.tokenizer.vocab_size
        require(k <= vocab_size, "method.top-k", k, f"the vocabulary has only {vocab_size} tokens; use at most that")
    if config.eval.sample_tokens:
        try:
            dataset.tokenizer.encode(config.eval.prompt)
        except ConfigError as error:
            raise ConfigError(f"eval.prompt = {config.eval.prompt!r}: {error}") from None
    require_wandb(config)


def make_objective(config: Config, dataset: Dataset, critics: list[Path], hardware: Hardware) -> Any:
    """The objective of `config`, with the student's first weights, judged by the models of the runs `critics`."""
    torch.manual_seed(config.run.seed)
    student = prepare_model(GPT(config.model, dataset.tokenizer.vocab_size), hardware)
    frozen = [prepare_model(load_critic(c, dataset), hardware) for c in critics]
    return build_objective(student, config, dataset.train, frozen, hardware.autocast)


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


def new_record(config: Config, name: str, dataset: Dataset, hardware: Hardware, critics: list[Path]) -> dict[str, Any]:
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
) -> int:
    """Train the run in `folder`, from scratch or from the checkpoint `place`; returns the exit code."""
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
        job = Job(config, dataset, objective, optimizers, hardware, world, folder, recorder, state)
        code = fit(job)
    if world.first:
        finish(job, code)
    return code


def ladder_of(folder: Path, config: Config, dataset: Dataset) -> str:
    """Write ladder.json, what n-grams reach on the same validation text; returns it in one line."""
    if not config.eval.ladder:
        return "off"
    vocab_size, longest = dataset.tokenizer.vocab_size, config.eval.ladder
    rungs = ngram_ladder(dataset.train, dataset.val, vocab_size, longest=longest)
    write_json(folder / "ladder.json", rungs)
    return "  ".join(f"{r['context']}: {r['ce']:.3f} ({r['accuracy']:.1%})" for r in rungs)


def finish(job: Job, code: int) -> None:
    """Leave the folder complete: result.json for a whole run, the report for any."""
    folder, state = job.folder, job.state
    if code == 0:
        write_json(
            folder / "result.json",
            {
                "steps": state.step,
                "tokens": state.step * job.tokens_per_step,
                "seconds": state.seconds,
                "val_ce": state.val_ce,
                "best_val_ce": state.best_ce,
                "skipped_steps": state.bad_steps,
                "peak_memory_gb": peak_memory_gb(job.hardware.device),
            },
        )
    try:
        page = write_report([folder], folder / "report.html")
        print(f"report: {page}")
    except Exception as error:  # a report that cannot be drawn costs no run
        print(f"warning: no report ({type(error).__name__}: {error})", file=sys.stderr)
    if code == 0:
        print(f"sample: python sample.py {folder}")
    else:
        print(f"stopped at step {state.step}; continue with: python train.py --resume {folder}", file=sys.stderr)


def critic_runs(config: Config, dataset: Dataset, world: World, hardware: Hardware) -> tuple[list[Path], int]:
    """The run folders of the frozen models that judge, trained now where missing; and an exit code.

    A critic is found again by a hash of its settings, corpus and tokenizer. Empty for other kinds of critic.
    """
    c = config.critic
    if config.train.objective != "avatarl" or c.kind != "model":
        return [], 0
    if c.run:
        return [Path(c.run)], 0
    halves = [(0.0, 0.5), (0.5, 1.0)] if c.cross_fit else [(0.0, 1.0)]
    folders = []
    for begin, end in halves:
        folder, code = pretrained(config, dataset, begin, end, world, hardware)
        if code:
            if world.first:
                print("or give the same command again: it first completes the critic", file=sys.stderr)
            return [], code
        folders.append(folder)
    return folders, 0


def pretrained(
    config: Config, dataset: Dataset, begin: float, end: float, world: World, hardware: Hardware
) -> tuple[Path, int]:
    """The folder of a critic trained by cross-entropy on a share of the run's training text; an exit code."""
    name = critic_preset(config)
    base = preset(name)
    start, stop = config.data.train_start, config.data.train_stop
    span = stop - start
    part = {"train_start": start + begin * span, "train_stop": start + end * span}
    settings = override(
        dataclasses.replace(base, data=config.data),
        run=dataclasses.asdict(config.run) | {"name": ""},
        data=part,
        model={"block_size": max(base.model.block_size, config.model.block_size)},
        eval={"prompt": config.eval.prompt},
        log={"wandb": "disabled"},
    )
    folder = Path(config.run.out_dir) / "critics" / f"{name}-{critic_hash(settings, dataset)}"
    if (folder / "result.json").is_file():
        return folder, 0
    tokens = dataset.train
    cut = slice(int(len(tokens) * begin), int(len(tokens) * end))
    data = dataclasses.replace(dataset, train=tokens[cut])
    block = settings.model.block_size
    require(
        len(data.train) > block,
        "critic.preset",
        name,
        f"{len(data.train)} tokens are too few for its context of {block}",
    )
    if world.first:
        print(f"the critic is trained first, once: {name} into {folder}")
    begun = bool(checkpoints.stored(folder / "checkpoints")) and (folder / "config.json").is_file()
    place = from_first(world, lambda: checkpoints.find(folder / "checkpoints")) if begun else None
    objective = make_objective(settings, data, [], hardware)
    record = new_record(settings, name, data, hardware, [])

    def make() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"run.out-dir = {config.run.out_dir!r}: cannot create {folder} ({error.strerror})"
            ) from None
        dataset.tokenizer.save(folder / "tokenizer.json")
        write_json(folder / "config.json", record)

    from_first(world, make)
    return folder, train_in(folder, settings, record, data, objective, hardware, world, place)


def critic_hash(config: Config, dataset: Dataset) -> str:
    """Twelve hexadecimal digits that change with anything that a critic's weights depend on."""
    groups = config.to_dict()
    decisive: dict[str, Any] = {name: groups[name] for name in ("model", "optim", "train")}
    decisive["data"] = {k: v for k, v in groups["data"].items() if k not in ("corpus", "val_corpus")}
    decisive["seed"] = groups["run"]["seed"]
    decisive["corpus"] = dataset.corpus_sha256
    decisive["tokenizer"] = dataset.tokenizer.fingerprint
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]


def prepare_process(config: Config, world: World) -> Hardware:
    """Choose this process's hardware, before anything is allocated."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return choose(config.run, world.local_rank, world.local_size)
