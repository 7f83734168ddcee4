"""An index of many different integers in two looks per question, on any device: cuckoo hashing.

Every key has two slots that it may lie in, given by two hash functions, and lies in one of them (Pagh and
Rodler, 2004). A binary search over a million keys waits for memory and guesses branches twenty times; this
waits twice, and does the same operations for every key. Here all keys are known beforehand and placed at once,
round by round, instead of one after the other.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LOAD = 0.45  # keys per slot, at most; two slots a key suffice, all but surely, below 0.5
ROUNDS = 500  # of moving keys about before other hash functions are tried
EMPTY = -1


class KeyIndex(NamedTuple):
    """Where each of E different keys in [0, 2^63) stands in the array that the index was built from."""

    keys: Tensor  # (S,) int64, S a power of 2; EMPTY in a free slot
    places: Tensor  # (S,) int32
    multipliers: tuple[int, int]

    @staticmethod
    def build(keys: np.ndarray) -> "KeyIndex":
        """Index keys (E,) int64, all different."""
        bits = max(1, int(len(keys) / LOAD).bit_length())
        owners, seed = None, 0
        while owners is None:
            draws = np.random.default_rng(seed).integers(2**63, size=2) | 1
            slots = np.stack([_slots(keys, multiplier, bits) for multiplier in draws])  # (2, E)
            owners, seed = _settle(slots, 2**bits), seed + 1
        index_keys = np.append(keys, EMPTY)[owners]  # −1, of a free slot, is the last one
        first, second = draws.tolist()
        return KeyIndex(torch.from_numpy(index_keys), torch.from_numpy(owners.astype(np.int32)), (first, second))

    def find(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """(place, found) of int64 keys of any shape: int32, and bool; the place of what is not found is any."""
        bits = len(self.keys).bit_length() - 1
        one, other = (_slots(keys, multiplier, bits) for multiplier in self.multipliers)
        in_one, in_other = look_up(self.keys, one) == keys, look_up(self.keys, other) == keys
        return look_up(self.places, torch.where(in_one, one, other)).clamp_min_(0), in_one | in_other

    def to(self, device: torch.device | str) -> "KeyIndex":
        return KeyIndex(self.keys.to(device), self.places.to(device), self.multipliers)


def look_up(values: Tensor, index: Tensor) -> Tensor:
    """values.flatten()[index], by the operation that is by far the fastest on a CPU."""
    return values.view(-1).index_select(0, index.reshape(-1)).view(index.shape)


def _slots(keys, multiplier: int, bits: int):  # type: ignore[no-untyped-def]
    """The highest bits of a product modulo 2^64, for arrays and tensors alike (Dietzfelbinger et al., 1997)."""
    return (keys * multiplier >> 64 - bits) & (2**bits - 1)


def _settle(slots: np.ndarray, count: int) -> np.ndarray | None:
    """Which key owns each slot (count,), −1 for none, when every key has one of its two slots (2, E).

    In every round the keys without a slot take the one that they did not have last, whoever is there. None
    when some are still on the move after ROUNDS.
    """
    owners = np.full(count, -1)
    side = np.ones(slots.shape[1], np.int8)
    moving = np.arange(slots.shape[1])
    for _ in range(ROUNDS):
        side[moving] ^= 1
        wanted = slots[side[moving], moving]
        evicted = np.unique(owners[wanted])
        owners[wanted] = moving  # of several, the last one wins
        moving = np.concatenate([evicted[evicted >= 0], moving[owners[wanted] != moving]])
        if len(moving) == 0:
            return owners
    return None
