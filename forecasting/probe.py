"""A run's own step in small: built from random weights and random tokens, to be timed and weighed.

Student, critic, objective, optimisers and precision are the run's, and so are width, vocabulary and context; the
number of layers is not. Nothing is compiled, read or written.
"""

import contextlib
import dataclasses
import gc
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from avatarl.build import build_objective, frozen_critic
from avatarl.cache import judge_windows
from avatarl.imagination import Imagination
from bootstrap.build import build_bootstrap
from config import Config, override
from data.batches import Batch, TrainingBatches, prefetch, window_count
from data.critic_cache import CacheLayout
from data.prepare import Dataset
from forecasting.workload import cache_top, critic_config, critic_count, split_tokens, vocabulary
from model import GPT
from train_core import Job, learn
from training.distributed import World
from training.evaluation import evaluate
from training.hardware import Hardware, prepare_model, synchronise
from training.optim import build_optimizers, set_lr
from training.record import Recorder

CORPUS_TOKENS = 200_000  # at most: the n-gram tables of more take longer than they tell
WORDS = 10_000  # of the synthetic text
WARM_UP_TOKENS = 16
PROBED_WINDOWS = 2**8  # imagined for a measurement on a CPU: a run writes more at once, at a little less for each


class Cost(NamedTuple):
    """Seconds and bytes of a micro-batch, and seconds of an evaluation's forward pass on as many sequences."""

    micro: float
    once: float
    """Seconds of what a step does after its micro-batches: the optimisers, the student's past."""
    memory: float
    """The process's peak; NaN where the system does not tell."""
    saved: float
    """What the forward pass keeps for the backward pass, weights not counted."""
    evaluation: float


class Probe:
    """A model of `layers` layers in training.

    collect: a micro-batch finds the gradients of others in place, as in a step of several.
    Raises ConfigError for settings that the objective refuses.
    """

    def __init__(self, config: Config, hardware: Hardware, layers: int, *, collect: bool) -> None:
        hardware = dataclasses.replace(hardware, compile=False)
        small = override(config, model={"n_layer": layers}, train={"batch_size": 1, "grad_accum": 1})
        vocab_size, stream = vocabulary(config), synthetic_stream(config)
        torch.manual_seed(config.run.seed)
        student = prepare_model(GPT(small.model, vocab_size), hardware)
        self.cached = config.train.objective == "avatarl" and config.critic.cache
        self.critics = [] if self.cached else random_critics(config, hardware)
        unread: Any = object()  # batches bring what a cache holds
        cache = unread if self.cached else None
        if small.train.objective == "bootstrap":  # the curriculum, which needs a text, is left out
            small = override(small, bootstrap={"stages": "", "exact_weight": 1.0})
            objective: Any = build_bootstrap(student, small, stream, None, hardware.autocast)
        else:
            objective = build_objective(student, small, stream, self.critics, hardware.autocast, cache, strings(config))
        dataset = Dataset(stream, stream, None, "", "", "", False, 1)  # type: ignore[arg-type]  # nobody asks for text
        recorder = Recorder(Path(), first=False, steps=1, start=0)  # writes nothing
        self.job = Job(small, dataset, objective, [], hardware, World(), Path(), recorder)
        self.collect, self.once, self.runs = collect, 0.0, 0
        self.writing: dict[int, float] = {}  # seconds of a step's imagined windows, by rows
        self.warm_up()

    def warm_up(self) -> None:
        """Fresh optimisers and a step on a few tokens: their state and what libraries prepare are then in place."""
        job = self.job
        job.optimizers = build_optimizers(job.objective, job.config.optim, job.hardware.dtype)
        set_lr(job.optimizers, 1e-3)  # random tokens teach nothing; the numbers are to stay finite
        for optimizer in job.optimizers:
            optimizer.register_step_pre_hook(lambda *_: self.clock(-1))
            optimizer.register_step_post_hook(lambda *_: self.clock(+1))
        self.step(self.batch(WARM_UP_TOKENS / job.config.model.block_size))

    def keep_one_layer(self) -> None:
        """Go on with the first layer alone, in the student's past and twin too."""
        models = [m for m in self.job.objective.modules() if isinstance(m, GPT)]
        for model in models:
            if not any(model is critic for critic in self.critics):
                model.blocks = model.blocks[:1]
        self.job.optimizers = []
        gc.collect()
        self.warm_up()

    def clock(self, sign: int) -> None:
        """Called before (-1) and after (+1) what happens once per step."""
        synchronise(self.job.hardware.device)
        self.once += sign * time.perf_counter()

    def batch(self, rows: float) -> Batch:
        """`rows` sequences, or one of that share of the context."""
        job, length = self.job, self.job.config.row_length
        count, cut = max(1, int(rows)), max(1, round(length * min(rows, 1.0)))
        batches = TrainingBatches(job.dataset.train, length, count, job.config.run.seed)
        (whole,) = prefetch(batches, range(1), [(0, count)], job.hardware.device)
        tokens, targets = whole.tokens[:, :cut], whole.targets[:, :cut]
        return whole._replace(tokens=tokens, targets=targets, judged=self.judged(tokens) if self.cached else None)

    def judged(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """As much as a cached critic sends along with tokens (B, T): ids and log-probabilities (B, T, M)."""
        config, vocab_size = self.job.config, vocabulary(self.job.config)
        top = cache_top(config)
        first = torch.randint(vocab_size, (*tokens.shape, 1), device=tokens.device)
        ids = (first + torch.arange(top, device=tokens.device) * (vocab_size // top)) % vocab_size  # M different ones
        return ids.int(), torch.full(ids.shape, -math.log(2 * top), dtype=torch.float16, device=tokens.device)

    def step(self, batch: Batch) -> tuple[float, float]:
        """Seconds of one micro-batch, and of what follows once per step."""
        job, device = self.job, self.job.hardware.device
        if self.collect:
            for weight in (w for w in job.objective.parameters() if w.requires_grad):
                weight.grad = torch.zeros_like(weight)
        self.once = 0.0
        writing = self.imagine(batch)
        synchronise(device)
        start = time.perf_counter()
        learn(job, [batch], measure=False)
        self.clock(-1)
        job.objective.after_step(job.state.step)
        self.clock(+1)
        return writing + time.perf_counter() - start - self.once, self.once

    def imagine(self, batch: Batch) -> float:
        """Seconds that a step's imagined windows for the rows of `batch` take to write; they lie ready then."""
        own: Imagination | None = getattr(self.job.objective, "imagination", None)
        count, device = self.job.config.method.imagined_windows, self.job.hardware.device
        if own is not None and len(batch.tokens) not in self.writing:
            own.at_once = PROBED_WINDOWS if device.type == "cpu" else None
            synchronise(device)
            start = time.perf_counter()
            steps = own.write_anew(batch.first, batch.indices, count)
            synchronise(device)
            self.writing[len(batch.tokens)] = (time.perf_counter() - start) / steps
        return self.writing.get(len(batch.tokens), 0.0)

    def look(self, batch: Batch) -> float:
        """Seconds of one forward pass of an evaluation."""
        job, block_size = self.job, self.job.config.model.block_size
        windows = batch.tokens[:, :block_size], batch.targets[:, :block_size]
        start = time.perf_counter()
        evaluate(job.objective.student, [windows], job.hardware, bins=job.config.eval.ece_bins)
        synchronise(job.hardware.device)
        return time.perf_counter() - start

    @contextlib.contextmanager
    def counting(self) -> Iterator[dict[int, int]]:
        """Bytes that forward passes keep for their backward passes, by address; the weights themselves not counted."""
        sizes: dict[int, int] = {}
        weights = {w.untyped_storage().data_ptr() for w in self.job.objective.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # with its node it would be a cycle that nothing collects

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield sizes

    def cost(self, rows: float, seconds: float = 0.3, at_least: int = 1) -> Cost:
        """What `rows` sequences cost: medians of repetitions, for so many `seconds` and `at_least` so many."""
        batch = self.batch(rows)
        with peak_of(self.job.hardware.device) as memory:
            with self.counting() as sizes:
                steps = [self.step(batch)]
            if sum(steps[0]) < seconds or at_least > 1:
                steps = repeat(lambda: self.step(batch), seconds, at_least)
        looks = repeat(lambda: self.look(batch), seconds / 2, at_least=2)
        self.runs = len(steps)
        micro, once = (median(values) for values in zip(*steps, strict=True))
        return Cost(micro, once, memory[0], float(sum(sizes.values())), median(looks))


def random_critics(config: Config, hardware: Hardware) -> list[GPT]:
    """The frozen models that judge a run of `config`, with random weights."""
    model = critic_config(config).model
    return [prepare_model(GPT(model, vocabulary(config)), hardware) for _ in range(critic_count(config))]


def caching_seconds(config: Config, hardware: Hardware, layout: CacheLayout) -> float:
    """Seconds that the critic of a run of `config` takes for a window of its cache, measured on about 1,024 tokens."""
    hardware = dataclasses.replace(hardware, compile=False)
    stream, vocab_size = synthetic_stream(config), vocabulary(config)
    models = random_critics(config, hardware)
    critic = frozen_critic(config, stream, vocab_size, models, hardware.autocast, hardware.device, strings(config))
    length = layout.block_size
    windows = range(min(max(1, 1024 // length), window_count(len(stream), length)))

    def ask() -> float:
        start = time.perf_counter()
        judge_windows(critic, stream, layout, windows, hardware.device)  # ends on the host
        return time.perf_counter() - start

    return median(repeat(ask, 0.5)) / len(windows)


def repeat(action: Callable[[], Any], seconds: float, at_least: int = 1) -> list[Any]:
    """What `action` returned, called for so many seconds and so many times at least."""
    start, found = time.perf_counter(), [action()]
    while len(found) < at_least or time.perf_counter() - start < seconds:
        found.append(action())
    return found


def resident_bytes(device: torch.device) -> float:
    """What the process holds now: on a GPU what is allocated there; 0 where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.memory_allocated(device))
    try:
        return resident("VmRSS")
    except OSError:
        return 0.0


def resident(field: str) -> float:
    """Bytes of a line of /proc/self/status; NaN where it is missing. Raises OSError on systems without it."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024.0 * int(found[1]) if found else math.nan


@contextlib.contextmanager
def peak_of(device: torch.device) -> Iterator[list[float]]:
    """[peak bytes] of the block: the allocator's on a GPU, the process's on Linux; NaN elsewhere."""
    peak, marker = [math.nan], Path("/proc/self/clear_refs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = float(torch.cuda.max_memory_allocated(device))
        return
    try:
        marker.write_text("5")  # the peak begins anew: proc(5)
    except OSError:
        yield peak
        return
    yield peak
    peak[0] = resident("VmHWM")


def strings(config: Config) -> list[str]:
    """What the made-up tokens stand for: characters from the newline on, where a run of `config` has characters."""
    return [chr(10 + i) for i in range(vocabulary(config))] if config.data.tokenizer == "char" else []


def synthetic_stream(config: Config) -> np.ndarray:
    """Random ids in random words of Zipf's frequencies, so that n-gram tables get about the shape of a text's.

    As long as the training split, up to CORPUS_TOKENS.
    """
    vocab_size, (known, _) = vocabulary(config), split_tokens(config)
    length = int(max(min(known or CORPUS_TOKENS, CORPUS_TOKENS), 4 * config.model.block_size))
    draw = np.random.default_rng(config.run.seed)
    letters = draw.choice(vocab_size, (WORDS, 8), p=zipf(vocab_size))
    sizes = draw.integers(1, 9, WORDS)
    words = draw.choice(WORDS, length, p=zipf(WORDS))
    inside = np.arange(8) < sizes[words, None]  # (length, 8)
    return letters[words][inside][:length].astype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def zipf(count: int) -> np.ndarray:
    """Probabilities in proportion to 1, 1/2, 1/3, …: (count,)."""
    weights = 1 / np.arange(1, count + 1)
    return weights / weights.sum()
