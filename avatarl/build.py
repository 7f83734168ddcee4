"""From settings to an objective: the student's critic, its past or its twin, wired together."""

import numpy as np
import torch

from avatarl.critics import Autocast, Critic, CrossFitCritic, ModelCritic, PastCritic
from avatarl.ngram import NgramCritic
from avatarl.objective import AvataRL, CrossEntropy
from config import Config, require
from model import GPT


def model_critic(frozen: list[GPT], config: Config, train_tokens: int, vocab_size: int, autocast: Autocast) -> Critic:
    """The critic made of one frozen model, or of two that were trained on a half of the text each.

    Raises ConfigError when a model does not fit the student.
    """
    critics = [ModelCritic(m, vocab_size, config.model.block_size, autocast) for m in frozen]
    if len(critics) == 1:
        return critics[0]
    return CrossFitCritic(critics[0], critics[1], train_tokens // 2)


def build_objective(
    student: GPT, config: Config, train: np.ndarray, frozen: list[GPT], autocast: Autocast
) -> AvataRL | CrossEntropy:
    """The objective that `config` names, on the student's device.

    train: the training tokens, for the n-gram critic; frozen: the model critics, empty for other kinds.
    Raises ConfigError when k exceeds the vocabulary or a critic does not fit.
    """
    if config.train.objective == "cross-entropy":
        return CrossEntropy(student)
    c, method, vocab_size = config.critic, config.method, student.vocab_size
    require(
        method.top_k <= vocab_size,
        "method.top-k",
        method.top_k,
        f"the vocabulary has only {vocab_size} tokens; use k <= {vocab_size}",
    )
    device = student.wte.weight.device
    critic: Critic | None = None
    past = twin = None
    critic_flops = 0.0
    if c.kind == "model":
        critic = model_critic(frozen, config, len(train), vocab_size, autocast)
        critic_flops = sum(m.flops_per_token() for m in frozen)
    elif c.kind == "ngram":
        critic = NgramCritic(
            train,
            vocab_size,
            context=c.ngram_context,
            discount=c.ngram_discount,
            leave_one_out=c.leave_one_out,
            device=str(device),
        )
    elif c.past == "twin":
        twin = student.clone()
        with torch.random.fork_rng():
            torch.manual_seed(config.run.seed + 1)
            twin.reset_parameters()
    else:
        ema = c.past == "ema"
        past = PastCritic(
            student,
            size=1 if ema else c.ring_size,
            decay=c.ema_decay if ema else None,
            every=c.ring_every,
            seed=config.run.seed,
        )
        past.autocast = autocast
    return AvataRL(
        student,
        method,
        steps=config.train.steps,
        seed=config.run.seed,
        critic=critic,
        past=past,
        twin=twin,
        critic_flops=critic_flops,
        autocast=autocast,
    )
