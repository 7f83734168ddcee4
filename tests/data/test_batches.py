"""What a step trains on: shifted targets, slices, epochs, positions; and that validation misses nothing."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config import ConfigError
from data.batches import Batch, TrainingBatches, one_ahead, prefetch, validation_windows, window_count
from data.critic_cache import CacheLayout
from tests.data.test_critic_cache import written

fast = settings(deadline=None, max_examples=80)
lengths = st.integers(2, 300)
blocks = st.integers(1, 40)


def stream(length: int) -> np.ndarray:
    """Tokens that are their own offset, so that every window says where it came from."""
    return np.arange(length, dtype=np.uint16)


def tensors(batch: Batch) -> list[torch.Tensor]:
    """Everything that a batch holds."""
    assert batch.positions is not None
    return [batch.tokens, batch.targets, batch.positions, batch.indices, *(batch.judged or ())]


@fast
@given(lengths, st.integers(1, 40), st.integers(1, 9), st.integers(-3, 2**64), st.integers(0, 50), st.booleans())
def test_targets_are_the_next_tokens(length: int, block: int, rows: int, seed: int, step: int, fixed: bool) -> None:
    """Catches a model that learns to copy its input, and positions that are not the offset of the window."""
    if length <= block:
        return
    batches = TrainingBatches(stream(length), block, rows, seed, fixed)
    tokens, targets, positions, indices, judged, first = batches.batch(step)
    assert positions is not None and judged is None and first == step * rows
    assert tokens.shape == targets.shape == (rows, block)
    assert {part.dtype for part in (tokens, targets, positions, indices)} == {torch.int64}
    assert torch.equal(tokens, positions[:, None] + torch.arange(block))
    assert torch.equal(targets, tokens + 1)
    assert torch.equal(indices, step * rows + torch.arange(rows))
    assert targets.max() < length and tokens.is_contiguous() and targets.is_contiguous()


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_slices_are_parts_of_the_same_global_batch(processes: int) -> None:
    """Catches data that depends on the number of processes or micro-batches."""
    for step in (0, 3, 1000):
        whole = TrainingBatches(stream(5000), 16, 24, seed=5).batch(step)
        share = 24 // processes
        parts = [
            TrainingBatches(stream(5000), 16, 24, seed=5).batch(step, rank * share, (rank + 1) * share)
            for rank in range(processes)
        ]
        for here, there in zip(zip(*map(tensors, parts), strict=True), tensors(whole), strict=True):
            assert torch.equal(torch.cat(here), there)


@fast
@given(lengths, blocks, st.booleans())
def test_an_epoch_covers_every_window_once(length: int, block: int, fixed: bool) -> None:
    """Catches an epoch that repeats or drops windows, overlaps them, or counts one per overlapping window."""
    if length <= block:
        return
    batches = TrainingBatches(stream(length), block, 1, seed=7, fixed_offset=fixed)
    count = batches.windows_per_epoch
    assert count == max(1, (length - block) // block) and batches.steps_per_epoch == count
    for epoch in range(2):
        starts = sorted(int(batches.batch(epoch * count + i).tokens[0, 0]) for i in range(count))
        offset = starts[0]
        assert starts == list(range(offset, offset + count * block, block))
        assert offset < block and (offset == 0 or not fixed)


def test_epochs_differ_in_order_and_offset() -> None:
    """Catches one order or one tiling for the whole run (chance that 20 offsets of 50 agree: 50 ** -19)."""
    batches = TrainingBatches(stream(1000), 50, 19, seed=1)
    epochs = [batches.batch(i).positions for i in range(20)]
    assert batches.windows_per_epoch == 19
    assert len({int(e.min()) for e in epochs if e is not None}) > 1
    assert len({tuple((e - e.min()).tolist()) for e in epochs if e is not None}) == 20


def test_batches_straddle_epochs() -> None:
    """Catches a short, repeated or shifted batch where an epoch ends, also when one batch spans several."""
    single = TrainingBatches(stream(100), 10, 1, seed=2)
    for rows in (4, 7, 31):
        batches = TrainingBatches(stream(100), 10, rows, seed=2)
        for step in range(5):
            one_by_one = [single.batch(step * rows + row).tokens for row in range(rows)]
            assert torch.equal(batches.batch(step).tokens, torch.cat(one_by_one))


def test_batches_depend_on_the_seed_and_nothing_else() -> None:
    """Catches hidden state: a resumed run must see what the uninterrupted one would have."""
    run = TrainingBatches(stream(3000), 32, 12, seed=3)
    seen = [run.batch(step).tokens for step in range(40)]
    resumed = TrainingBatches(stream(3000), 32, 12, seed=3)
    for step in (39, 0, 17, 18):
        assert torch.equal(resumed.batch(step).tokens, seen[step])
    other = TrainingBatches(stream(3000), 32, 12, seed=4)
    assert not torch.equal(other.batch(0).tokens, seen[0])


def test_text_that_is_too_short_and_rows_that_are_not_there() -> None:
    """Catches a window without its last target, and a rank that silently trains on nothing."""
    assert TrainingBatches(stream(11), 10, 3, seed=0).batch(2).targets[0].tolist() == list(range(1, 11))
    with pytest.raises(ConfigError, match="10 training tokens are too few for one window of 11"):
        TrainingBatches(stream(10), 10, 3, seed=0)
    batches = TrainingBatches(stream(100), 10, 4, seed=0)
    for wrong in ((0, 2, 2), (0, 0, 5), (0, -1, 2), (-1, 0, 4)):
        with pytest.raises(ValueError, match="no rows"):
            batches.batch(*wrong)


def test_memory_mapped_tokens_give_plain_tensors(tmp_path) -> None:
    """Catches tensors that share a read-only file, and tokens of 32 bits cut to 16."""
    np.save(tmp_path / "tokens.npy", stream(500).astype(np.uint32) + 70_000)
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    batch = TrainingBatches(mapped, 10, 4, seed=0).batch(0)
    assert batch.positions is not None
    assert torch.equal(batch.tokens[:, 0], batch.positions + 70_000)
    batch.tokens.zero_()
    assert mapped.min() == 70_000
    assert next(validation_windows(mapped, 10, 4))[1].max() > 65_536


def test_prefetch_yields_the_slices_of_every_step() -> None:
    """Catches slices out of order, a first or last batch that is lost, and steps that restart at 0."""
    batches = TrainingBatches(stream(900), 8, 6, seed=0)
    wanted = [batches.batch(step, *rows) for step in (5, 6, 7) for rows in ((0, 3), (3, 6))]
    got = list(prefetch(batches, range(5, 8), [(0, 3), (3, 6)], "cpu"))
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert all(torch.equal(here, there) for here, there in zip(tensors(a), tensors(b), strict=True))


def test_a_cache_travels_with_the_batch(tmp_path) -> None:
    """Catches windows cut beside those that were judged, rows of another window, and a cache lost on the way."""
    layout = CacheLayout(windows=window_count(103, 10), block_size=10, top=3, vocab_size=103)
    cache, ids, log_probs = written(tmp_path / "cache", layout)
    batches = TrainingBatches(stream(103), 10, 4, seed=0, cache=cache)
    for step, rows in ((0, (0, 4)), (1, (1, 3)), (7, (2, 4))):
        (got,) = prefetch(batches, [step], [rows], "cpu")
        assert got.positions is not None and got.judged is not None
        windows, rest = got.positions // 10, got.positions % 10
        assert rest.eq(0).all() and torch.equal(got.tokens[:, 0], got.positions)
        assert torch.equal(got.judged[0], torch.from_numpy(ids.astype(np.int32))[windows])
        assert torch.equal(got.judged[1], torch.from_numpy(log_probs)[windows])
    assert all(int(batches.batch(step).positions.max()) < 90 for step in range(9))  # type: ignore[union-attr]


@pytest.mark.parametrize(("length", "block"), [(103, 9), (120, 10)])
def test_a_cache_of_other_windows_is_refused(tmp_path, length: int, block: int) -> None:
    """Catches a run of another context or text that trains on what the critic said elsewhere."""
    cache, _, _ = written(tmp_path / "cache", CacheLayout(window_count(103, 10), 10, 3, 103))
    with pytest.raises(ConfigError, match=r"holds 9 windows of 10 tokens, and this run has (10|11) of (9|10)"):
        TrainingBatches(stream(length), block, 4, seed=0, cache=cache)


def test_one_ahead_loads_early_and_in_order() -> None:
    """Catches a worker that waits for the consumer, runs far ahead of it, or loses the ends."""
    begun: list[int] = []
    second = threading.Event()

    def load(job: int) -> int:
        begun.append(job)
        if job == 1:
            second.set()
        return 10 * job

    results = one_ahead(load, iter(range(5)))
    assert next(results) == 0
    assert second.wait(timeout=10)  # loaded while the consumer works on the first
    assert begun == [0, 1]
    assert list(results) == [10, 20, 30, 40] and begun == [0, 1, 2, 3, 4]
    assert list(one_ahead(load, [])) == [] and list(one_ahead(load, [7])) == [70]


def test_one_ahead_ends_with_its_consumer() -> None:
    """Catches a worker thread that outlives an early stop, or an exception that is swallowed by it."""
    before = threading.active_count()
    results = one_ahead(lambda job: job, iter(int, 1))  # endless
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    failing = one_ahead(lambda job: 1 // job, [2, 1, 0, 1])
    assert next(failing) == 0
    with pytest.raises(ZeroDivisionError):
        list(failing)
    assert threading.active_count() == before


@fast
@given(st.integers(0, 300), blocks, st.integers(1, 9), st.sampled_from([1, 2, 3, 8]))
def test_validation_covers_every_target_once(length: int, block: int, rows: int, world: int) -> None:
    """Catches a lost tail, a target counted twice, a copied input, and ranks with unequally many batches."""
    ranks = [list(validation_windows(stream(length), block, rows, rank, world)) for rank in range(world)]
    batches = [batch for rank in ranks for batch in rank]
    assert len({len(rank) for rank in ranks}) == 1
    assert len({tokens.shape for tokens, _ in batches}) <= 1
    seen = []
    for tokens, targets in batches:
        assert tokens.shape == targets.shape and tokens.shape[0] <= rows and tokens.shape[1] == block
        assert tokens.dtype == targets.dtype == torch.int64
        inside = targets != -1
        assert torch.equal(targets[inside], tokens[inside] + 1)
        assert (tokens[~inside] == 0).all()
        seen += targets[inside].tolist()
    assert sorted(seen) == list(range(1, length))


def test_validation_windows_begin_at_multiples_of_the_block() -> None:
    """Catches windows tiled from elsewhere than 0: contexts, and so the loss, would differ between tools."""
    batches = list(validation_windows(stream(103), 10, 4))
    starts = [int(row[0]) for tokens, _ in batches for row in tokens if row.any()]
    assert starts == list(range(0, 103, 10))
    assert sum(tokens.shape[0] for tokens, _ in batches) - 11 < len(batches)  # little padding
