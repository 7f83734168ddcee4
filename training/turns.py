"""One at a time in a folder: two that trained one run, or filled one cache, would undo each other's work."""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from config import ConfigError
from files import held
from training.distributed import World, from_first

PATIENCE = 60.0
"""Seconds after which the processes of a world hear from each other again while they wait."""
BETWEEN = 0.5
"""Seconds between two looks."""


@contextmanager
def alone(folder: Path, world: World) -> Iterator[None]:
    """Within the block nobody else trains in `folder`. Raises ConfigError, on every process, where someone does."""
    with ExitStack() as kept:
        if not from_first(world, lambda: kept.enter_context(held(folder))):
            raise ConfigError(f"{folder}: another process is training this run; let it finish, or stop it first")
        yield


@contextmanager
def in_turn(folder: Path, world: World, what: str) -> Iterator[None]:
    """Within the block nobody else works in `folder`, for whom all processes wait first; says once for `what`."""
    told = False
    with ExitStack() as kept:

        def claim() -> bool:
            nonlocal told
            until = time.monotonic() + PATIENCE
            while not kept.enter_context(held(folder)):
                kept.close()
                if not told:
                    print(f"waiting for another process, which is at {what}: {folder}", file=sys.stderr, flush=True)
                    told = True
                if time.monotonic() > until:
                    return False
                time.sleep(BETWEEN)
            return True

        while not from_first(world, claim):
            pass
        yield
