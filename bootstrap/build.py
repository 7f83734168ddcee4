"""From settings to the bootstrapping objective: tables, soft signal, curriculum and opponent, wired together."""

from collections.abc import Sequence

import numpy as np
import torch

from avatarl.critics import Autocast, PastCritic
from avatarl.mixed import MixedCritic
from avatarl.ngram import NgramCritic
from avatarl.ngram_counts import checked_text
from avatarl.suffixes import SuffixCritic
from bootstrap.curriculum import Curriculum, StageStatistics
from bootstrap.ngrams import NgramTables, load_tables
from bootstrap.objective import Bootstrap
from bootstrap.rewards import FullCritic
from config import Config, require
from data import corpora
from model import GPT

CACHED_FROM = 200_000
"""Tokens of text from which n-gram tables are kept on disk; for less, they are counted again in a moment."""


def build_bootstrap(
    student: GPT, config: Config, train: np.ndarray, characters: Sequence[str] | None, autocast: Autocast
) -> Bootstrap:
    """The objective of a bootstrapping run, on the student's device.

    train: the training tokens; characters: what each token stands for, for the curriculum. Raises ConfigError for a
    text of one distinct token, a vocabulary above the table limit, and unknown stages.
    """
    checked_text(train, student.vocab_size, 0.5, least=2)  # the discount is not used here
    return Bootstrap(
        student,
        config.bootstrap,
        steps=config.train.steps,
        seed=config.run.seed,
        tables=tables_for(config, train, student),
        soft=soft_critic(config, train, student),
        curriculum=curriculum_for(config, train, characters, student),
        past=past_of(student, config, autocast),
        twin=twin_of(student, config),
        autocast=autocast,
    )


def tables_for(config: Config, train: np.ndarray, student: GPT) -> NgramTables | None:
    """The n-gram tables, as long as the settings need them; None where they need none."""
    s = config.bootstrap
    longest = 1 if s.ever("kl_coef") or s.ever("guidance") else 0
    if s.ever("ngram_weight"):
        longest = max(longest, len(s.order_weights) - 1, 1)
    if not longest:
        return None
    if len(train) < CACHED_FROM:
        tables = NgramTables.build(train, student.vocab_size, longest)
    else:
        tables = load_tables(train, student.vocab_size, longest, corpora.cache_folder() / "ngrams")
    return tables.to(student.wte.weight.device)


def soft_critic(config: Config, train: np.ndarray, student: GPT) -> FullCritic | None:
    """Who gives the soft signal."""
    s, vocab_size, device = config.bootstrap, student.vocab_size, student.wte.weight.device
    if not s.ever("soft_weight"):
        return None
    if s.soft == "suffix":
        return SuffixCritic(train, vocab_size, max_context=max(1, s.soft_context), device=device)
    if s.soft == "mixed":
        fix = "a product of experts needs contexts; use 1 to 16 characters"
        require(s.soft_context >= 1, "bootstrap.soft-context", s.soft_context, fix)
        return MixedCritic(train, vocab_size, context=s.soft_context, remember=s.horizon == 1, device=device)
    return NgramCritic(train, vocab_size, context=s.soft_context, device=device)


def past_of(student: GPT, config: Config, autocast: Autocast) -> PastCritic | None:
    """The student's own past as its opponent."""
    kind, c = config.bootstrap.opponent, config.critic
    if kind not in ("ema", "ring"):
        return None
    size, decay = (1, c.ema_decay) if kind == "ema" else (c.ring_size, None)
    past = PastCritic(student, size=size, decay=decay, every=c.ring_every, seed=config.run.seed)
    past.autocast = autocast
    return past


def twin_of(student: GPT, config: Config) -> GPT | None:
    """A second student with other first weights."""
    if config.bootstrap.opponent != "twin":
        return None
    twin = student.clone()
    with torch.random.fork_rng():
        torch.manual_seed(config.run.seed + 1)
        twin.reset_parameters()
    return twin


def curriculum_for(
    config: Config, train: np.ndarray, characters: Sequence[str] | None, student: GPT
) -> Curriculum | None:
    """The curriculum of the settings' stages; None without any."""
    s = config.bootstrap
    if not s.stage_names:
        return None
    fix = "words and lines are known of characters alone; use --data.tokenizer char"
    require(characters is not None, "bootstrap.stages", s.stages, fix)
    assert characters is not None
    return Curriculum(
        StageStatistics.build(train, characters),
        s.stage_names,
        window=s.stage_window,
        tolerance=s.stage_tolerance,
        min_steps=s.stage_min_steps,
        max_steps=s.stage_max_steps,
    ).to(student.wte.weight.device)
