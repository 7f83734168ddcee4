"""Where the workers of one attempt meet, when torchrun has started them more than once.

torchrun keeps one key-value store for all its attempts, and PyTorch writes the addresses of each attempt's workers
under the same keys: whoever comes early reads those of the dead, and gives up. No variable of the environment tells
attempts apart on all machines (a machine that joins later counts its own restarts). So the first worker greets every
other by a word that only a living one can have said, and all go on under a prefix that no attempt had before.
"""

import os
import secrets
import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

PATIENCE = 600.0
"""Seconds that workers wait for each other."""


def torchruns_store() -> Store | None:
    """The store that torchrun keeps for its workers; None without torchrun."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=PATIENCE))


def meet(store: Store, rank: int, size: int, patience: float = PATIENCE) -> Store:
    """The part of `store` that belongs to this attempt alone; every one of its `size` workers calls this.

    Raises RuntimeError when one of them does not come within `patience` seconds.
    """
    lobby, said = PrefixStore("meet", store), secrets.token_hex(8)
    if rank == 0:
        _greet(lobby, size, said, patience)
        return PrefixStore(said, store)
    lobby.set(f"hello {rank}", said)
    try:
        lobby.wait([f"welcome {said}"], timedelta(seconds=patience))
    except RuntimeError:
        raise RuntimeError(f"process {rank} of {size} waited {patience:g} s for the first one in vain") from None
    prefix = lobby.get(f"welcome {said}").decode()
    lobby.set(f"here {prefix} {rank}", "")
    return PrefixStore(prefix, store)


def _greet(lobby: Store, size: int, prefix: str, patience: float) -> None:
    """Answer whatever the others last said, until all of this attempt have heard it."""
    missing, answered = set(range(1, size)), set[str]()
    deadline = time.monotonic() + patience
    while missing:
        for rank in sorted(missing):
            if lobby.check([f"here {prefix} {rank}"]):
                missing.remove(rank)
            elif lobby.check([f"hello {rank}"]):
                said = lobby.get(f"hello {rank}").decode()
                if said not in answered:  # of a worker that died long ago, or of one that waits now
                    lobby.set(f"welcome {said}", prefix)
                    answered.add(said)
        if missing and time.monotonic() > deadline:
            raise RuntimeError(f"processes {sorted(missing)} of {size} did not come within {patience:g} s")
        time.sleep(0.01)
