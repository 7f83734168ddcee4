"""Action sets: at every position the student's top-k, the critic's top-k and gold, without duplicates.

Stored at fixed width K = 2k + 1, gold first, so that nothing depends on how many actions are distinct and no
value has to travel to the host. Shapes: N decisions, V vocabulary, k proposals of each side.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TILE_ELEMENTS = 2**19  # logits that a CPU takes at a time, to find them in its cache again: 2 MB in float32
SHORT_ROW = 256  # numbers that NumPy sorts faster than torch.topk finds the largest of them


class ActionSet(NamedTuple):
    """Candidate tokens of N decisions: ids (N, K) int64, and which of them count, valid (N, K) bool.

    Column 0 is gold, columns 1 to k the student's proposals, the last k the critic's. A valid row holds no
    token twice.
    """

    ids: Tensor
    valid: Tensor


def top_ids(values: Tensor, k: int) -> Tensor:
    """Ids of the k largest of V values per row, best first, ties to the lowest id: (N, V) → (N, k) int64.

    Raises ValueError when k exceeds V.
    """
    vocabulary = values.shape[-1]
    if k > vocabulary:
        raise ValueError(f"top-k asks for {k} actions of a vocabulary of {vocabulary}; use k <= {vocabulary}")
    if values.dtype == torch.float64:
        return values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    size = 1 << round(math.log2(vocabulary / k) / 2)  # then groups and candidates are about equally many
    if vocabulary > 2 * SHORT_ROW and size >= 4:
        return _top_ids_by_group(values, k, min(size, 64))
    return _top_ids_by_key(values.float(), k)


def _top_ids_by_key(values: Tensor, k: int) -> Tensor:
    """`top_ids` for float32 without a look at the data from the host: one integer key orders value, then id."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0 makes −0 equal to 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    backwards = torch.arange(values.shape[-1] - 1, -1, -1, device=values.device)
    keys = (ordered.long() << 32) + backwards
    if keys.device.type == "cpu" and keys.shape[-1] <= SHORT_ROW:  # NumPy sorts short rows in vector registers
        best = torch.from_numpy(np.sort(keys.numpy(), axis=-1)[:, ::-1][:, :k].copy())
        return keys.shape[-1] - 1 - (best & 0xFFFFFFFF)
    return keys.topk(k, dim=-1).indices


def _top_ids_by_group(values: Tensor, k: int, size: int) -> Tensor:
    """`top_ids` in one pass over a large vocabulary: the k best lie in the k groups of `size` with the best maxima.

    For a group ahead of a token's own holds a token ahead of it, ties by the lowest id included.
    """
    rows, vocabulary = values.shape
    groups = vocabulary // size
    whole = values[:, : groups * size].unflatten(-1, (groups, size))
    if values.device.type == "cpu" and values.dtype != torch.float32:  # whose maxima take a CPU several times as long
        maxima = torch.cat([part.float().amax(-1) for part in whole.split(max(1, TILE_ELEMENTS // vocabulary))])
    else:
        maxima = whole.amax(-1)  # (N, V / size)
    best = _top_ids_by_key(maxima.float(), k).sort(-1).values  # (N, k), rising: ties follow the order of ids
    place = torch.arange(size, device=values.device)
    ids = (best.unsqueeze(-1) * size + place).flatten(1)  # (N, k · size)
    rest = torch.arange(groups * size, vocabulary, device=values.device).expand(rows, -1)
    ids = torch.cat((ids, rest), dim=-1)
    return ids.gather(-1, _top_ids_by_key(values.gather(-1, ids).float(), k))


def build_action_set(
    student_logits: Tensor,
    critic_top_ids: Tensor,
    gold: Tensor,
    k: int,
    active_k: Tensor | None = None,
    *,
    student_proposes: bool = True,
) -> ActionSet:
    """A = dedup(student's top-k ∪ critic's top-k ∪ {gold}) of DESIGN section 3, step 1.

    student_logits (N, V) float; critic_top_ids (N, k) int64, best first; gold (N,) int64. `active_k`, a 0-d
    tensor of at most k, leaves only that many proposals of each side valid, at the same width (a schedule of
    k without recompilation). Without `student_proposes` the student's columns are invalid, and A is what the
    critic and reality say. Ties go to the lowest id. Raises ValueError when k exceeds V.
    """
    gold = gold.unsqueeze(-1)  # (N, 1)
    # Gold in the student's columns proposes nothing: it is in column 0 already.
    student_top_ids = top_ids(student_logits.detach(), k) if student_proposes else gold.expand(-1, k)  # (N, k)
    ids = torch.cat((gold, student_top_ids, critic_top_ids), dim=-1)  # (N, 2k + 1)
    valid = ids != gold
    valid[:, 0] = True
    if active_k is not None:
        active = torch.arange(k, device=ids.device) < active_k  # (k,)
        valid[:, 1:] &= active.repeat(2)
        student_top_ids = torch.where(active, student_top_ids, gold)  # gold is no news to anyone
    valid[:, k + 1 :] &= ~contained(critic_top_ids, student_top_ids, student_logits.shape[-1])
    return ActionSet(ids, valid)


def unproposed(actions: ActionSet, k: int, active_k: Tensor | None = None, *, student_proposes: bool = True) -> Tensor:
    """Where gold is in A only because it is gold: (N,) bool. Arguments as of `build_action_set`."""
    same = actions.ids[:, 1:] == actions.ids[:, :1]  # (N, 2k); a duplicate is invalid, and still says who proposed it
    if active_k is not None:
        same = same & (torch.arange(k, device=same.device) < active_k).repeat(2)
    return ~(same if student_proposes else same[:, k:]).any(-1)


def contained(ids: Tensor, others: Tensor, vocabulary: int) -> Tensor:
    """Which of ids (N, k) stand in the same row of others (N, k'): (N, k) bool.

    Through a table of the vocabulary where that is cheaper than comparing all pairs.
    """
    if vocabulary > 8 * others.shape[-1] ** 2:
        return (ids.unsqueeze(-1) == others.unsqueeze(-2)).any(-1)
    seen = torch.zeros(len(ids), vocabulary, dtype=torch.bool, device=ids.device)
    return seen.scatter_(-1, others, True).gather(-1, ids)
