"""One part of a hybrid run, as a run folder of its own: opened for training, forked from another, looked at afterwards.

Phase 1 and every arm of phase 3 are runs like train.py's: sample.py, evaluate.py, export.py and report.py take them.
An arm begins as a copy of phase 1, checkpoints and curves included, so that it goes on where that one stood: with
nobody operating, bit for bit the run that `python train.py` would make of the same settings.
"""

import contextlib
import json
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import Config
from data.batches import validation_windows
from data.critic_cache import CriticCache
from data.prepare import Dataset
from files import sync_folder, write_json
from model import GPT
from one_run import make_objective, write_result
from reporting.read import NOT_FINITE
from surgery.commits import window_losses
from surgery.companion import LOG
from surgery.judge import TextJudge
from surgery.settings import HybridConfig
from train_core import Job
from training import checkpoint as checkpoints
from training.checkpoint import TrainState
from training.distributed import World
from training.hardware import Hardware, prepare_model
from training.optim import build_optimizers
from training.record import Recorder, start_wandb
from training.run_folder import load_run, trim_metrics, trim_samples


@dataclass(frozen=True)
class Shared:
    """What all parts of a hybrid run have in common."""

    folder: Path
    """The hybrid run's; its parts are folders in it."""
    config: Config
    hybrid: HybridConfig
    record: dict[str, Any]
    """config.json of the hybrid run."""
    dataset: Dataset
    held_out: np.ndarray
    """(L,) tokens of the training text that decide on edits."""
    critics: list[Path]
    cache: CriticCache | None
    judge: TextJudge | None
    """Whoever judges texts, for rewards that ask for it."""
    hardware: Hardware


@contextlib.contextmanager
def opened(shared: Shared, folder: Path, until: int) -> Iterator[Job]:
    """The run in `folder` as a job, from its newest checkpoint or from the start, to be trained up to step `until`."""
    config, hardware = shared.config, shared.hardware
    objective = make_objective(config, shared.dataset, shared.critics, hardware, shared.cache)
    optimizers = build_optimizers(objective, config.optim, hardware.dtype)
    place = newest(folder)
    state = checkpoints.load(place, objective, optimizers) if place else TrainState()
    for log in ("metrics.jsonl", LOG):
        trim_metrics(folder / log, state.step if place else -1)
    trim_samples(folder / "samples.txt", state.step if place else -1)
    wandb = start_wandb(config, folder, read_record(folder), resume=place is not None)
    with Recorder(folder, first=True, steps=until, start=state.step, wandb=wandb) as recorder:
        yield Job(
            config,
            shared.dataset,
            objective,
            optimizers,
            hardware,
            World(),
            folder,
            recorder,
            state,
            shared.cache,
            until=until,
        )


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of the run in `folder`; None where none was written yet."""
    place = folder / "checkpoints"
    return checkpoints.find(place) if checkpoints.stored(place) else None


def read_record(folder: Path) -> dict[str, Any]:
    """A part's config.json."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def finished(folder: Path) -> dict[str, Any] | None:
    """A part's result.json; None where it is not complete."""
    path = folder / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def close(job: Job, **more: Any) -> None:
    """Mark a part as complete, with `more` in its config.json."""
    write_json(job.folder / "config.json", read_record(job.folder) | more | {"until": job.state.step})
    write_result(job)


def fork(source: Path, target: Path, **more: Any) -> None:
    """Make `target` a run that goes on where the complete run `source` stands; whole or not at all.

    `more` goes into its config.json. Nothing is done where it is there already.
    """
    if target.is_dir():
        return
    temporary = target.parent / f".{target.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, ignore=shutil.ignore_patterns("result.json", "report.html", "wandb"))
    write_json(temporary / "config.json", read_record(source) | {"id": secrets.token_hex(4)} | more)
    sync_folder(temporary)
    temporary.rename(target)


def frozen_student(shared: Shared, folder: Path) -> GPT:
    """The model of a part, at its newest checkpoint, ready to be looked at and operated on."""
    run = load_run(folder, "latest", shared.hardware.device)
    return prepare_model(run.model, shared.hardware).eval().requires_grad_(False)


def validation_losses(shared: Shared, folder: Path) -> Tensor:
    """Cross-entropy of every whole window of the validation split under a part's last weights: (W,) float64."""
    config, model = shared.config, frozen_student(shared, folder)
    batches = list(validation_windows(shared.dataset.val, config.model.block_size, config.eval.batch_size))
    tokens, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    whole = (targets >= 0).all(1)
    return window_losses(model, tokens[whole], targets[whole], shared.hardware)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of a part: lines of metrics.jsonl with val/…, numbers that were not finite as floats."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    told = [{k: NOT_FINITE.get(v, v) if isinstance(v, str) else v for k, v in line.items()} for line in lines]
    return list({line["step"]: line for line in told if "val/ce" in line}.values())
