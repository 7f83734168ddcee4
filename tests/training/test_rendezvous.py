"""Workers find the workers of their own attempt in a store that remembers all attempts."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore, Store

from training.rendezvous import meet, torchruns_store


def attempt(store: Store, size: int, label: str, ranks: list[int] | None = None) -> list[set[str]]:
    """Each worker says who it is where its attempt meets; what each then hears there."""

    def worker(rank: int) -> set[str]:
        place = meet(store, rank, size, patience=20)
        place.set(str(rank), label)
        place.wait([str(r) for r in range(size)], timedelta(seconds=20))
        return {place.get(str(r)).decode() for r in range(size)}

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(worker, range(size) if ranks is None else ranks))


def test_attempts_do_not_hear_each_other():
    """Catches the addresses of dead workers, which fresh ones would call in vain."""
    store = HashStore()
    for label, size in (("first", 3), ("second", 3), ("fewer", 2), ("more", 4), ("alone", 1)):
        assert attempt(store, size, label) == [{label}] * size


def test_whoever_died_while_waiting_is_not_waited_for():
    """Catches a first worker that takes the word of a dead one for that of its successor."""
    store = HashStore()
    with pytest.raises(RuntimeError, match=r"process 1 of 3 waited 0\.05 s"):
        meet(store, 1, 3, patience=0.05)
    with pytest.raises(RuntimeError, match=r"processes \[1, 2\] of 3 did not come within 0\.05 s"):
        meet(store, 0, 3, patience=0.05)
    assert attempt(store, 3, "again") == [{"again"}] * 3


def test_the_order_of_arrival_does_not_matter():
    """Catches a worker that is heard only when it comes after the first."""
    assert attempt(HashStore(), 3, "late first", ranks=[2, 1, 0]) == [{"late first"}] * 3


def test_without_torchrun_there_is_no_store_of_its(monkeypatch):
    """Catches a plain run, or one whose environment was set by hand, that calls an address nobody listens on."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert torchruns_store() is None
