"""The game at every token of a text: who proposed what, who thought how much of it, and what it was paid.

    windows = views(ids, block_size)                       # where the student reads, and what is kept of it
    moves = play(student, ids, critic, settings)           # a Move for every token after the first

Nothing is learnt here: the student's logits, the critic's opinion and the settings of one step go through the same
functions as in training. Shapes: N decisions, V vocabulary, K = 2k + 1 action slots.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from avatarl.action_space import top_ids
from avatarl.critics import Critic
from avatarl.loss import LossSettings, agree, paid
from avatarl.reward import reality_log_probs
from model import GPT


class Action(NamedTuple):
    """One action of a decision. What a student without a critic has nothing to say of is None."""

    token: int
    student: float
    """π(a), over the full vocabulary."""
    critic: float | None = None
    """p_c(a), over the full vocabulary."""
    reality: float | None = None
    """p_r(a), over the action set."""
    consensus: float | None = None
    reward: float | None = None
    by: str = ""
    """Who proposed it: s the student, c the critic, sc both; empty: it is there as gold alone."""


class Move(NamedTuple):
    """One decision: what came, and every action that was open, gold first."""

    gold: int
    rank: int
    """Of gold among all tokens by π, from 1."""
    entropy: float
    """Of π, nats."""
    actions: list[Action]


class View(NamedTuple):
    """A window of a text, and the part of its predictions that is kept."""

    start: int
    stop: int
    skip: int
    """Predictions at its beginning that another window, which sees more, has made."""


def views(length: int, block_size: int) -> Iterator[View]:
    """Windows in which each of `length` − 1 next tokens is predicted once, from half a window or more where it can."""
    half, done, last = block_size // 2, 0, length - 1
    while done < last:
        start = max(0, done - half) if done else 0
        stop = min(start + block_size, last)
        yield View(start, stop, done - start)
        done = stop


@torch.no_grad()
def play(student: GPT, ids: Tensor, critic: Critic | None, settings: LossSettings) -> list[Move]:
    """Every token of ids (L,) after the first as a move; without a critic, of the student's top-k and gold alone."""
    moves = []
    for view in views(len(ids), student.config.block_size):
        tokens, gold = ids[None, view.start : view.stop], ids[view.start + 1 : view.stop + 1]
        logits = student(tokens)[0].float()  # (T, V)
        kept = slice(view.skip, len(gold))
        if critic is None:
            moves += alone(logits[kept], gold[kept], settings.top_k)
        else:
            opinion = critic.opinion(tokens, None).rows(view.skip, len(gold))
            moves += judged(logits[kept], opinion, gold[kept], settings)
    return moves


def alone(logits: Tensor, gold: Tensor, k: int) -> list[Move]:
    """Moves of a student whom nobody judges: logits (N, V), gold (N,)."""
    proposed = top_ids(logits, k)  # (N, k)
    ids = torch.cat((gold[:, None], proposed), 1)
    valid = torch.cat((torch.ones_like(gold[:, None], dtype=torch.bool), proposed != gold[:, None]), 1)
    pi = logits.softmax(-1).gather(1, ids)
    found = []
    for row, ok, p, top in zip(ids.tolist(), valid.tolist(), pi.tolist(), proposed.tolist(), strict=True):
        found.append([Action(a, x, by="s" * (a in top)) for a, x, keep in zip(row, p, ok, strict=True) if keep])
    return in_order(logits, gold, found)


def judged(logits: Tensor, opinion, gold: Tensor, settings: LossSettings) -> list[Move]:  # type: ignore[no-untyped-def]
    """Moves as the method sees them: logits (N, V), opinion at the N positions, gold (N,)."""
    actions, critic, p_ref = agree(logits, opinion, gold, settings)
    k = settings.top_k if settings.active_k is None else int(settings.active_k)
    students, critics = (part[:, :k].tolist() for part in actions.ids[:, 1:].split(settings.top_k, 1))
    if settings.proposals == "critic":
        students = [[]] * len(gold)  # gold stands in their columns
    parts = (
        actions.ids,
        logits.softmax(-1).gather(1, actions.ids),
        critic.exp(),
        reality_log_probs(actions.valid, settings.epsilon).exp(),
        p_ref,
        paid(p_ref, actions, settings),
    )
    found = []
    columns = zip(*(part.tolist() for part in parts), strict=True)
    for row, valid, mine, theirs in zip(columns, actions.valid.tolist(), students, critics, strict=True):
        slots = zip(*row, strict=True)
        found.append(
            [
                Action(a, pi, p_c, p_r, p, r, by="s" * (a in mine) + "c" * (a in theirs))
                for (a, pi, p_c, p_r, p, r), ok in zip(slots, valid, strict=True)
                if ok
            ]
        )
    return in_order(logits, gold, found)


def in_order(logits: Tensor, gold: Tensor, actions: list[list[Action]]) -> list[Move]:
    """Moves from the actions of each, gold first."""
    log_pi = logits.log_softmax(-1)
    rank = 1 + (log_pi > log_pi.gather(1, gold[:, None])).sum(-1)
    entropy = -(log_pi.exp() * log_pi).sum(-1)
    facts = zip(gold.tolist(), rank.tolist(), entropy.tolist(), actions, strict=True)
    return [Move(*fact) for fact in facts]
