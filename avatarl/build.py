"""From settings to an objective: the student's critic, its past or its twin, wired together."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from avatarl.cache import CachedCritic
from avatarl.critics import Autocast, Critic, CrossFitCritic, EnsembleCritic, ModelCritic, PastCritic
from avatarl.imagination import Imagination, Writer
from avatarl.mixed import MixedCritic
from avatarl.ngram import NgramCritic
from avatarl.objective import AvataRL, CrossEntropy
from avatarl.suffixes import SuffixCritic
from avatarl.trust import fit_trust
from config import Config, require
from data import corpora
from data.critic_cache import CriticCache
from model import GPT

STORED_FROM = 250_000
"""Tokens of text from which a mixed critic's network is kept on disk; those of less would only litter it."""


def frozen_critic(
    config: Config,
    train: np.ndarray,
    vocab_size: int,
    frozen: list[GPT],
    autocast: Autocast,
    device: torch.device | str,
    strings: Sequence[str] = (),
) -> Critic:
    """The critic that does not follow the student: statistics of the training tokens, the models `frozen`, or both.

    One model judges everything, each of two the half of the text that it was not trained on. strings: what each
    token stands for, if known. Raises ConfigError when a model does not fit the student.
    """
    members = config.critic.members
    critics = [one_critic(kind, config, train, vocab_size, frozen, autocast, device, strings) for kind in members]
    return together(critics, config, vocab_size)


def together(critics: Sequence[Critic], config: Config, vocab_size: int) -> Critic:
    """The critic of a config with these members."""
    weights = list(config.critic.members.values())
    return critics[0] if len(critics) == 1 else EnsembleCritic(critics, weights, vocab_size)


def one_critic(
    kind: str,
    config: Config,
    train: np.ndarray,
    vocab_size: int,
    frozen: list[GPT],
    autocast: Autocast,
    device: torch.device | str,
    strings: Sequence[str] = (),
) -> Critic:
    """The critic of one kind that does not follow the student."""
    c = config.critic
    if kind == "ngram":
        return NgramCritic(
            train,
            vocab_size,
            context=c.ngram_context,
            discount=c.ngram_discount,
            leave_one_out=c.leave_one_out,
            device=device,
        )
    if kind == "mixed":
        return MixedCritic(
            train,
            vocab_size,
            context=c.mixed_context,
            strings=strings,
            leave_one_out=c.leave_one_out,
            remember=config.method.context == "gold",
            folder=corpora.cache_folder() / "mixed" if len(train) >= STORED_FROM else None,
            device=device,
        )
    if kind == "suffix":
        return SuffixCritic(
            train, vocab_size, max_context=c.suffix_context, leave_one_out=c.leave_one_out, device=device
        )
    critics = [ModelCritic(m, vocab_size, config.model.block_size, autocast) for m in frozen]
    if len(critics) == 1:
        return critics[0]
    return CrossFitCritic(critics[0], critics[1], len(train) // 2)


def past_critic(student: GPT, config: Config, autocast: Autocast) -> PastCritic:
    """The student's own past, as an average or a ring of snapshots."""
    c = config.critic
    ema = c.past == "ema"
    past = PastCritic(
        student,
        size=1 if ema else c.ring_size,
        decay=c.ema_decay if ema else None,
        every=c.ring_every,
        seed=config.run.seed,
    )
    past.autocast = autocast
    return past


def imagined_by(critic: Critic | None, config: Config, train: np.ndarray) -> Imagination | None:
    """The windows that `critic` is to write; None where none are wanted."""
    if not config.method.imagined_windows:
        return None
    assert isinstance(critic, Writer)  # the config saw to it
    return Imagination(
        critic,
        train,
        block_size=config.model.block_size,
        batch_size=config.train.batch_size,
        steps=config.train.steps,
        seed=config.run.seed,
    )


class Judging(NamedTuple):
    """Who judges a run: a critic, or a twin; `past` is the critic, or one of its members, that follows the student."""

    critic: Critic | None = None
    past: PastCritic | None = None
    twin: GPT | None = None
    flops: float | None = 0.0
    """Of the judge's forward pass, a token; None: the objective counts its twin's."""


def judging_of(
    student: GPT,
    config: Config,
    train: np.ndarray,
    frozen: list[GPT],
    autocast: Autocast,
    cache: CriticCache | None,
    strings: Sequence[str],
) -> Judging:
    """Whoever `config` lets judge; arguments as of `build_objective`."""
    c, device = config.critic, student.wte.weight.device
    if cache is not None:
        return Judging(CachedCritic(cache, device))
    if c.kind == "self" and c.past == "twin":
        twin = student.clone()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(config.run.seed + 1)
            twin.reset_parameters()
        return Judging(twin=twin, flops=None)
    past = past_critic(student, config, autocast) if "self" in c.members else None
    judges: list[Critic] = [
        past
        if past is not None and kind == "self"
        else one_critic(kind, config, train, student.vocab_size, frozen, autocast, device, strings)
        for kind in c.members
    ]
    flops = sum(m.flops_per_token() for m in frozen) + (student.flops_per_token() if past else 0)
    return Judging(together(judges, config, student.vocab_size), past, flops=flops)


def build_objective(
    student: GPT,
    config: Config,
    train: np.ndarray,
    frozen: list[GPT],
    autocast: Autocast,
    cache: CriticCache | None = None,
    strings: Sequence[str] = (),
) -> AvataRL | CrossEntropy:
    """The objective that `config` names, on the student's device.

    train: the training tokens, for critics of counts; frozen: the model critics, empty for other kinds; cache:
    what judges in their place, where given; strings (V,): what each token stands for, if known.
    Raises ConfigError when k exceeds the vocabulary or a critic does not fit.
    """
    if config.train.objective == "cross-entropy":
        return CrossEntropy(student, config.train.label_smoothing)
    method, vocab_size = config.method, student.vocab_size
    require(
        method.top_k <= vocab_size,
        "method.top-k",
        method.top_k,
        f"the vocabulary has only {vocab_size} tokens; use k <= {vocab_size}",
    )
    judging = judging_of(student, config, train, frozen, autocast, cache, strings)
    critic = judging.critic
    trust = None
    if method.critic_trust == "known":
        assert critic is not None and judging.past is None  # the config saw to it
        trust = fit_trust(critic, train, vocab_size, config.model.block_size, student.wte.weight.device)
    return AvataRL(
        student,
        method,
        steps=config.train.steps,
        seed=config.run.seed,
        critic=critic,
        past=judging.past,
        twin=judging.twin,
        critic_flops=judging.flops,
        autocast=autocast,
        trust=trust,
        imagination=imagined_by(critic, config, train),
    )
