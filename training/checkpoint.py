"""Checkpoints: written whole or not at all, found again even when the newest is broken.

    checkpoints/step-000500/model.safetensors   the student's weights
    checkpoints/step-000500/state/              the rest, by torch.distributed.checkpoint: optimisers, the
                                                student's past or twin; loads on another number of processes
    checkpoints/step-000500/meta.json           step, counters, size and checksum of every file
    checkpoints/latest, checkpoints/best        the names of those

No generator's state is saved: every draw is keyed by (seed, step), so the step is enough.
"""

import json
import math
import shutil
import sys
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from config import ConfigError
from files import sync_folder, write_atomic, write_json
from model import GPT
from training.distributed import World, barrier
from training.parallel import cut_like, whole

WEIGHTS = "model.safetensors"


@dataclass
class TrainState:
    """Where a run stands: everything that resuming needs besides weights and optimisers."""

    step: int = 0
    """Optimiser steps done, skipped ones included."""
    seconds: float = 0.0
    """Training time so far, evaluation and checkpoints excluded."""
    bad_steps: int = 0
    """Steps skipped for a loss or gradient that was not finite."""
    bad_in_a_row: int = 0
    """How many of them were the latest."""
    val_ce: float | None = None
    """Validation cross-entropy when last measured, nats."""
    val_step: int = -1
    """The step at which it was measured."""
    best_ce: float | None = None
    """The lowest validation cross-entropy at a checkpoint, nats."""


class BrokenCheckpoint(RuntimeError):
    """A checkpoint that cannot be read: which one, what is wrong with it."""


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def save(
    folder: Path,
    objective: nn.Module,
    optimizers: list[Optimizer],
    state: TrainState,
    world: World,
    *,
    keep: int,
    beside: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint of `state.step` below `folder`, move `latest` and `best`, drop what is too old.

    `beside` may write more files into its folder, which are checked like the others.

    All processes call it. Returns the checkpoint's folder. Raises RuntimeError when it cannot be written; what
    stood before then stands as before.
    """
    target = folder / checkpoint_name(state.step)
    try:
        _write(folder, target, objective, optimizers, state, world, keep, beside)
    except Exception as error:
        shutil.rmtree(folder / f".{target.name}", ignore_errors=True)
        on = f"continue with --resume {folder.parent}" if stored(folder) else "start again: it was the first"
        raise RuntimeError(
            f"{target}: the checkpoint cannot be written ({first_line(error)}); make room or choose another disk, "
            f"then {on}"
        ) from None
    return target


def _write(
    folder: Path,
    target: Path,
    objective: nn.Module,
    optimizers: list[Optimizer],
    state: TrainState,
    world: World,
    keep: int,
    beside: Callable[[Path], None] | None,
) -> None:
    from training.stored_state import save_state

    temporary = folder / f".{target.name}"
    if world.first:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(".step-*"):
            shutil.rmtree(left_over)
        temporary.mkdir()
    barrier()
    save_state(temporary / "state", objective, optimizers, world)
    measured = state.val_ce is not None and math.isfinite(state.val_ce) and state.val_step == state.step
    improved = measured and (state.best_ce is None or state.val_ce < state.best_ce)  # type: ignore[operator]
    if improved:
        state.best_ce = state.val_ce
    weights = {}
    for name, tensor in objective.student.state_dict().items():  # type: ignore[union-attr,operator]
        full = whole(tensor.detach())  # of a sharded student: a collective call, one tensor at a time
        if world.first:
            weights[name] = full.cpu().contiguous()
    if world.first:
        save_file(weights, temporary / WEIGHTS)
        if beside is not None:
            beside(temporary)
        files = {str(p.relative_to(temporary)): p for p in temporary.rglob("*") if p.is_file()}
        sizes = {name: p.stat().st_size for name, p in files.items()}
        sums = {name: checksum(p) for name, p in files.items()}
        write_json(temporary / "meta.json", {"state": asdict(state), "sizes": sizes, "crc32": sums})
        sync_folder(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        sync_folder(folder)
        best = _best(folder, state.best_ce)
        if best is not None and best.name != _pointer(folder, "best"):
            write_atomic(folder / "best", best.name + "\n")
        write_atomic(folder / "latest", target.name + "\n")
        _prune(folder, target, keep)
    barrier()


def stored(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, whole or not, oldest first."""
    return sorted(folder.glob("step-*"), key=lambda p: (len(p.name), p.name))  # past a million steps too


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Delete all but the `keep` checkpoints up to `newest` and the best.

    Later ones are broken: the run was resumed from before them.
    """
    steps = stored(folder)
    here = steps.index(newest) + 1
    best = _pointer(folder, "best")
    for old in steps[: max(0, here - keep)] + steps[here:]:
        if old.name != best:
            shutil.rmtree(old)


def _best(folder: Path, best_ce: float | None) -> Path | None:
    """The newest checkpoint below `folder` at which `best_ce` was measured; None where none was, or it is gone.

    Asked of all of them, not only of the newest: a run can be killed between a checkpoint and its pointer.
    """
    for checkpoint in reversed(stored(folder)):
        try:
            state = json.loads((checkpoint / "meta.json").read_text())["state"]
            if best_ce is not None and state["val_ce"] == best_ce and state["val_step"] == state["step"]:
                return checkpoint
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a broken one, which `check` will name when it is asked for
    return None


def _pointer(folder: Path, name: str) -> str | None:
    path = folder / name
    return path.read_text().strip() if path.is_file() else None


def check(checkpoint: Path) -> dict[str, Any]:
    """The meta.json of a checkpoint whose files are all there, whole and unaltered, else BrokenCheckpoint."""
    try:
        meta = json.loads((checkpoint / "meta.json").read_text())
        sizes = meta["sizes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrokenCheckpoint(f"{checkpoint}: meta.json is missing or unreadable ({error})") from None
    for name, size in sizes.items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} of {size} bytes"
            raise BrokenCheckpoint(f"{checkpoint}: {name} {what}")
    for name, crc32 in meta.get("crc32", {}).items():
        if checksum(checkpoint / name) != crc32:
            raise BrokenCheckpoint(f"{checkpoint}: {name} does not match its checksum")
    return meta


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def find(folder: Path, which: str = "latest") -> Path:
    """The checkpoint that `which` names below `folder`: "latest", "best" or a name such as "step-000500".

    latest skips broken checkpoints, with a warning that names each, for the one before. best falls back on
    latest where nothing was evaluated. Raises ConfigError when there is none, BrokenCheckpoint for a broken
    one that was asked for.
    """
    names = [p.name for p in reversed(stored(folder))]
    if not names:
        raise ConfigError(f"{folder}: no checkpoint there yet; train first, or name another run")
    if which == "best":
        best = _pointer(folder, "best")
        if best is None:
            return find(folder, "latest")
        check(folder / best)
        return folder / best
    if which == "latest":
        for name in names:
            try:
                check(folder / name)
                return folder / name
            except BrokenCheckpoint as error:
                print(f"warning: skipped a broken checkpoint: {error}", file=sys.stderr)
        raise BrokenCheckpoint(f"{folder}: none of its {len(names)} checkpoints is whole")
    if which not in names:
        raise ConfigError(f"checkpoint {which!r}: not in {folder}; there are {', '.join(reversed(names))}")
    check(folder / which)
    return folder / which


def load_weights(checkpoint: Path, model: GPT) -> None:
    """Put a checkpoint's weights into `model`. Raises BrokenCheckpoint when they cannot be read or don't fit."""
    try:
        like = model.state_dict()
        stored = load_file(checkpoint / WEIGHTS)
        model.load_state_dict({k: cut_like(v, like[k]) if k in like else v for k, v in stored.items()})
    except Exception as error:  # safetensors raises its own kinds; all mean the same to the user
        raise BrokenCheckpoint(f"{checkpoint / WEIGHTS}: cannot be loaded ({first_line(error)})") from None


def load(checkpoint: Path, objective: nn.Module, optimizers: list[Optimizer]) -> TrainState:
    """Restore objective and optimisers in place from a checkpoint; returns where the run stood."""
    from training.stored_state import load_state

    state = TrainState(**check(checkpoint)["state"])
    load_weights(checkpoint, objective.student)  # type: ignore[arg-type]
    try:
        load_state(checkpoint / "state", objective, optimizers)
    except Exception as error:
        raise BrokenCheckpoint(f"{checkpoint / 'state'}: cannot be loaded ({first_line(error)})") from None
    return state


def first_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def seed_everything(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Key this process's generators by (seed, step, rank), so that resume needs no saved state.

    torch.manual_seed would ask every kind of accelerator each time, and remember a stack trace for each absent one.
    """
    key = (seed * 1_000_003 + step) * 4_099 + rank
    torch.default_generator.manual_seed(key)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(key)
