"""The meter of peak memory, against allocations of known size."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext

import pytest
import torch

from benchmarks import memory
from benchmarks.memory import forget_peak, held_bytes, in_use, peak_bytes

CPU = torch.device("cpu")
MIB = 2**20
measured = pytest.mark.skipif(forget_peak() is None, reason="this system does not tell a process's peak memory")


def take(*sizes: int) -> None:
    """Allocate and touch so many MiB at once, then let them go."""
    _ = [torch.ones(size * MIB, dtype=torch.uint8) for size in sizes]


def peak_of(*calls: tuple[int, ...]) -> int | None:
    """The peak of taking such sizes, MiB, call after call."""

    def take_all() -> None:
        for sizes in calls:
            take(*sizes)

    return peak_bytes(take_all, CPU)


def peak_of_crumbs() -> int | None:
    """The peak of 48 MiB in small blocks, the second time."""

    def crumbs() -> None:
        _ = [torch.ones(MIB // 16, dtype=torch.uint8) for _ in range(16 * 48)]

    crumbs()
    return peak_bytes(crumbs, CPU)


def peak_beside(size: int) -> int | None:
    """The peak of reading what was there before."""
    held = torch.ones(size * MIB, dtype=torch.uint8)
    return peak_bytes(lambda: held.max(), CPU)


@pytest.fixture(scope="module")
def afresh() -> Iterator[Callable[..., int]]:
    """Calls functions in a process of their own, as benchmarks are.

    The heap of a process with thousands of tests behind it has large gaps, and pages in them stay resident when freed.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        yield lambda function, *given: process.submit(function, *given).result()


@measured
@pytest.mark.parametrize("size", [48, 200])
def test_the_meter_finds_what_was_allocated(afresh, size):
    """Catches a meter that reads what is left after the call, or the peak of the whole process."""
    afresh(take, 300)
    assert afresh(peak_of, (size,)) == pytest.approx(size * MIB, abs=2 * MIB)


@measured
def test_the_peak_is_the_worst_moment_and_not_the_sum(afresh):
    """Catches adding up what lived one after the other, and missing what lived together."""
    assert afresh(peak_of, (64,), (64,)) == pytest.approx(64 * MIB, abs=3 * MIB)
    assert afresh(peak_of, (64, 64)) == pytest.approx(128 * MIB, abs=3 * MIB)


@measured
def test_memory_in_reserve_does_not_hide_a_call(afresh):
    """Catches small blocks that the C library serves from what an earlier call gave back."""
    assert afresh(peak_of_crumbs) == pytest.approx(48 * MIB, abs=6 * MIB)


@measured
def test_what_was_held_before_does_not_count(afresh):
    """Catches inputs that are counted as the call's own."""
    assert afresh(peak_beside, 100) == pytest.approx(0, abs=3 * MIB)


@pytest.mark.skipif(in_use(CPU) is None, reason="this C library does not tell what it has handed out")
@pytest.mark.parametrize("sizes", [[3000], [40 * MIB], [MIB // 4] * 30])
def test_what_is_held_is_counted_to_the_byte(sizes):
    """Catches a meter of pages, one that misses blocks of their own mapping, and what is dropped on the way in."""
    before = torch.ones(7 * MIB)

    def hold():
        take(64)
        return nullcontext([torch.ones(size, dtype=torch.uint8) for size in sizes])

    assert held_bytes(hold, CPU) == pytest.approx(sum(sizes), abs=4096 + 1024 * len(sizes))
    assert held_bytes(lambda: nullcontext(before.sum()), CPU) < 4096  # type: ignore[operator]


def test_a_system_that_does_not_tell_is_no_error(monkeypatch, tmp_path):
    """Catches a benchmark that dies, or reports 0, without such a file, and a lost error of the call."""
    monkeypatch.setattr(memory, "PROCESS", tmp_path)
    assert peak_bytes(lambda: None, CPU) is None
    with pytest.raises(KeyError):
        peak_bytes(lambda: {}["of the call"], CPU)  # type: ignore[index]


@pytest.mark.gpu
def test_the_meter_finds_what_was_allocated_on_a_gpu():
    """Catches a peak that includes what others hold."""
    device = torch.device("cuda")
    held = torch.ones(100 * MIB, dtype=torch.uint8, device=device)
    assert peak_bytes(lambda: torch.ones(64 * MIB, dtype=torch.uint8, device=device), device) == 64 * MIB
    del held
