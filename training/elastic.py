"""Restarts by torchrun: the workers that it starts anew find the run that their predecessors began.

torchrun starts its workers again after a failure (`--max-restarts`), and when a machine joins or leaves. A run
folder's launch.json names the torchruns (one a machine) that work on it; workers of any of these continue that run.
Another torchrun, though its command be the same, has another name, and its runs get folders of their own.
"""

import json
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path

from files import write_json
from training.distributed import World, from_all, from_first

RECORD = "launch.json"


def torchrun_name() -> str | None:
    """The torchrun that started this process, by a name that no other has; None where there is none.

    The folder of its logs is made new for each, and the file for a worker's errors lies three levels below it.
    """
    errors = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return f"{socket.gethostname()}:{Path(errors).parents[2]}" if errors else None


def torchruns(world: World) -> list[str]:
    """The names of all machines' torchruns, the same on every process; empty without torchrun."""
    return sorted({name for name in from_all(world, torchrun_name()) if name is not None})


def sign(folder: Path, names: Sequence[str]) -> None:
    """Note in a run's folder that these torchruns work on it, besides those that did; nothing without any."""
    if names:
        write_json(folder / RECORD, {"torchruns": sorted({*names, *signed(folder)})})


def signed(folder: Path) -> list[str]:
    """The torchruns that worked on the run in `folder`."""
    try:
        return list(json.loads((folder / RECORD).read_text(encoding="utf-8"))["torchruns"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def begun(out_dir: str, name: str, world: World) -> Path | None:
    """The folder of the run `name` that these torchruns began below out_dir, on every process; None if they did not."""
    names = torchruns(world)

    def look() -> Path | None:
        runs = [p.parent for p in Path(out_dir).glob(f"*/{RECORD}")]
        named = [run for run in runs if re.fullmatch(re.escape(name) + r"(-\d+)?", run.name)]
        return next((run for run in named if set(signed(run)) & set(names)), None)

    return from_first(world, look) if names else None
