"""The two-slot index against a dictionary."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avatarl import ngram_index
from avatarl.ngram_index import KeyIndex, look_up


@settings(deadline=None, max_examples=60)
@given(
    keys=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=60, unique=True),
    others=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=20),
)
def test_finds_what_is_there_and_nothing_else(keys, others):
    """Catches a lost key, a wrong place, an overflow, and something found where there is nothing."""
    index = KeyIndex.build(np.array(keys))
    place, found = index.find(torch.tensor(keys + others))
    known = [key in keys for key in keys + others]
    assert found.tolist() == known
    assert [p for p, f in zip(place.tolist(), known, strict=True) if f] == [
        keys.index(key) for key in keys + others if key in keys
    ]
    assert (place >= 0).all()  # also where nothing was found, so that it may be looked up


@pytest.mark.parametrize("step", [1, 2**20, 50_257], ids=str)
def test_regular_keys(step):
    """Catches hash functions that crowd the keys that rows and tokens make, and a table that grows beyond its load."""
    keys = step * np.random.default_rng(0).permutation(20_000)
    index = KeyIndex.build(keys)
    assert len(index.keys) < 4 * len(keys) / ngram_index.LOAD
    place, found = index.find(torch.from_numpy(keys).view(100, 200))
    assert found.all() and torch.equal(place.flatten(), torch.arange(20_000, dtype=torch.int32))
    assert not index.find(torch.from_numpy(keys) + step * 20_000)[1].any()


def test_other_hash_functions_are_tried(monkeypatch):
    """Catches an index that is given up, or wrong, when the first two hash functions leave keys without a slot."""
    settle, calls = ngram_index._settle, []

    def fail_twice(slots, count):
        calls.append(slots)
        return None if len(calls) < 3 else settle(slots, count)

    monkeypatch.setattr(ngram_index, "_settle", fail_twice)
    index = KeyIndex.build(np.arange(50))
    assert len(calls) == 3 and not np.array_equal(calls[0], calls[2])
    assert index.find(torch.arange(60))[1].tolist() == [True] * 50 + [False] * 10


def test_keys_that_cannot_settle_are_reported():
    """Catches an endless search: three keys that share two slots."""
    assert ngram_index._settle(np.array([[0, 1, 0], [1, 0, 1]]), 4) is None


def test_look_up_is_indexing():
    """Catches a look-up that assumes a memory layout or a shape of the index."""
    values, index = torch.arange(12.0).view(3, 4), torch.tensor([[0, 11, 5], [7, 7, 2]])
    assert torch.equal(look_up(values, index.T), values.view(-1)[index.T])


def test_an_index_of_nothing_finds_nothing():
    """Catches a text too short for any state, which ends in an index error."""
    _, found = KeyIndex.build(np.zeros(0, np.int64)).find(torch.tensor([[0, 5], [7, 2**40]]))
    assert not found.any()
