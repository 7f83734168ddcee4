"""From a Config to a finished run: data, critic, objective, folder, training, report.

train.py, and whoever wants runs without a command line, call `start`, `resume` or `cache_critic`. All of it works
on one process or on all those of torchrun; files are written by the first.
"""

import os
from pathlib import Path
from typing import Any

from config import Config, ConfigError, differences, override, require
from critic_runs import critic_cache, critic_runs
from data.prepare import Dataset, check_length, prepare
from data.tokenizers import load_tokenizer
from files import write_json
from one_run import make_objective, new_record, train_in, weight_digests
from training import checkpoint as checkpoints
from training.distributed import World, from_all, from_first
from training.elastic import begun, sign, torchruns
from training.hardware import Hardware, choose
from training.micro_batches import micro_batches
from training.record import require_wandb
from training.run_folder import has_checkpoint, new_run_folder, read_config
from training.shared_folder import require_seen, require_shared
from training.turns import alone

# What --resume may change: none of it touches what the remaining steps compute, but for train.steps.
CHANGEABLE = (
    "run.device",
    "run.compile",
    "run.threads",
    "run.parallel",
    "train.steps",
    "train.keep",
    "train.checkpoint_every",
)
CHANGEABLE_GROUPS = ("log", "eval")


def begin(config: Config, name: str, world: World, hardware: Hardware) -> tuple[int, Path]:
    """`start`, or continue the run that this torchrun began before it had to start its workers again."""
    folder = begun(config.run.out_dir, config.run.name or name, world)
    if folder is None or not from_first(world, lambda: has_checkpoint(folder)):
        return start(config, name, world, hardware, folder)
    require_seen(folder / "config.json", world)
    return resume(folder, read_config(folder)[0], world, hardware)


def start(config: Config, name: str, world: World, hardware: Hardware, folder: Path | None = None) -> tuple[int, Path]:
    """Train a new run of preset `name`, in `folder` or else a new one; returns its exit code and folder.

    Raises ConfigError for settings that cannot work with this corpus and machine.
    """
    dataset = load_data(config, world)
    check_settings(config, dataset)
    if config.run.parallel == "fsdp":  # also of a critic that is trained first
        require_shared(Path(config.run.out_dir), world)
    critics, code = critic_runs(config, dataset, world, hardware)
    if code:
        return code, Path(config.run.out_dir)
    cache = critic_cache(config, dataset, critics, world, hardware)
    objective = make_objective(config, dataset, critics, hardware, cache)
    if folder is None:
        folder = Path(from_first(world, lambda: new_run_folder(config.run.out_dir, config.run.name or name)))
    record, names = new_record(config, name, dataset, hardware, critics, cache), torchruns(world)
    with alone(folder, world):
        if world.first:
            sign(folder, names)
            dataset.tokenizer.save(folder / "tokenizer.json")
            write_json(folder / "config.json", record)
        return train_in(folder, config, record, dataset, objective, hardware, world, cache=cache), folder


def resume(folder: Path, config: Config, world: World, hardware: Hardware) -> tuple[int, Path]:
    """Continue the run in `folder` from its newest whole checkpoint, with the changes that `config` makes.

    Raises ConfigError for a change that would alter the run, another corpus than the run's, or a run that is at work.
    """
    saved, record = read_config(folder)
    with alone(folder, world):
        return resume_alone(folder, config, saved, record, world, hardware)


def resume_alone(
    folder: Path, config: Config, saved: Config, record: dict[str, Any], world: World, hardware: Hardware
) -> tuple[int, Path]:
    """`resume` of the run of `record`, whose settings were `saved`, while nobody else trains in `folder`."""
    fix = f"a part of a hybrid run; continue that one: python hybrid.py --resume {folder.parent}"
    require("hybrid" not in record, "--resume", str(folder), fix)
    changed = differences(saved, config)
    for name, (old, new) in changed.items():
        allowed = name in CHANGEABLE or name.split(".")[0] in CHANGEABLE_GROUPS
        flag = name.replace("_", "-")
        require(allowed, flag, new, f"--resume cannot change it from {old!r}; start a new run instead")
    place = from_first(world, lambda: checkpoints.find(folder / "checkpoints"))
    require_seen(place / "meta.json", world)
    if config.run.parallel == "fsdp":
        require_shared(folder, world)
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
    require_same_critics(critics, record, world)
    cache = critic_cache(config, dataset, critics, world, hardware, record.get("critic_cache"))
    objective = make_objective(config, dataset, critics, hardware, cache)
    names = torchruns(world)
    if world.first:
        sign(folder, names)
        if changed:
            write_json(folder / "config.json", record | {"config": config.to_dict()})
    return train_in(folder, config, record, dataset, objective, hardware, world, place, cache), folder


def require_same_critics(critics: list[Path], record: dict[str, Any], world: World) -> None:
    """Raise ConfigError unless `critics` are those that the run of `record` was trained with, weights and all.

    A critic that is a run of its own may have gone on since. Of a cached one the cache's name says the same.
    """
    expected, found = record["critics"], [c.name for c in critics]
    require(found == expected, "critic", found, f"the run was trained with {expected}; restore that critic")
    if record.get("critic_weights"):  # which older runs did not record
        same = from_first(world, lambda: weight_digests(critics) == record["critic_weights"])
        require(same, "critic", found, "its weights are no longer those that the run was trained with; restore them")


def cache_critic(config: Config, world: World, hardware: Hardware) -> tuple[int, Path | None]:
    """Only write what the critic of `config` thinks of its training windows; returns an exit code and the folder.

    Raises ConfigError for settings without a critic that can be cached, and as `start` does.
    """
    fix = "nothing judges there; name a preset of AvataRL"
    require(config.train.objective == "avatarl", "train.objective", config.train.objective, fix)
    config = override(config, critic={"cache": True})
    dataset = load_data(config, world)
    check_settings(config, dataset)
    critics, code = critic_runs(config, dataset, world, hardware)
    cache = None if code else critic_cache(config, dataset, critics, world, hardware)
    return code, None if cache is None else cache.folder


def load_data(config: Config, world: World, tokenizer: Any = None) -> Dataset:
    """The dataset on every process; the first one downloads and caches. Checked against the block size."""

    def ready() -> None:
        check_length(prepare(config.data, tokenizer), config.model.block_size)

    if world.size > 1:
        from_first(world, ready)
    dataset = prepare(config.data, tokenizer)
    check_length(dataset, config.model.block_size)
    texts = set(from_all(world, (dataset.corpus_sha256, dataset.tokenizer.fingerprint)))
    fix = "the machines of this run have different texts under that name; give all of them the same"
    require(len(texts) == 1, "data.corpus", dataset.corpus_name, fix)
    micro_batches(config.train, world.size)  # raises where they cannot share a step
    return dataset


def check_settings(config: Config, dataset: Dataset) -> None:
    """Raise ConfigError for what can only be checked against the data and this machine, before any folder is made."""
    if config.train.objective == "avatarl":
        k, vocab_size = config.method.top_k, dataset.tokenizer.vocab_size
        require(k <= vocab_size, "method.top-k", k, f"the vocabulary has only {vocab_size} tokens; use at most that")
        top, fix = config.critic.cache_top, f"the vocabulary has only {vocab_size} tokens; keep at most that"
        require(top <= vocab_size, "critic.cache-top", top, fix)
    if config.eval.sample_tokens:
        try:
            dataset.tokenizer.encode(config.eval.prompt)
        except ConfigError as error:
            raise ConfigError(f"eval.prompt = {config.eval.prompt!r}: {error}") from None
    require_wandb(config)


def prepare_process(config: Config, world: World) -> Hardware:
    """Choose this process's hardware, before anything is allocated."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return choose(config.run, world.local_rank, world.local_size)
