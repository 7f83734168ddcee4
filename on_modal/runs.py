"""Runs on the Volume, seen from here: which names are free, and how a folder comes back."""

import itertools
import shutil
import tempfile
import time
from pathlib import Path, PurePosixPath
from typing import Any

from checks import require
from on_modal.app import require_modal
from on_modal.container import VOLUMES


def run_names(volume: Any) -> set[str]:
    """The run folders on the Volume."""
    return {PurePosixPath(entry.path).name for entry in volume.listdir("/") if entry.type.name == "DIRECTORY"}


def open_volume() -> Any:
    """The Volume with the runs."""
    return require_modal().Volume.from_name(VOLUMES["runs"], create_if_missing=True)


def require_run(name: str, flag: str) -> None:
    """Raise ConfigError, naming the flag, where the Volume has no run of that name."""
    fix = f"no such run there; they are listed by `modal volume ls {VOLUMES['runs']}`"
    require(name in run_names(open_volume()), flag, name, fix)


def claim_name(wanted: str) -> str:
    """`wanted`, or with -2, -3, … where a run of that name exists or somebody claims it at this moment."""
    taken = run_names(open_volume())
    claims = require_modal().Dict.from_name("avatarl-run-names", create_if_missing=True)
    for number in itertools.count(1):
        name = wanted if number == 1 else f"{wanted}-{number}"
        if name not in taken and claims.put(name, time.time(), skip_if_exists=True):
            return name
    raise AssertionError("unreachable")


def pull(name: str, parent: Path) -> Path:
    """Copy the run `name` from the Volume to parent/name, whole or not at all.

    Raises ConfigError where parent/name exists or the Volume has no such run, RuntimeError when a file changed
    underneath, as it does while the run is being trained.
    """
    target = parent / name
    fix = f"{target} exists and is not overwritten; choose another --to"
    require(not target.exists(), "pull", name, fix)
    require_run(name, "pull")
    volume = open_volume()
    parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=parent))
    try:
        total = 0
        for entry in volume.listdir(f"/{name}", recursive=True):
            inside = PurePosixPath("/", entry.path).relative_to(f"/{name}")
            if entry.type.name == "FILE" and not any(part.startswith(".") for part in inside.parts):  # being written
                total += copy_file(volume, entry, temporary / inside)
        require(not target.exists(), "pull", name, fix)
        temporary.chmod(0o755)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    print(f"pulled     {target}, {total / 1e6:,.1f} MB")
    return target


def copy_file(volume: Any, entry: Any, path: Path) -> int:
    """Copy a file of the Volume to `path`; returns its bytes. Raises RuntimeError for one that is not as listed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = 0
    try:
        with open(path, "wb") as file:
            for block in volume.read_file(entry.path):
                size += file.write(block)
    except FileNotFoundError:
        size = -1
    if size != entry.size:
        raise RuntimeError(f"{entry.path} changed while it was copied, as files do while a run goes on; pull again")
    return size
