"""Action sets: at every position the student's top-k, the critic's top-k and gold, without duplicates.

Stored at fixed width K = 2k + 1, gold first, so that nothing depends on how many actions are distinct and no
value has to travel to the host. Shapes: N decisions, V vocabulary, k proposals of each side.
"""

from typing import NamedTuple

import torch
from torch import Tensor


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
    if values.dtype in (torch.bfloat16, torch.float16):
        values = values.float()
    if values.is_cuda and values.dtype == torch.float32:
        return _top_ids_by_key(values, k)
    found = values.topk(min(k + 1, vocabulary), dim=-1)
    # torch.topk breaks ties as it likes: rows with equal neighbours among the first k + 1 are sorted stably.
    tied = (found.values[:, 1:] == found.values[:, :-1]).any(-1)
    ids = found.indices[:, :k]
    if tied.any():
        ids = ids.clone()
        ids[tied] = values[tied].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return ids


def _top_ids_by_key(values: Tensor, k: int) -> Tensor:
    """`top_ids` for float32 without a look at the data from the host: one integer key orders value, then id."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0 makes −0 equal to 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    backwards = torch.arange(values.shape[-1] - 1, -1, -1, device=values.device)
    return ((ordered.long() << 32) + backwards).topk(k, dim=-1).indices


def build_action_set(
    student_logits: Tensor, critic_top_ids: Tensor, gold: Tensor, k: int, active_k: Tensor | None = None
) -> ActionSet:
    """A = dedup(student's top-k ∪ critic's top-k ∪ {gold}) of DESIGN section 3, step 1.

    student_logits (N, V) float; critic_top_ids (N, k) int64, best first; gold (N,) int64. `active_k`, a 0-d
    tensor of at most k, leaves only that many proposals of each side valid, at the same width (a schedule of
    k without recompilation). Ties go to the lowest id. Raises ValueError when k exceeds V.
    """
    student_top_ids = top_ids(student_logits.detach(), k)  # (N, k)
    gold = gold.unsqueeze(-1)  # (N, 1)
    ids = torch.cat((gold, student_top_ids, critic_top_ids), dim=-1)  # (N, 2k + 1)
    twin = critic_top_ids.unsqueeze(-1) == student_top_ids.unsqueeze(-2)  # (N, k critic, k student)
    fresh = ids[:, 1:] != gold  # (N, 2k)
    if active_k is not None:
        active = torch.arange(k, device=ids.device) < active_k  # (k,)
        twin = twin & active
        fresh = fresh & active.repeat(2)
    valid = torch.cat((torch.ones_like(gold, dtype=torch.bool), fresh), dim=-1)  # (N, 2k + 1)
    valid[:, k + 1 :] &= ~twin.any(-1)
    return ActionSet(ids, valid)
