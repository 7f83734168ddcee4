"""Whether all processes see the same folder, asked before anything depends on it.

A run's first process writes for all, so the others need not share its disk, until they have to read: to continue the
run, or a critic that was trained for it. Under FSDP each writes its shares of a checkpoint into the same folder; on
another machine's own disk they would be lost, and nobody would know before the run is resumed.
"""

import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path

from config import ConfigError
from files import write_atomic
from training.distributed import World, from_all, from_first

PATIENCE = 30.0
"""Seconds that a file written elsewhere may take to appear: network file systems remember what was not there."""


def require_seen(path: Path, world: World) -> None:
    """Raise ConfigError on every process where the first one has the file `path` and another does not see it."""
    if world.size > 1 and from_first(world, path.is_file):
        _require_all(path.is_file, path, world)


def require_shared(folder: Path, world: World) -> None:
    """Make `folder` where it is missing; raise ConfigError on every process unless all see what the first writes there.

    Nothing for a world of one.
    """
    if world.size == 1:
        return
    name = from_first(world, lambda: _left_in(folder))
    path = folder / name
    try:
        _require_all(path.is_file, path, world)
    finally:
        if world.first:
            path.unlink(missing_ok=True)


def _left_in(folder: Path) -> str:
    """The name of a new file in `folder`, one that no other job has there."""
    name = f".seen-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, "")
    except OSError as error:
        raise ConfigError(f"run.out-dir: cannot write to {folder} ({error.strerror}); use another folder") from None
    return name


def _require_all(seen: Callable[[], bool], path: Path, world: World) -> None:
    deadline = time.monotonic() + PATIENCE
    while not seen() and time.monotonic() < deadline:
        time.sleep(0.1)
    found = from_all(world, None if seen() else f"process {world.rank} on {socket.gethostname()}")
    blind = [who for who in found if who is not None]
    if blind:
        others = f" and {len(blind) - 1} more" if len(blind) > 1 else ""
        raise ConfigError(
            f"run.out-dir: {path.parent} is on the first machine's own disk: {blind[0]}{others} cannot see {path.name} "
            "there; all machines need that folder on a file system that they share, under the same path"
        )
