"""What the bootstrapping tests build again and again: a text, its tables, a policy on it, and an objective."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bootstrap.ngrams import NgramTables
from bootstrap.objective import Bootstrap
from config_bootstrap import BootstrapConfig
from data.batches import Batch
from model import GPT
from tests.avatarl.builders import tiny_gpt

V = 7
TEXT = np.random.default_rng(5).integers(0, V, 300)
TABLES = NgramTables.build(TEXT, V, 3)

SAMPLED: dict[str, Any] = {"rollout": "sampled", "samples": 4, "ngram_weight": 0.5}


def corpus_batch(rows: int = 3, length: int = 8, start: int = 0) -> Batch:
    """Rows of the text, one after the other, as a training batch brings them."""
    stream = torch.from_numpy(TEXT[start : start + rows * length + 1])
    return Batch(
        tokens=stream[:-1].view(rows, length),
        targets=stream[1:].view(rows, length),
        positions=start + torch.arange(rows) * length,
        indices=torch.arange(rows) + 100,
    )


def policy(seed: int = 0, **options: Any) -> GPT:
    """A tiny GPT over the text's tokens in float64, with a context of 8 unless `options` say otherwise."""
    return tiny_gpt(V, seed, **options).double()


def rows_of(batch: Batch, part: slice) -> Batch:
    """Some rows of a batch."""
    assert batch.positions is not None
    return Batch(batch.tokens[part], batch.targets[part], batch.positions[part], batch.indices[part])


def objective(student: GPT | None = None, *, seed: int = 0, steps: int = 10, **settings: Any) -> Bootstrap:
    """The objective of some settings; those of other parts (past, twin, soft, curriculum) go where they belong."""
    parts = {name: settings.pop(name) for name in ("past", "twin", "soft", "curriculum") if name in settings}
    config = BootstrapConfig(**settings)
    return Bootstrap(student or policy(), config, steps=steps, seed=seed, tables=TABLES, **parts)


def loss_of(
    made: Bootstrap, batch: Batch | None = None, step: int = 0, rollout: dict[str, Any] | None = None
) -> Tensor:
    """The loss alone."""
    loss, _ = made(batch or corpus_batch(), step, {} if rollout is None else rollout, False)
    return loss


def log_pi_case(n: int = 5, seed: int = 0, actions: int = V) -> Tensor:
    """Log-probabilities (n, V) of a random policy, float64."""
    draws = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(n, actions, generator=draws, dtype=torch.float64)).log_softmax(-1)
