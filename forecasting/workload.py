"""What a run has to do, counted from its settings alone: nothing is read, built or measured here.

A corpus that nobody has read has a nominal size; a text that is found under its own path, that of its files.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from avatarl.imagination import written_at_once
from avatarl.mixed import MEMORY_BYTES
from avatarl.objective import CHUNK_ELEMENTS
from avatarl.schedules import tabulate
from avatarl.suffixes import COUNT_ENTRIES, LEAST_STRIDE, tokens_per_key
from bootstrap.rollouts import passes_per_token
from config import Config, critic_preset, override, preset
from data.batches import window_count
from data.critic_cache import CacheLayout
from data.shards import DTYPE, TOKENS
from model import GPT
from training.hardware import Hardware

NOMINAL_VOCAB = {"char": 65, "gpt2": 50257}
CHARACTERS_PER_TOKEN = {"char": 1.0, "bpe": 2.4, "gpt2": 4.4}
"""English in general; bpe with its vocabulary of 1,024 on Shakespeare."""
CORPUS_CHARACTERS = {"tinyshakespeare": 1.115e6, "pydoc": 0.46e6, "openwebtext": 39.8e9}
"""openwebtext: 9.04 G tokens of GPT-2's."""


@dataclass(frozen=True)
class Workload:
    """A run in numbers. FLOPs are those of matrix products."""

    vocab_size: int
    parameters: int
    """Of one student; a twin has as many again."""
    steps: int
    batch_size: int
    """Sequences per optimiser step."""
    micro_batch: int
    """Sequences of one forward pass on one process, and at most on several: batch_size / grad_accum."""
    tokens_per_step: int
    student_flops: float
    """Per training token, forward and backward, of all that trains."""
    critic_flops: float
    """Per training token, of judging while the run goes on."""
    forward_flops: float
    """Per validation token."""
    evaluations: int
    train_tokens: float | None
    """Of the training split; None where its size is not known without reading it."""
    val_tokens: float | None

    @property
    def tokens(self) -> int:
        """Trained on in the whole run."""
        return self.steps * self.tokens_per_step

    @property
    def flops_per_step(self) -> float:
        return (self.student_flops + self.critic_flops) * self.tokens_per_step

    @property
    def evaluated_tokens(self) -> float | None:
        """Validation tokens in the whole run."""
        return None if self.val_tokens is None else self.val_tokens * self.evaluations


def vocabulary(config: Config) -> int:
    """The vocabulary of the tokenizer that `config` names; for characters, Shakespeare's."""
    return NOMINAL_VOCAB.get(config.data.tokenizer, config.data.bpe_vocab)


def count(config: Config) -> Workload:
    """The workload of a run of `config`, without that of a critic that has to be trained first."""
    vocab_size, train = vocabulary(config), config.train
    with torch.device("meta"):
        model = GPT(config.model, vocab_size)
    forward = model.flops_per_token()
    student, critic = flops_per_token(config, forward)
    train_tokens, val_tokens = split_tokens(config)
    every = config.eval.every
    return Workload(
        vocab_size=vocab_size,
        parameters=model.parameter_count(),
        steps=train.steps,
        batch_size=train.batch_size,
        micro_batch=train.batch_size // train.grad_accum,
        tokens_per_step=train.batch_size * config.row_length,
        student_flops=student,
        critic_flops=critic,
        forward_flops=forward,
        evaluations=1 + (math.ceil(train.steps / every) if every else 1) + further_evaluations(config),
        train_tokens=train_tokens,
        val_tokens=val_tokens,
    )


def further_evaluations(config: Config) -> int:
    """How many evaluations `eval.also_at` adds to those of the rhythm and the last step."""
    every, steps = config.eval.every, config.train.steps
    return sum(step < steps and not (every and step % every == 0) for step in config.eval.further_steps)


def flops_per_token(config: Config, forward: float) -> tuple[float, float]:
    """FLOPs of a training step per token: the players', and their critic's. `forward`: one player's forward pass."""
    if config.train.objective == "cross-entropy":
        return 3 * forward, 0.0
    if config.train.objective == "bootstrap":
        players, (playing, judging) = passes_per_token(config.bootstrap, config.model.block_size)
        return players * playing * forward, players * judging * forward
    method, players = config.method, player_count(config)
    looks = 2 if method.context == "student" else 1
    judging = forward if "self" in config.critic.members else 0.0
    if critic_count(config) and not config.critic.cache:
        judging += critic_flops(config)
    windows = 1 + float(tabulate(method, config.train.steps)["imagined_windows"].mean())
    return players * windows * (3 * method.inner_epochs + looks - 1) * forward, players * looks * judging


def player_count(config: Config) -> int:
    """How many models learn: the student, and its twin where it has one."""
    if config.train.objective == "bootstrap":
        return passes_per_token(config.bootstrap, config.model.block_size)[0]
    twin = config.critic.kind == "self" and config.critic.past == "twin"
    return 2 if twin and config.train.objective == "avatarl" else 1


def critic_model(config: Config) -> GPT:
    """The model critic of `config`, without its numbers."""
    with torch.device("meta"):
        return GPT(critic_config(config).model, vocabulary(config))


def critic_flops(config: Config) -> float:
    """FLOPs per token of asking the model critics of `config` once."""
    return critic_count(config) * critic_model(config).flops_per_token()


def critic_config(config: Config) -> Config:
    """The run that trains the model critic of `config`, on the same text and tokens."""
    base = preset(critic_preset(config))
    block_size = max(base.model.block_size, config.model.block_size)
    return override(
        dataclasses.replace(base, data=config.data, run=config.run),
        model={"block_size": block_size},
        eval={"prompt": config.eval.prompt, "sample_tokens": config.eval.sample_tokens},
    )


def critic_count(config: Config) -> int:
    """How many frozen models judge a run of `config`."""
    c = config.critic
    if config.train.objective != "avatarl" or "model" not in c.members:
        return 0
    return 2 if c.cross_fit else 1


def cache_layout(config: Config) -> CacheLayout | None:
    """What a cached critic of `config` writes, about; None where there is none or its text is of unknown length."""
    tokens, vocab_size = split_tokens(config)[0], vocabulary(config)
    if config.train.objective != "avatarl" or not config.critic.cache or tokens is None:
        return None
    block_size = config.model.block_size
    return CacheLayout(window_count(int(tokens), block_size), block_size, cache_top(config), vocab_size)


def cache_top(config: Config) -> int:
    """How many tokens a cached critic keeps for a position."""
    return min(config.critic.cache_top or 2 * config.method.top_k, vocabulary(config))


def split_tokens(config: Config) -> tuple[float | None, float | None]:
    """Tokens of the training and of the validation split, about; None where only reading would tell."""
    data = config.data
    per_token = CHARACTERS_PER_TOKEN[data.tokenizer]
    text, other = characters(data.corpus or "tinyshakespeare"), characters(data.val_corpus)
    share = data.train_stop - data.train_start
    if data.val_corpus is not None:
        return (text and share * text / per_token), (other and other / per_token)
    if text is None:
        return None, None
    return share * (1 - data.val_fraction) * text / per_token, data.val_fraction * text / per_token


def characters(corpus: str | None) -> float | None:
    """About how long the text of that name or path is: a size of files, or a nominal one."""
    if corpus is None:
        return None
    path = Path(corpus)
    if (path / TOKENS).is_file():
        return (path / TOKENS).stat().st_size / DTYPE.itemsize * CHARACTERS_PER_TOKEN["gpt2"]
    if path.is_file():
        return float(path.stat().st_size)
    if path.is_dir():
        return float(sum(p.stat().st_size for p in path.rglob("*.txt"))) or None
    return CORPUS_CHARACTERS.get(corpus)


def memory_bytes(config: Config, hardware: Hardware, world: int = 1, saved: float | None = None) -> float:
    """Estimated peak of a process, besides PyTorch itself: weights, gradients, optimisers, activations, logits.

    saved: what a micro-batch's forward pass keeps for the backward pass, where that was measured; without it, 24
    numbers of width D per position and layer in the products' type, and the logits of cross-entropy.
    """
    work, m, size = count(config), config.model, hardware.dtype.itemsize
    c, avatarl = config.critic, config.train.objective == "avatarl"
    trained = 3 if config.optim.name == "muon" else 4  # weight, gradient and the optimiser's one or two moments
    copies = {"ema": 1, "ring": c.ring_size}.get(c.past, 0) if avatarl and "self" in c.members else 0
    building = 0.0  # before the run begins
    weights = 4.0 * work.parameters * (player_count(config) * trained + copies)
    if critic_count(config) and not c.cache:
        weights += 4.0 * critic_count(config) * critic_model(config).parameter_count()
    if avatarl and "mixed" in c.members and not c.cache:
        tokens = int(split_tokens(config)[0] or 0)
        weights += mixed_bytes(tokens, work.vocab_size)
        building = MIXED_BUILDING * tokens
    if avatarl and "suffix" in c.members and not c.cache:
        weights += suffix_bytes(int(split_tokens(config)[0] or 0), work.vocab_size, c.suffix_context)
    windows = 1 + config.method.imagined_windows if avatarl else 1
    if windows > 1:
        together = written_at_once(m.block_size, work.vocab_size, hardware.device.type)
        weights += 2.0 * together * m.block_size * work.vocab_size
    positions = max(1, work.micro_batch // world) * config.row_length * windows
    logits = positions * work.vocab_size
    if saved is None:
        saved = 24.0 * positions * m.n_layer * m.n_embd * size + (0 if avatarl else 4 * logits)
    chunk = CHUNK_ELEMENTS.get(hardware.device.type, min(CHUNK_ELEMENTS.values()))
    # What comes and goes: gradients inside a layer, those of embedding and unembedding before they are added, logits.
    passing = 24.0 * positions * m.n_embd * 4 + 8.0 * work.vocab_size * m.n_embd
    passing += 24.0 * min(logits, chunk) if avatarl else 8.0 * logits
    evaluated = (8.0 + 2 * size) * evaluated_rows(config) * m.block_size * work.vocab_size
    return max(building, weights + max(saved + passing, evaluated))


MIXED_BUILDING = 40.0 * 12
"""Bytes a token of what a mixed critic sorts while it is built: five numbers for each of a place's contexts."""


def mixed_bytes(tokens: int, vocab_size: int) -> float:
    """What a mixed critic of `tokens` tokens holds, about: its table, and what it remembers of every position.

    Some three entries a token of English by characters, of 45 bytes each with rows and index, and the fit's own.
    """
    remembered = 2.0 * tokens * vocab_size
    return 160.0 * tokens + (remembered if remembered <= MEMORY_BYTES else 0.0)


def suffix_bytes(tokens: int, vocab_size: int, context: int) -> float:
    """What a suffix array of `tokens` tokens holds: places, ranks and followers, keys of contexts, running counts."""
    keys = 8.0 * math.ceil(context / tokens_per_key(vocab_size))
    return tokens * (12.0 + keys) + 4.0 * min(COUNT_ENTRIES, tokens * vocab_size / LEAST_STRIDE)


def evaluated_rows(config: Config) -> int:
    """Sequences of one forward pass of an evaluation, at most."""
    _, tokens = split_tokens(config)
    windows = math.ceil(tokens / config.model.block_size) if tokens else config.eval.batch_size
    return min(config.eval.batch_size, windows)
