"""From settings to an objective: the student's critic, its past or its twin, wired together."""

import numpy as np
import torch

from avatarl.cache import CachedCritic
from avatarl.critics import Autocast, Critic, CrossFitCritic, ModelCritic, PastCritic
from avatarl.ngram import NgramCritic
from avatarl.objective import AvataRL, CrossEntropy
from config import Config, require
from data.critic_cache import CriticCache
from model import GPT


def frozen_critic(
    config: Config,
    train: np.ndarray,
    vocab_size: int,
    frozen: list[GPT],
    autocast: Autocast,
    device: torch.device | str,
) -> Critic:
    """The critic that does not follow the student: n-grams of the training tokens, or the models `frozen`.

    One model judges everything, each of two the half of the text that it was not trained on. Raises ConfigError
    when a model does not fit the student.
    """
    c = config.critic
    if c.kind == "ngram":
        return NgramCritic(
            train,
            vocab_size,
            context=c.ngram_context,
            discount=c.ngram_discount,
            leave_one_out=c.leave_one_out,
            device=device,
        )
    critics = [ModelCritic(m, vocab_size, config.model.block_size, autocast) for m in frozen]
    if len(critics) == 1:
        return critics[0]
    return CrossFitCritic(critics[0], critics[1], len(train) // 2)


def build_objective(
    student: GPT,
    config: Config,
    train: np.ndarray,
    frozen: list[GPT],
    autocast: Autocast,
    cache: CriticCache | None = None,
) -> AvataRL | CrossEntropy:
    """The objective that `config` names, on the student's device.

    train: the training tokens, for the n-gram critic; frozen: the model critics, empty for other kinds; cache:
    what judges in their place, where given.
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
    if cache is not None:
        critic = CachedCritic(cache, device)
    elif c.kind != "self":
        critic = frozen_critic(config, train, vocab_size, frozen, autocast, device)
        critic_flops = sum(m.flops_per_token() for m in frozen)
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
