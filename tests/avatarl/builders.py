"""What the method's tests build again and again: cases to judge, settings, maps from token to value."""

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from avatarl.action_space import ActionSet, build_action_set
from avatarl.critics import DenseOpinion
from avatarl.loss import judge
from avatarl.reward import consensus
from config import MethodConfig, ModelConfig
from data.batches import Batch
from model import GPT
from tests.avatarl import oracle

SPARSIFY, NORMALIZE, WEIGHTING = ("above_mean", "none"), ("cap", "sum"), ("reinforce", "expected")
MEANS = ("geometric", "arithmetic")
EVERY_ACTION = {"reality_weight": 0.3, "critic_weight": 0.7, "sparsify": "none"}


class Case(NamedTuple):
    """N positions: student logits and critic log-probabilities (N, V), gold (N,)."""

    logits: Tensor
    critic: Tensor
    gold: Tensor

    def rows(self) -> list[tuple[list[float], list[float], int]]:
        """Position by position, as the oracle wants it."""
        return list(zip(self.logits.tolist(), self.critic.tolist(), self.gold.tolist(), strict=True))

    def to(self, dtype: torch.dtype) -> "Case":
        return Case(self.logits.to(dtype), self.critic.to(dtype), self.gold)


def method(**changes: Any) -> MethodConfig:
    """k = 3, and rewards for every action: the published settings leave little but gold's, which hides mistakes."""
    return MethodConfig(**{"top_k": 3, **EVERY_ACTION, **changes})


def random_case(n: int = 7, vocab: int = 11, seed: int = 0, dtype: torch.dtype = torch.float64) -> Case:
    """Normal logits on both sides: no ties."""
    draws = torch.Generator().manual_seed(seed)
    logits, critic = (2 * torch.randn(n, vocab, generator=draws, dtype=torch.float64) for _ in range(2))
    gold = torch.randint(vocab, (n,), generator=draws)
    return Case(logits, critic.log_softmax(-1), gold).to(dtype)


@st.composite
def tied_cases(draw) -> tuple[Case, int]:
    """(a float32 case whose few whole-number logits tie all the time, k from 1 to V)."""
    n, vocab = draw(st.integers(1, 4)), draw(st.integers(1, 9))

    def table() -> Tensor:
        row = st.lists(st.integers(-2, 2), min_size=vocab, max_size=vocab)
        return torch.tensor(draw(st.lists(row, min_size=n, max_size=n)), dtype=torch.float32)

    gold = draw(st.lists(st.integers(0, vocab - 1), min_size=n, max_size=n))
    return Case(table(), table().log_softmax(-1), torch.tensor(gold)), draw(st.integers(1, vocab))


def action_set_of(case: Case, k: int) -> ActionSet:
    """The action set of a case."""
    return build_action_set(case.logits, DenseOpinion(case.critic).top_ids(k), case.gold, k)


def consensus_of(case: Case, m: Any) -> tuple[ActionSet, Tensor]:
    """Action set and consensus of a case."""
    actions = action_set_of(case, m.top_k)
    p_ref = consensus(
        actions,
        case.critic.gather(-1, actions.ids),
        reality_weight=m.reality_weight,
        critic_weight=m.critic_weight,
        epsilon=m.epsilon,
        mean=m.mean,
    )
    return actions, p_ref


def rewards_of(case: Case, m: Any) -> tuple[ActionSet, Tensor]:
    """Action set and rewards of a case."""
    actions, _, rewards = judge(case.logits, DenseOpinion(case.critic), case.gold, m)
    return actions, rewards


def maps(actions: ActionSet, values: Tensor) -> list[dict[int, float]]:
    """One dictionary a position: token → value, valid actions only. A token must not stand there twice."""
    found = []
    for ids, valid, row in zip(actions.ids.tolist(), actions.valid.tolist(), values.tolist(), strict=True):
        pairs = [(token, value) for token, value, ok in zip(ids, row, valid, strict=True) if ok]
        found.append(dict(pairs))
        assert len(found[-1]) == len(pairs), f"a token twice in {ids}"
    return found


def oracle_loss(case: Case, m: Any) -> float:
    """The oracle's mean loss of a case."""
    rows = case.rows()
    return sum(oracle.loss(z, oracle.judge(z, c, g, m).rewards, m) for z, c, g in rows) / len(rows)


def oracle_gradient(case: Case, m: Any) -> Tensor:
    """The oracle's gradient of the mean loss by the logits: (N, V) float64."""
    rows = case.rows()
    found = [oracle.gradient(z, oracle.judge(z, c, g, m).rewards, m) for z, c, g in rows]
    return torch.tensor(found, dtype=torch.float64) / len(rows)


def tiny_gpt(vocab: int = 11, seed: int = 0, **options: Any) -> GPT:
    """A one-layer GPT with a context of 8, its parameters away from their trivial start."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8}
    torch.manual_seed(seed)
    model = GPT(ModelConfig(**{**shape, **options}), vocab)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def random_batch(vocab: int = 11, rows: int = 3, length: int = 8, seed: int = 0) -> Batch:
    """Windows of random tokens, next to each other in a stream, targets one position ahead."""
    draws = torch.Generator().manual_seed(seed)
    stream = torch.randint(vocab, (rows * length + 1,), generator=draws)
    return Batch(
        tokens=stream[:-1].view(rows, length),
        targets=stream[1:].view(rows, length),
        positions=torch.arange(rows) * length,
        indices=torch.arange(rows) + 100,
    )
