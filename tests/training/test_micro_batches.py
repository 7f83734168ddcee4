"""A step's sequences, shared by processes: all of them once, in micro-batches that fit wherever they fit before."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from config import ConfigError, TrainConfig, preset
from training.micro_batches import micro_batches, rows_of


@given(micro=st.integers(1, 12), accumulated=st.integers(1, 24), processes=st.integers(1, 40))
def test_every_row_is_one_processes_and_none_is_cut_larger(micro, accumulated, processes):
    """Catches rows that nobody or two have, micro-batches of unequal weight, and one that outgrows the memory."""
    batch = micro * accumulated
    assume(batch % processes == 0)
    train = TrainConfig(batch_size=batch, grad_accum=accumulated)
    parts = [rows_of(train, rank, processes) for rank in range(processes)]
    flat = [row for rows in parts for begin, end in rows for row in range(begin, end)]
    assert flat == list(range(batch))
    assert {len(rows) for rows in parts} == {micro_batches(train, processes)}
    sizes = {end - begin for rows in parts for begin, end in rows}
    assert len(sizes) == 1 and sizes.pop() <= micro


@pytest.mark.parametrize(
    ("processes", "parts"), [(1, 20), (2, 10), (8, 3), (16, 2), (24, 1), (32, 1), (6, 4), (480, 1)]
)
def test_the_large_presets_run_on_any_number_of_nodes(processes, parts):
    """Catches a preset for one GPU that refuses two nodes, or accumulates twenty times on each of many GPUs."""
    assert micro_batches(preset("avatarl-250m").train, processes) == parts


def test_one_process_accumulates_as_it_is_told():
    """Catches a rule that is cleverer than the user on one process."""
    for accumulated in (1, 2, 3, 4, 6, 12):
        assert micro_batches(TrainConfig(batch_size=12, grad_accum=accumulated), 1) == accumulated


@pytest.mark.parametrize(("processes", "near"), [(5, "10 or 15"), (7, "7 or 14"), (13, "13")])
def test_a_batch_that_does_not_divide_is_refused(processes, near):
    """Catches sequences that are dropped, or counted twice, where a machine more or fewer does not fit."""
    with pytest.raises(ConfigError, match=rf"train\.batch-size = 12: .* {processes} processes, as {near} would"):
        micro_batches(TrainConfig(batch_size=12), processes)
