"""How arms take turns."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import timing
from benchmarks.timing import Arm, in_turn, measure, settle
from tests.benchmarks.conditions import conditions


class Clock:
    """A time that passes only where an arm lets it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def arm(self, name: str, seconds: float) -> Arm:
        def run() -> None:
            self.now += seconds
            self.calls.append(name)

        return Arm(name, run)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing, "time", made)
    return made


@given(st.integers(1, 12))
def test_every_arm_takes_every_place_equally_often(count):
    """Catches an arm that always follows the same neighbour, warm from it or throttled by it."""
    rounds = [in_turn(count, r) for r in range(3 * count)]
    assert all(sorted(order) == list(range(count)) for order in rounds)
    for place in range(count):
        assert set(Counter(order[place] for order in rounds).values()) == {3}


def test_arms_take_turns_and_are_timed_one_by_one(clock, tmp_path):
    """Catches blocks of one arm after the other, and times that go to the wrong arm."""
    arms = [clock.arm("a", 1.0), clock.arm("b", 2.0), clock.arm("c", 3.0)]
    table = measure("turns", arms, conditions(tmp_path, rounds=4, seconds=1e9))
    assert "".join(clock.calls) == "aabbcc" + "abc" + "bca" + "cab" + "abc" + "abc"  # warm-up, rounds, memory
    assert [row.seconds for row in table.rows] == [[1.0] * 4, [2.0] * 4, [3.0] * 4]
    assert [row.first_seconds for row in table.rows] == [1.0, 2.0, 3.0]


def test_short_arms_are_called_until_the_clock_can_tell(clock, tmp_path):
    """Catches timings of single microsecond calls, and sums reported as if they were one call's time."""
    table = measure("short", [clock.arm("a", 1 / 1024), clock.arm("b", 1 / 256)], conditions(tmp_path))
    assert table.repeats == 52  # of the fastest arm in 0.05 s
    assert table.row("a").seconds == pytest.approx([1 / 1024] * 3)
    assert clock.calls.count("a") == clock.calls.count("b") == 2 + 3 * 52 + 1


def test_a_table_ends_when_its_time_is_over(clock, tmp_path):
    """Catches a budget that is ignored, one that cuts a round in half, and one that leaves nothing to compare."""
    arms = [clock.arm("a", 1.0), clock.arm("b", 1.0)]
    table = measure("short of time", arms, conditions(tmp_path, rounds=50, seconds=20.0), share=0.5)
    assert [len(row.seconds) for row in table.rows] == [4, 4]  # 4 s of warm-up, then rounds of 2 s to 12 s
    table = measure("no time", arms, conditions(tmp_path, rounds=50, seconds=0.0))
    assert [len(row.seconds) for row in table.rows] == [timing.FEWEST_ROUNDS] * 2


def test_an_arm_that_cannot_run_leaves_the_others_alone(clock, tmp_path):
    """Catches a lack of memory in one arm that costs the whole table."""

    def fail() -> None:
        raise RuntimeError("out of memory\nand a long trace")

    table = measure("one fails", [clock.arm("a", 1.0), Arm("b", fail)], conditions(tmp_path))
    assert table.row("b").failed == "out of memory" and table.row("b").seconds == []
    assert len(table.row("a").seconds) == 3


def test_every_arm_runs_in_its_own_precision(quick, tmp_path):
    """Catches an arm that is timed in the float32 precision that its neighbour left behind."""
    seen: dict[str, set[str]] = {"highest": set(), "medium": set()}

    def looking(name: str) -> Arm:
        return Arm(name, lambda: seen[name].add(torch.get_float32_matmul_precision()), precision=name)

    arms = [looking(name) for name in seen]
    measure("precisions", arms, conditions(tmp_path))
    torch.set_float32_matmul_precision("highest")
    assert seen == {"highest": {"highest"}, "medium": {"medium"}}


def test_settling_starts_from_full_precision(tmp_path):
    """Catches a float32 baseline in the reduced precision of whatever was timed before it."""
    torch.set_float32_matmul_precision("medium")
    hardware, precision = settle(conditions(tmp_path), dtype="float32")
    assert (hardware.dtype, precision) == (torch.float32, "highest")
    assert settle(conditions(tmp_path), dtype="float32", precision="medium")[1] == "medium"
    torch.set_float32_matmul_precision("highest")
