"""Tasks for a surgeon that are over in a moment: a tiny patient, a tiny judge, a random text."""

from dataclasses import replace
from typing import Any

import numpy as np

from avatarl.ngram import NgramCritic
from surgery.env import SurgeryTask
from surgery.judge import TextJudge
from surgery.settings import AgentConfig, SurgeryConfig
from tests.surgery.patients import VOCAB, patient

TEXT = np.random.default_rng(0).integers(VOCAB, size=600).astype(np.uint16)
SURGERY = SurgeryConfig(layers=(0, 2), rank=3, candidates=4, prompts=3, prompt_tokens=4, new_tokens=6)
AGENT = AgentConfig(learning_starts=8, batch_size=8, gradient_steps=2, width=8, buffer_size=64)


def judge() -> TextJudge:
    """Bigrams of TEXT."""
    return TextJudge(NgramCritic(TEXT, VOCAB, context=1))


def task(dropout: float = 0.0, **settings: Any) -> SurgeryTask:
    """Surgery on a patient, its blocks 0 and 2."""
    model = patient(dropout=dropout)
    model.train(dropout > 0)
    return SurgeryTask(model, judge(), TEXT, replace(SURGERY, **settings))


def some_actions(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Actions (M, size) in [−1, 1]."""
    return np.random.default_rng(seed).uniform(-1, 1, (count, size)).astype(np.float32)
