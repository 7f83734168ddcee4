"""Who judges a run: its frozen critics, trained where they are missing, and the cache of what they think.

Both stand below out-dir/critics and are found again by a hash of everything that their content depends on.
"""

import dataclasses
import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from avatarl.build import frozen_critic
from avatarl.cache import write_cache
from avatarl.critics import Critic
from avatarl.mixed import LAYOUT
from config import Config, ConfigError, CriticConfig, critic_preset, override, preset, require
from data.batches import window_count
from data.critic_cache import META, CacheLayout, CacheWriter, CriticCache, Identity, cache_folder
from data.prepare import Dataset
from files import write_json
from one_run import load_critics, make_objective, new_record, require_fair, train_in, weight_digests
from training import checkpoint as checkpoints
from training.distributed import World, from_first
from training.hardware import Hardware
from training.micro_batches import micro_batches
from training.plan import human
from training.run_folder import has_checkpoint, read_config
from training.shared_folder import require_seen
from training.turns import in_turn


def critic_runs(config: Config, dataset: Dataset, world: World, hardware: Hardware) -> tuple[list[Path], int]:
    """The run folders of the frozen models that judge, trained now where missing; and an exit code.

    A critic is found again by a hash of its settings, corpus and tokenizer. Empty for other kinds of critic.
    """
    c = config.critic
    if config.train.objective != "avatarl" or "model" not in c.members:
        return [], 0
    folders = [Path(c.run)] if c.run else []
    for folder in folders:
        from_first(world, partial(require_fair, folder, config, dataset, "critic.run"))
    halves = [(0.0, 0.5), (0.5, 1.0)] if c.cross_fit else [(0.0, 1.0)]
    for begin, end in [] if c.run else halves:
        folder, code = pretrained(config, dataset, begin, end, world, hardware)
        if code:
            if world.first:
                print("or give the same command again: it first completes the critic", file=sys.stderr)
            return [], code
        folders.append(folder)
    for folder in folders:
        require_seen(folder / "config.json", world)
    return folders, 0


def pretrained(
    config: Config, dataset: Dataset, begin: float, end: float, world: World, hardware: Hardware
) -> tuple[Path, int]:
    """The folder of a critic trained by cross-entropy on a share of the run's training text; an exit code."""
    name = critic_preset(config)
    settings = settings_of_critic(config, begin, end)
    folder = Path(config.run.out_dir) / "critics" / f"{name}-{critic_hash(settings, dataset)}"
    if from_first(world, lambda: (folder / "result.json").is_file()):
        return folder, 0
    try:
        micro_batches(settings.train, world.size)
    except ConfigError as error:
        raise ConfigError(f"critic.preset = {name!r}: its {error}") from None
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

    def make() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"run.out-dir = {config.run.out_dir!r}: cannot create {folder} ({error.strerror})"
            ) from None

    from_first(world, make)
    with in_turn(folder, world, "this critic"):
        if from_first(world, lambda: (folder / "result.json").is_file()):
            return folder, 0
        return folder, train_critic(folder, name, settings, data, world, hardware)


def train_critic(folder: Path, name: str, settings: Config, data: Dataset, world: World, hardware: Hardware) -> int:
    """Train the critic of preset `name` in `folder`, or what is left of it; returns the exit code."""
    if world.first:
        print(f"the critic is trained first, once: {name} into {folder}")
    begun = from_first(world, lambda: has_checkpoint(folder))
    place = from_first(world, lambda: checkpoints.find(folder / "checkpoints")) if begun else None
    objective = make_objective(settings, data, [], hardware)
    record = new_record(settings, name, data, hardware, [])
    if world.first:
        data.tokenizer.save(folder / "tokenizer.json")
        write_json(folder / "config.json", record)
    return train_in(folder, settings, record, data, objective, hardware, world, place)


def settings_of_critic(config: Config, begin: float, end: float) -> Config:
    """How the run's critic is trained on the share from `begin` to `end` of the run's own training text."""
    base = preset(critic_preset(config))
    alone = base.train.objective != "avatarl" or "model" not in base.critic.members
    require(alone, "critic.preset", critic_preset(config), "it needs a critic itself; use a pretrain-… preset")
    start, stop = config.data.train_start, config.data.train_stop
    span = stop - start
    return override(
        dataclasses.replace(base, data=config.data),
        run=dataclasses.asdict(config.run) | {"name": ""},
        data={"train_start": start + begin * span, "train_stop": start + end * span},
        model={"block_size": max(base.model.block_size, config.model.block_size)},
        eval={"prompt": config.eval.prompt, "sample_tokens": config.eval.sample_tokens},
        log={"wandb": "disabled"},
    )


def critic_hash(config: Config, dataset: Dataset) -> str:
    """Twelve hexadecimal digits that change with anything that a critic's weights depend on."""
    groups = config.to_dict()
    decisive: dict[str, Any] = {name: groups[name] for name in ("model", "optim", "train")}
    decisive["data"] = {k: v for k, v in groups["data"].items() if k not in ("corpus", "val_corpus")}
    if config.data.val_corpus:  # which leaves all of the corpus to train on, the part too that others validate on
        decisive["data"]["val_fraction"] = 0.0
    decisive["seed"] = groups["run"]["seed"]
    decisive["corpus"] = dataset.corpus_sha256
    decisive["tokenizer"] = dataset.tokenizer.fingerprint
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]


def critic_cache(
    config: Config,
    dataset: Dataset,
    critics: list[Path],
    world: World,
    hardware: Hardware,
    expected: str | None = None,
) -> CriticCache | None:
    """What the critic of `config` thinks of every training window, written now where missing; None if not asked for.

    The first process asks and writes, part by part, while the others wait. critics: the runs of a model critic;
    expected: the cache that a resumed run was trained with. Raises ConfigError where the critic has changed since,
    and for a cache of other data or without room on the disk.
    """
    if config.train.objective != "avatarl" or not config.critic.cache:
        return None
    block_size, vocab_size = config.model.block_size, dataset.tokenizer.vocab_size
    windows, top = window_count(len(dataset.train), block_size), config.critic.cache_top or 2 * config.method.top_k
    layout = CacheLayout(windows, block_size, min(top, vocab_size), vocab_size)
    identity = from_first(world, lambda: critic_identity(config, dataset, critics))
    folder = cache_folder(Path(config.run.out_dir) / "critics", layout, identity)
    require(
        expected in (None, folder.name),
        "critic",
        folder.name,
        f"the run was trained from {expected}: the critic's weights have changed since; restore that critic",
    )
    if world.first:
        print(
            f"cache      {folder}: {human(layout.total_bytes, 'B')}, the {layout.top:,} likeliest of {vocab_size:,} "
            f"tokens at {windows:,} x {block_size:,} positions",
            flush=True,
        )

    def critic() -> Critic:
        frozen = load_critics(critics, dataset, hardware)
        return frozen_critic(
            config, dataset.train, vocab_size, frozen, hardware.autocast, hardware.device, dataset.strings
        )

    writer, turn = CacheWriter(folder, layout, identity), partial(from_first, world)
    turn(writer.begin)  # says what is wrong before anybody waits, and makes the folder
    try:
        with in_turn(folder, world, "this cache"):
            write_cache(writer, critic, dataset.train, hardware.device, turn=turn, quiet=not world.first)
    except KeyboardInterrupt:
        if world.first:
            print("give the same command again: it continues the cache", file=sys.stderr)
        raise
    require_seen(folder / META, world)
    return CriticCache(folder, layout, identity, verify=False)  # every part was checked or written just now


def decisive_fields(critic: CriticConfig) -> set[str]:
    """Which settings of a critic that is counted, or put together, decide its opinion besides its kind."""
    of_kind = {
        "ngram": {"ngram_context", "ngram_discount", "leave_one_out"},
        "mixed": {"mixed_context", "leave_one_out"},
        "suffix": {"suffix_context", "leave_one_out"},
    }
    fields = {"ensemble"} if critic.kind == "ensemble" else set()
    return fields.union(*(of_kind.get(kind, set()) for kind in critic.members))


def critic_identity(config: Config, dataset: Dataset, critics: list[Path]) -> Identity:
    """What decides the critic's opinion of a training window, besides the size of the windows."""
    c, data = config.critic, config.data
    facts: Identity = {
        "critic.kind": c.kind,
        "corpus": dataset.corpus_sha256,
        "tokenizer": dataset.tokenizer.fingerprint,
        "tokens": len(dataset.train),
        "data.val-fraction": 0.0 if data.val_corpus else data.val_fraction,
        "data.train-start": data.train_start,
        "data.train-stop": data.train_stop,
    }
    if "mixed" in c.members:
        facts["critic.mixed-layout"] = LAYOUT
    facts |= {f"critic.{name.replace('_', '-')}": getattr(c, name) for name in sorted(decisive_fields(c))}
    if not critics:
        return facts
    models = [dataclasses.asdict(read_config(folder)[0].model) for folder in critics]
    return facts | {"critic's models": models, "critic's weights": weight_digests(critics)}
