"""What a checkpoint holds besides the student's weights, by torch.distributed.checkpoint: optimisers, past, twin.

It loads on another number of processes, replicated or in shares. A file of its own, imported when there is something
to save or load, because the library takes a second to import.
"""

import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer

from training.distributed import World
from training.parallel import is_sharded


def _state(objective: nn.Module, optimizers: list[Optimizer]) -> dict[str, Any]:
    rest = {k: v for k, v in objective.state_dict().items() if not k.startswith("student.")}
    return {"optimizers": get_optimizer_state_dict(objective, optimizers), "objective": rest}


def save_state(folder: Path, objective: nn.Module, optimizers: list[Optimizer], world: World) -> None:
    """Write it into `folder`: of a sharded objective each process its shares, else the first process all of it.

    Raises RuntimeError when it cannot be written.
    """
    alone = not is_sharded(objective)
    state = _state(objective, optimizers)  # on all: an optimiser that never stepped does so first, without effect
    if alone and not world.first:  # its machine's disk may be one that nobody looks at
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dcp warns of a process group that is not there, or not used
        try:
            dcp.save(state, checkpoint_id=folder, no_dist=alone)
        except (Exception, CheckpointException) as error:
            raise RuntimeError(str(first_of(error))) from None


def load_state(folder: Path, objective: nn.Module, optimizers: list[Optimizer]) -> None:
    """Restore it in place from `folder`; all processes call this. Raises RuntimeError when it can't."""
    stored = _state(objective, optimizers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dcp.load(stored, checkpoint_id=folder)
        except (Exception, CheckpointException) as error:
            raise RuntimeError(str(first_of(error))) from None
    set_optimizer_state_dict(objective, optimizers, stored["optimizers"])
    objective.load_state_dict(stored["objective"], strict=False)


def first_of(error: BaseException) -> BaseException:
    """The first process's error, where dcp wraps those of all into one."""
    failures = error.failures if isinstance(error, CheckpointException) else None
    return next(iter(failures.values()))[0] if failures else error
