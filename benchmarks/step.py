"""Whole training steps on real text: the plain loop, cross-entropy, and AvataRL with each kind of critic.

AvataRL has its published settings (k = 16, β = 0.01), which cost the most. A live model critic is compared with
cross-entropy plus that critic's own forward pass, timed as an arm of its own; Muon with Muon.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.table import Table
from benchmarks.timing import Arm, Conditions, forget_compiled, measure, settle
from benchmarks.trainers import PlainLoop, Shape, Trainer, critic_forward, new_model, read_text, trainer
from config import Config, ConfigError, override
from critic_runs import critic_cache
from data.prepare import Dataset
from model import GPT
from training.distributed import World

PLAIN, ENTROPY = "plain loop", "cross-entropy"
WITH_FORWARD = "cross-entropy + critic's forward"
CACHED_TOKENS = 200_000  # how much text the cached critic's arm reads: asking a critic about more takes minutes


@dataclass(frozen=True)
class Case:
    """One table: a shape, the text it reads, and the model critic that judges it."""

    shape: Shape
    critic: Shape
    corpus: str = "tinyshakespeare"
    tokenizer: str = "char"
    optional: bool = False
    """The table is skipped, with a line, where the corpus can't be had; otherwise that is an error."""


CASES = (
    Case(Shape(4, 128, 4, 64, 12), critic=Shape(4, 128, 4, 64, 12)),
    Case(Shape(6, 384, 6, 256, 8), critic=Shape(4, 128, 4, 256, 8)),
    Case(Shape(4, 256, 4, 256, 4), Shape(4, 128, 4, 256, 4), corpus="wikitext-2", tokenizer="gpt2", optional=True),
)


def tables(conditions: Conditions, cases: Sequence[Case] = CASES) -> Iterator[Table]:
    """A table for each case."""
    for case in cases:
        try:
            dataset = read_text(case.corpus, case.tokenizer, case.shape.block)
        except ConfigError as missing:
            if not case.optional:
                raise
            yield Table(f"Training steps, {case.shape}, {case.corpus}", notes=[f"skipped: {missing}"])
            continue
        yield compare(case, dataset, conditions, 1 / len(cases))


def compare(case: Case, dataset: Dataset, conditions: Conditions, share: float) -> Table:
    """All arms of one case."""
    vocab_size = dataset.tokenizer.vocab_size
    arms = step_arms(case, dataset, conditions)
    title = f"Training steps, {case.shape}, vocabulary {vocab_size:,}"
    table = measure(title, arms, conditions, share=share)
    table.unit, table.work, table.reference = "tokens", case.shape.tokens, PLAIN
    table.facts = {
        "shape": vars(case.shape),
        "critic": vars(case.critic),
        "corpus": dataset.corpus_name,
        "sha256": dataset.corpus_sha256,
        "vocab_size": vocab_size,
    }
    table.notes = [
        f"text: {dataset.corpus_name}, {len(dataset.train):,} training tokens ({case.tokenizer}); the model critic is "
        f"{case.critic.layers} × {case.critic.width}, with random weights",
        "all arms take the same batches in the same order, but the cached critic's, which reads the first "
        f"{CACHED_TOKENS:,} tokens",
    ]
    return table


def step_arms(case: Case, dataset: Dataset, conditions: Conditions) -> list[Arm]:
    """Every arm, each with a model of its own."""
    forget_compiled()
    shape, vocab_size = case.shape, dataset.tokenizer.vocab_size
    exact, highest = settle(conditions, dtype="float32")
    hardware, precision = settle(conditions)
    base = shape.config(conditions)
    plain = PlainLoop(base, dataset, conditions.device)
    arms = [Arm(PLAIN, plain.step, flops=plain.flops)]
    if hardware.dtype != exact.dtype:
        made = trainer(base, dataset, exact, conditions)
        arms.append(step_arm(f"{ENTROPY}, float32", made, highest, PLAIN))

    def avatarl(**critic: Any) -> Config:
        return shape.config(conditions, train={"objective": "avatarl"}, critic={"kind": "ngram"} | critic)

    def muon(config: Config) -> Config:
        return override(config, optim={"name": "muon"})

    stored = override(avatarl(cache=True), run={"out_dir": str(conditions.scratch)})
    first = replace(dataset, train=dataset.train[:CACHED_TOKENS])
    cache = critic_cache(stored, first, [], World(), hardware)
    critic = new_model(case.critic.model, vocab_size, conditions.seed + 1, hardware).eval().requires_grad_(False)
    runs: list[tuple[str, str, Config, dict[str, Any]]] = [
        (ENTROPY, PLAIN, base, {}),
        ("AvataRL, n-gram critic", ENTROPY, avatarl(), {}),
        ("AvataRL, cached critic", ENTROPY, stored, {"cache": cache}),
        ("AvataRL, own past (EMA)", ENTROPY, avatarl(kind="self"), {}),
        (WITH_FORWARD, ENTROPY, base, {}),
        ("AvataRL, model critic", WITH_FORWARD, avatarl(kind="model"), {"frozen": critic}),
        (f"{ENTROPY}, Muon", ENTROPY, muon(base), {}),
        ("AvataRL, n-gram critic, Muon", f"{ENTROPY}, Muon", muon(avatarl()), {}),
    ]
    for name, baseline, config, judge in runs:
        text = first if "cache" in judge else dataset
        made = trainer(config, text, hardware, conditions, **judge)
        arms.append(step_arm(name, made, precision, baseline))
        if name == WITH_FORWARD:
            add_forward(arms[-1], made, critic)
    return arms


def step_arm(name: str, made: Trainer, precision: str, *baselines: str) -> Arm:
    """Steps of a trainer as an arm."""
    return Arm(name, made.step, list(baselines), made.flops, made.job.hardware.dtype, precision)


def add_forward(arm: Arm, made: Trainer, critic: GPT) -> None:
    """Let every step of `arm` be followed by the critic's forward pass over the same tokens."""
    hardware = made.job.hardware

    def step() -> None:
        made.step()
        critic_forward(critic, hardware, made.micros)

    arm.run = step
    arm.flops += critic.flops_per_token() * made.job.tokens_per_step
