"""A hybrid run from its settings to its report: three phases, the arms it is compared with, resumed where it stopped.

    runs/hybrid/config.json, result.json, report.md, report.html
    runs/hybrid/grpo/               phase 1, a run folder
    runs/hybrid/practice/           phase 2: its metrics.jsonl (a step is a round) and the surgeon as it left it
    runs/hybrid/surgeon/            phase 3 with the surgeon, a run folder, plus surgeries.jsonl and surgeries/
    runs/hybrid/random/             phase 3 with random edits under the same rule
    runs/hybrid/none/               phase 3 with nobody: the same number of tokens …
    runs/hybrid/none-same-time/     … and on from there, for the wall time that surgery took

Every part writes its own checkpoints, and a part that is complete is not repeated: resuming walks through all of them
and continues the one that stopped. Source: DESIGN section 9.
"""

import dataclasses
import json
import secrets
import sys
from pathlib import Path
from typing import Any

import torch

from avatarl.critics import Critic, ModelCritic
from avatarl.mixed import MixedCritic
from avatarl.ngram import NgramCritic
from config import Config, ConfigError, require
from critic_runs import critic_cache, critic_runs
from data.prepare import Dataset, prepare
from data.tokenizers import load_tokenizer
from files import write_json
from launch import check_settings, load_data, require_same_critics
from model import GPT
from one_run import ladder_of, load_critic, new_record, require_fair, require_unread, training_span
from surgery.commits import HeldOut
from surgery.env import SurgeryTask, batched_env_class
from surgery.judge import TextJudge
from surgery.outcome import conclude
from surgery.phases import GRPO, as_long_as_surgery, both, grpo_alone, practise, same_time_wanted
from surgery.settings import HybridConfig, SurgeryConfig, held_out_data, shared_config
from surgery.student import Shared
from training.distributed import World
from training.hardware import Hardware, prepare_model
from training.run_folder import new_run_folder
from training.turns import alone


def start(config: Config, hybrid: HybridConfig, preset: str, hardware: Hardware) -> tuple[int, Path]:
    """Run a new hybrid experiment on the student of `config`; returns its exit code and folder.

    `preset` names the student's settings in the record. Raises ConfigError for settings that cannot work.
    """
    shared, code = prepared(Path(), shared_config(config, hybrid), hybrid, hardware, {"preset": preset})
    if code:
        return code, shared.folder
    folder = new_run_folder(config.run.out_dir, config.run.name or "hybrid")
    part = new_record(shared.config, preset, shared.dataset, hardware, shared.critics, shared.cache)
    part |= {"hybrid": hybrid.to_dict(), "held_out_tokens": len(shared.held_out)}
    shared = dataclasses.replace(shared, folder=folder, record=part)
    shared.dataset.tokenizer.save(folder / "tokenizer.json")
    (folder / GRPO).mkdir()
    shared.dataset.tokenizer.save(folder / GRPO / "tokenizer.json")
    write_json(folder / GRPO / "config.json", part | {"arm": GRPO})
    write_json(folder / "config.json", part | {"id": secrets.token_hex(4)})
    with alone(folder, World()):
        return conduct(shared), folder


def resume(
    folder: Path, config: Config, hybrid: HybridConfig, record: dict[str, Any], hardware: Hardware
) -> tuple[int, Path]:
    """Continue the hybrid run in `folder`, whose config.json says `record`. Raises ConfigError for another corpus."""
    shared, code = prepared(folder, config, hybrid, hardware, record)
    if code:
        return code, folder
    require_same_critics(shared.critics, record, World())
    with alone(folder, World()):
        return conduct(shared), folder


def read_hybrid(folder: Path) -> tuple[Config, HybridConfig, dict[str, Any]]:
    """Settings and record of a hybrid run. Raises ConfigError for a folder that is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder}: no run of hybrid.py, it has no config.json")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Config.from_dict(record["config"]), HybridConfig.from_dict(record["hybrid"]), record
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not readable as a run of hybrid.py ({error}); give its folder") from None


def prepared(
    folder: Path, config: Config, hybrid: HybridConfig, hardware: Hardware, record: dict[str, Any]
) -> tuple[Shared, int]:
    """Data, held-out text, critics: everything that is checked before a folder is made; and an exit code."""
    world = World()
    tokenizer = load_tokenizer(folder / "tokenizer.json") if "corpus" in record else None
    dataset = load_data(config, world, tokenizer)
    if "corpus" in record:
        known = record["corpus"]["sha256"]
        fix = f"its text is not the one that {folder.name} was trained on (sha256 {known[:12]}…)"
        require(dataset.corpus_sha256 == known, "data.corpus", dataset.corpus_source, fix)
    check_settings(config, dataset)
    decisive = held_out_data(config, hybrid)
    judging = config.critic.run if "model" in config.critic.members else ""
    for flag, run in (("critic.run", judging), ("surgery.judge-run", hybrid.surgery.judge_run)):
        if run:  # what no run may have read, before what only this kind keeps aside
            require_fair(Path(run), config, dataset, flag)
            require_unread(Path(run), dataset, training_span(decisive), "text that decides on edits", flag)
    held_out = prepare(decisive, dataset.tokenizer).train
    HeldOut(held_out, config.model.block_size, windows=hybrid.accept.windows, seed=config.run.seed)
    fix = "two windows of validation text at least; use a larger data.val-fraction, or a shorter context"
    require(len(dataset.val) > 2 * config.model.block_size, "model.block-size", config.model.block_size, fix)
    judge = None
    if set(hybrid.arms) - {"none"}:
        batched_env_class()  # says now, not after phase 1, that a library is missing
        judge = judge_of(hybrid.surgery, config, dataset, hardware)
        SurgeryTask(GPT(config.model, dataset.tokenizer.vocab_size), judge, dataset.train, hybrid.surgery)
    critics, code = critic_runs(config, dataset, world, hardware)
    cache = None if code else critic_cache(config, dataset, critics, world, hardware, record.get("critic_cache"))
    return Shared(folder, config, hybrid, record, dataset, held_out, critics, cache, judge, hardware), code


def judge_of(settings: SurgeryConfig, config: Config, dataset: Dataset, hardware: Hardware) -> TextJudge | None:
    """Whoever judges what candidates write, from the training split; None where rewards need no texts."""
    if settings.reward != "text":
        return None
    c, tokenizer, device = config.critic, dataset.tokenizer, hardware.device
    vocab_size = tokenizer.vocab_size
    critic: Critic
    if settings.judge == "ngram":
        critic = NgramCritic(
            dataset.train, vocab_size, context=c.ngram_context, discount=c.ngram_discount, device=device
        )
    elif settings.judge == "mixed":
        critic = MixedCritic(dataset.train, vocab_size, context=c.mixed_context, strings=dataset.strings, device=device)
    else:
        folder = Path(settings.judge_run)
        model = prepare_model(load_critic(folder, dataset), hardware)
        length = settings.prompt_tokens + settings.new_tokens
        critic = ModelCritic(model, vocab_size, length, hardware.autocast)
    lengths = None
    if tokenizer.kind != "char":
        lengths = torch.tensor([len(tokenizer.decode([i])) for i in range(vocab_size)], device=device)
    return TextJudge(
        critic,
        diversity_weight=settings.diversity_weight,
        repetition_weight=settings.repetition_weight,
        lengths=lengths,
    )


def conduct(shared: Shared) -> int:
    """All parts in turn, each from where it stands; the exit code."""
    announced(shared)
    code = grpo_alone(shared)
    if code == 0 and "surgeon" in shared.hybrid.arms:
        code = practise(shared)
    for arm in shared.hybrid.arms:
        code = code or both(shared, arm)
    if code == 0 and same_time_wanted(shared.hybrid):
        code = as_long_as_surgery(shared)
    if code:
        print(f"stopped; continue with: python hybrid.py --resume {shared.folder}", file=sys.stderr)
        return code
    conclude(shared)
    return 0


def announced(shared: Shared) -> None:
    """Say what is about to run."""
    config, hybrid, phases = shared.config, shared.hybrid, shared.hybrid.phases
    layers, s = hybrid.surgery.operated(config.model.n_layer), hybrid.surgery
    print(f"hybrid     {shared.folder}  (arms: {', '.join(hybrid.arms)})")
    print(
        f"phases     at most {phases.grpo_steps:,} steps alone, {phases.surgeon_rounds:,} rounds of {s.candidates} "
        f"surgeries, {phases.both_steps:,} steps of both"
    )
    print(f"surgery    {hybrid.surgeon} on blocks {', '.join(map(str, layers))}, {s.rank} singular values of each")
    print(f"ladder     {ladder_of(shared.folder / GRPO, config, shared.dataset)}", flush=True)
