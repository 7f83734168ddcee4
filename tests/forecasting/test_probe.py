"""The small run that is timed: the run's own step, and nothing of it left behind."""

import itertools
import math
import mmap
import time

import numpy as np
import pytest
import torch

from config import Config, ConfigError, RunConfig, override
from forecasting import probe as probing
from forecasting.probe import Probe, caching_seconds, peak_of, repeat, resident_bytes, synthetic_stream
from forecasting.workload import cache_layout
from model import GPT
from tests.tiny_train import PRESET, files_below, flags
from train import read_command
from training.hardware import choose

HARDWARE = choose(RunConfig(device="cpu", threads=1, dtype="float32"))
CPU = torch.device("cpu")


def tiny(**groups) -> Config:
    """TINY with changes by group, on its default corpus."""
    return override(read_command([PRESET, *flags()])[1].config, **groups)


@pytest.mark.parametrize(
    "groups",
    [
        {"train": {"objective": "cross-entropy"}},
        {"critic": {"kind": "ngram"}},
        {"critic": {"kind": "model", "cross_fit": True}},
        {"critic": {"kind": "model", "cache": True}},
        {"critic": {"kind": "self", "past": "ema"}},
        {"critic": {"kind": "self", "past": "ring"}},
        {"critic": {"kind": "self", "past": "twin"}, "optim": {"name": "adamw"}},
        {"critic": {"kind": "self"}, "method": {"context": "student"}},
        {"method": {"imagined_windows": 2}},
    ],
    ids=str,
)
def test_every_kind_of_run_can_be_tried(place, groups):
    """Catches a critic, optimiser or context that the dry run cannot build, before and after layers are dropped."""
    before = files_below(place)
    probe = Probe(tiny(**groups), HARDWARE, 3, collect=True)
    critics = [critic.parameter_count() for critic in probe.critics]
    for layers in (3, 1):
        players = [m for m in probe.job.objective.modules() if isinstance(m, GPT)]
        assert players and all(len(m.blocks) == layers for m in players)
        trained = {id(p) for o in probe.job.optimizers for g in o.param_groups for p in g["params"]}
        assert trained == {id(p) for p in probe.job.objective.parameters() if p.requires_grad}
        cost = probe.cost(2, seconds=0)
        assert all(value > 0 for value in cost)
        if layers == 3:
            probe.keep_one_layer()
    assert [critic.parameter_count() for critic in probe.critics] == critics
    assert probe.job.bad_steps.read() == (0, 0, 0)  # the numbers stayed finite, so that every step was a whole one
    assert files_below(place) == before


def test_optimisers_are_timed_apart():
    """Catches an optimiser that counts with every micro-batch, and one that is not counted at all."""
    probe = Probe(tiny(), HARDWARE, 1, collect=False)
    assert len(probe.job.optimizers) == 2  # AdamW and Muon
    for optimizer in probe.job.optimizers:
        optimizer.register_step_pre_hook(lambda *_: time.sleep(0.1))  # after the hook that starts the clock
    micro, once = probe.step(probe.batch(2))
    assert 0.2 <= once < 0.5 and micro < 0.2


def test_gradients_of_other_micro_batches_are_in_place(monkeypatch):
    """Catches a probe of one micro-batch that has more room and less to add than those of a real step."""
    seen = []
    learn = probing.learn

    def watched(job, micros, measure):
        seen.append([p.grad is not None for p in job.objective.parameters() if p.requires_grad])
        return learn(job, micros, measure)

    monkeypatch.setattr(probing, "learn", watched)
    Probe(tiny(), HARDWARE, 1, collect=True)
    Probe(tiny(), HARDWARE, 1, collect=False)
    assert all(seen[0]) and not any(seen[1])


def test_what_is_saved_grows_with_rows_and_layers():
    """Catches weights counted as activations, tensors counted twice, and a forward pass that counts nothing."""
    probe = Probe(tiny(train={"objective": "cross-entropy"}), HARDWARE, 2, collect=False)
    one, two, four = (probe.cost(rows, seconds=0).saved for rows in (1, 2, 4))
    assert two - one > 0 and four - two == 2 * (two - one)
    assert one - (two - one) < 0.1 * one  # float32: nothing that does not grow
    probe.keep_one_layer()
    shallow = [probe.cost(rows, seconds=0).saved for rows in (1, 2)]
    # Linear layers keep their inputs, at least: 16 positions of width 16 twice, and of four times that.
    assert (two - one) - (shallow[1] - shallow[0]) > 16 * (16 * 2 + 64) * 4


def test_half_a_sequence_is_a_shorter_one():
    """Catches rows below one that are rounded to nothing, or to a whole sequence."""
    probe = Probe(tiny(critic={"kind": "model", "cache": True}), HARDWARE, 1, collect=False)
    assert probe.batch(0.5).tokens.shape == (1, 8) == probe.batch(0.5).targets.shape
    batch = probe.batch(3)
    assert batch.tokens.shape == (3, 16) and torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert batch.judged is not None
    ids, log_probs = batch.judged
    assert ids.shape == log_probs.shape == (3, 16, 8)  # M = 2k
    assert all(len(set(row)) == 8 for row in ids.flatten(0, 1).tolist())
    assert ids.min() >= 0 and ids.max() < 65 and log_probs.float().exp().sum(-1).max() <= 1


def test_the_synthetic_text_looks_like_one():
    """Catches ids outside the vocabulary, a text longer than the run's, and one without frequent n-grams."""
    config = tiny()
    stream = synthetic_stream(config)
    assert len(stream) == 200_000 and stream.dtype == np.uint16 and stream.max() < 65
    assert np.array_equal(stream, synthetic_stream(config))
    pairs = np.unique(stream[:-1].astype(int) * 65 + stream[1:], return_counts=True)[1]
    words = np.unique(np.lib.stride_tricks.sliding_window_view(stream, 5), axis=0)
    assert len(pairs) < 65**2 and pairs.max() > 20 * pairs.mean()
    assert len(words) < 0.6 * len(stream)  # Shakespeare repeats itself too
    assert len(synthetic_stream(override(config, data={"corpus": "pydoc", "train_stop": 0.1}))) < 42_000


def test_k_beyond_the_vocabulary_is_refused():
    """Catches a forecast for a run that cannot start."""
    with pytest.raises(ConfigError, match=r"method\.top-k = 66: the vocabulary has only 65 tokens"):
        Probe(tiny(method={"top_k": 66}), HARDWARE, 1, collect=False)


def test_a_cache_is_asked_of_its_critic():
    """Catches a pass over the corpus that costs nothing, or is made by another critic."""
    for critic in ({"kind": "ngram"}, {"kind": "model"}):
        config = tiny(critic={**critic, "cache": True})
        layout = cache_layout(config)
        assert layout is not None
        assert 0 < caching_seconds(config, HARDWARE, layout) < 5


def test_repetitions_last_as_long_as_asked():
    """Catches a slow step that is repeated for nothing, and a quick one that is timed once."""
    times = itertools.count()
    assert repeat(lambda: next(times), seconds=0) == [0]
    assert repeat(lambda: next(times), seconds=0, at_least=3) == [1, 2, 3]
    assert 3 <= len(repeat(lambda: time.sleep(0.01), seconds=0.1)) <= 10


def test_the_cold_start_is_left_out(monkeypatch):
    """Catches first steps, slow by nature, counted as the machine's speed."""
    probe = Probe(tiny(), HARDWARE, 1, collect=False)
    seconds = iter([100.0, *[0.1] * 100])
    monkeypatch.setattr(probe, "step", lambda batch: (next(seconds), 0.0))
    assert probe.cost(1, seconds=0, at_least=3).micro == pytest.approx(0.1) and probe.runs == 3
    slow = iter([5.0])
    monkeypatch.setattr(probe, "step", lambda batch: (next(slow), 0.0))
    assert probe.cost(1, seconds=0.3).micro == 5.0 and probe.runs == 1


def test_the_peak_is_that_of_the_block():
    """Catches a peak of an earlier block, and one that forgets what was freed in it."""
    with peak_of(CPU) as peak, mmap.mmap(-1, 200_000_000) as fresh:  # malloc may hand out what an earlier test freed
        for page in range(0, len(fresh), mmap.PAGESIZE):
            fresh[page] = 1
    if math.isnan(peak[0]):
        pytest.skip("this system does not tell a process's peak")
    with peak_of(CPU) as later:
        pass
    assert peak[0] - later[0] > 150e6
    assert 0.5 * later[0] < resident_bytes(CPU) < 1.5 * later[0]
