"""From a few measured points to a whole run: the arithmetic, what is measured, and how near it comes."""

import json
import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import Config, RunConfig, override, preset
from forecasting import speed as speeds
from forecasting.probe import Cost, Probe
from forecasting.speed import Points, Sizes, affordable, conclude, measure, two_sizes
from forecasting.workload import count, memory_bytes
from tests.tiny_train import PRESET, ROOT, environment, flags, trained
from train import read_command
from training.distributed import World
from training.hardware import Hardware, choose, matmul_peak

HARDWARE = choose(RunConfig(device="cpu", threads=1, dtype="float32"))
AMOUNT = st.floats(0, 100)


def tiny(**groups) -> Config:
    """TINY with changes by group."""
    return override(read_command([PRESET, *flags()])[1].config, **groups)


@given(AMOUNT, AMOUNT, AMOUNT, AMOUNT, st.sampled_from([0.5, 1, 4]), st.integers(1, 4))
def test_scaling_is_exact_for_the_model_of_costs(fixed, per_layer, head, layer, rows, layers):
    """Catches a slope divided by the wrong difference, and a cost per layer multiplied by rows."""

    def cost(sizes: Sizes) -> Cost:
        value = fixed + per_layer * sizes.layers + sizes.rows * (head + sizes.layers * layer)
        return Cost(value, 0.0, 0.0, value, value)

    base, to = Sizes(layers, rows), Sizes(layers + 14, 24)
    shallow = cost(Sizes(1, rows)) if layers > 1 else None
    points = Points(base, rows / 2, cost(base), cost(Sizes(layers, rows / 2)), shallow)
    if shallow is None:
        to = Sizes(layers, 24)
    assert points.scaled("micro", to, per_layer=per_layer) == pytest.approx(cost(to).micro, abs=1e-6)
    assert points.scaled("micro", base, per_layer=per_layer) == cost(base).micro


def test_noise_does_not_beat_the_machine():
    """Catches a forecast that falls with the number of rows or layers because something else ran meanwhile."""
    slow, quick = (Cost(seconds, 0.0, 0.0, 0.0, 0.0) for seconds in (2.0, 1.0))
    points = Points(Sizes(2, 1), 0.5, quick, slow, slow)
    assert points.scaled("micro", Sizes(2, 11)) == 1.0
    assert points.scaled("micro", Sizes(2, 11), least=(0.3, 0.1)) == pytest.approx(1 + 10 * 0.3)
    assert points.scaled("micro", Sizes(4, 11), least=(0.3, 0.1)) == pytest.approx(1 + 10 * 0.3 + 2 * 11 * 0.1)


def test_a_step_is_its_micro_batches_and_one_update():
    """Catches an optimiser that is paid for with every micro-batch, or grows with rows instead of layers."""
    config = override(preset("avatarl-250m"), critic={"kind": "ngram"})
    whole = Sizes(16, 24)

    def cost(layers: int, rows: float) -> Cost:
        return Cost(1 + rows * (10 + layers), 5.0 + layers, 0.0, 1e6 * rows * layers, 2 * rows)

    points = Points(Sizes(4, 1), 0.5, cost(4, 1), cost(4, 0.5), cost(1, 1))
    found = conclude(config, HARDWARE, World(), 1e30, points, whole, before=7e8)
    assert found.step == pytest.approx(20 * cost(16, 24).micro + cost(16, 24).once)
    assert found.evaluation == pytest.approx(2 / 1024)  # seconds for a sequence of 1,024
    assert found.memory == pytest.approx(7e8 + memory_bytes(config, HARDWARE, 1, cost(16, 24).saved))
    eight = conclude(config, HARDWARE, World(size=8), 1e30, points, Sizes(16, 3), before=0.0)
    assert eight.evaluation == pytest.approx(found.evaluation / 8)


def test_a_whole_step_is_taken_as_measured():
    """Catches a measured peak that an estimate replaces, and one that hides a larger evaluation."""
    config = tiny()
    costs = Cost(0.5, 0.1, 3e8, 1e5, 0.2), Cost(0.3, 0.1, 2e8, 5e4, 0.1)
    points = Points(Sizes(1, 4), 2, *costs, None)
    found = conclude(config, HARDWARE, World(), 1e30, points, Sizes(1, 4), before=1e8)
    assert found.step == pytest.approx(0.6) and found.memory == 3e8
    unknown = points._replace(at_base=costs[0]._replace(memory=math.nan))
    estimate = conclude(config, HARDWARE, World(), 1e30, unknown, Sizes(1, 4), before=1e8).memory
    assert estimate == 1e8 + memory_bytes(config, HARDWARE, 1, 1e5)
    web = override(config, data={"tokenizer": "gpt2"}, eval={"batch_size": 10_000}, model={"block_size": 16})
    assert conclude(web, HARDWARE, World(), 1e30, points, Sizes(1, 4), before=1e8).memory > 3e9


@pytest.mark.parametrize(
    ("name", "peak", "expected"),
    [
        ("avatarl-char", 4e11, Sizes(2, 16)),  # 5.7 GFLOP a step
        ("avatarl-char", 2e9, Sizes(2, 1)),
        ("avatarl-250m", 4e11, Sizes(4, 1)),
        ("avatarl-250m", 8e10, Sizes(2, 1)),
        ("avatarl-250m", 1e9, None),
        ("pretrain-char-gpu", 4e11, Sizes(4, 5)),
        ("avatarl-char-gpu", 4e11, Sizes(4, 2)),  # imagined windows beside each
    ],
)
def test_what_is_measured_suits_the_machine(name, peak, expected):
    """Catches a dry run that takes minutes, one that measures a part where the whole is quick, and one that hangs."""
    config = preset(name)
    whole = Sizes(config.model.n_layer, config.train.batch_size // config.train.grad_accum)
    found = affordable(config, HARDWARE, whole, peak)
    if expected is None:
        assert found is None
    else:
        assert found is not None and found.layers == expected.layers
        assert expected.rows / 2 <= found.rows <= expected.rows * 2


def test_no_probe_outgrows_the_memory(monkeypatch):
    """Catches a dry run that is killed for the memory of the run it was to foresee."""
    config = override(preset("avatarl-250m"), model={"n_embd": 8192})
    assert affordable(config, HARDWARE, Sizes(16, 24), 1e15) is None
    said = measure(config, HARDWARE, World(), 1e15)
    assert "not at all" in said.how and "25%" in said.how
    work = count(config)
    assert said.step == pytest.approx(work.flops_per_step / 0.25e15)
    assert said.evaluation == pytest.approx(work.forward_flops / 0.25e15)
    part = override(preset("pretrain-char-gpu"), train={"batch_size": 4096}, eval={"batch_size": 4096})
    found = affordable(part, HARDWARE, Sizes(6, 4096), 1e15)
    assert found is not None and memory_bytes(speeds.of_sizes(part, found), HARDWARE) < speeds.LIMIT_BYTES


class Slow:
    """A probe whose micro-batches take so many seconds for a sequence."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.asked = seconds, list[float]()

    def cost(self, rows: float, **_) -> Cost:
        self.asked.append(rows)
        return Cost(self.seconds * rows, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("seconds", "rows", "partial", "asked"),
    [
        (0.1, 16, False, [2, 16]),
        (10, 1, False, [0.125, 1]),
        (0.1, 1, True, [0.125, 1]),
        (0.1, 12, True, [1, 12]),
        (4, 1, True, [0.125, 0.5]),
        (1, 3, True, [0.375, 1]),
        (50, 1, True, [0.125, 0.25]),
    ],
)
def test_a_partial_probe_ends_soon(seconds, rows, partial, asked):
    """Catches a dry run that insists on a whole sequence on a machine that needs a minute for it."""
    probe = Slow(seconds)
    base, few, at_base, at_few = two_sizes(probe, Sizes(2, rows), partial=partial)  # type: ignore[arg-type]
    assert probe.asked == asked and (few, base.rows) == tuple(asked)
    assert at_base.micro > at_few.micro and base.layers == 2


def test_what_was_measured_is_said():
    """Catches numbers whose origin the user cannot tell."""
    config, cost = preset("avatarl-250m"), Cost(1.0, 1.0, 1.0, 1.0, 1.0)
    compiled = choose(RunConfig(device="cpu", threads=1, compile="on"))
    partly = Points(Sizes(2, 0.5), 0.25, cost, cost, cost)
    said = speeds.how(config, HARDWARE, partly, Sizes(16, 24), 1, micros=20)
    assert said == "on 1 and 2 layers with 256 and 512 tokens, scaled to 16 with 20 times 24,576, give or take a third"
    entire = Points(Sizes(16, 24), 12, cost, cost, None)
    assert speeds.how(config, HARDWARE, entire, Sizes(16, 24), 5, micros=20) == "5 whole micro-batches, of 20 in a step"
    said = speeds.how(preset("avatarl-char"), compiled, entire, Sizes(16, 24), 7, micros=1)
    assert said.startswith("7 whole steps") and ("compiles" in said) == compiled.compile


def test_the_forecast_comes_near_the_run(place):
    """Catches a forecast of other steps than the run's: other batch, critic, precision or model.

    Within a factor of two, once in three tries: the machine may be busy.
    """
    shape: dict[str, Any] = {
        "model_n_embd": 64,
        "model_n_layer": 2,
        "model_block_size": 32,
        "train_batch_size": 8,
        "log_every": 100,
    }
    config = read_command([PRESET, *flags(data_corpus="corpus.txt", **shape)])[1].config
    ratios = []
    for i in range(3):
        found = measure(config, HARDWARE, World(), matmul_peak(HARDWARE.device, HARDWARE.dtype))
        assert found.how.endswith("whole steps")
        run = trained(f"run{i}", train_steps=25, eval_every=0, eval_ladder=0, eval_sample_tokens=0, **shape)
        ratios.append(found.step / (json.loads((run / "result.json").read_text())["seconds"] / 25))
        if 0.5 < ratios[-1] < 2:
            return
    pytest.fail(f"forecast over measured: {ratios}")


def test_a_part_tells_the_whole(monkeypatch):
    """Catches an extrapolation that forgets layers, rows or the optimiser. Of three tries one has to come near.

    Time within a factor of two; what is kept for the backward pass is no matter of luck: within a hundredth.
    """
    shape = {"n_layer": 8, "n_embd": 96, "n_head": 2, "block_size": 128}
    config = tiny(model=shape, train={"batch_size": 16}, critic={"kind": "self"})
    peak, ratios, kept = matmul_peak(HARDWARE.device, HARDWARE.dtype), list[float](), list[float]()
    monkeypatch.setattr(speeds, "affordable", lambda *_: Sizes(4, 4))

    def remember(config: Config, hardware: Hardware, world: int, saved: float) -> float:
        kept.append(saved)
        return 0.0

    monkeypatch.setattr(speeds, "memory_bytes", remember)
    for _ in range(3):
        full = Probe(config, HARDWARE, 8, collect=False).cost(16, at_least=2)
        part = measure(config, HARDWARE, World(), peak)
        assert part.how.startswith("on 1 and 4 layers with 64 and 512 tokens")
        assert kept[-1] == pytest.approx(full.saved, rel=0.01)
        ratios.append(part.step / (full.micro + full.once))
        if 0.5 < ratios[-1] < 2:
            return
    pytest.fail(f"extrapolated over measured: {ratios}")


MEMORY = """
from config import RunConfig, override, preset
from forecasting.probe import Probe, resident_bytes
from forecasting.workload import memory_bytes
from training.hardware import choose

hardware = choose(RunConfig(device="cpu", threads=1, dtype="float32"))
config = override(
    preset("pretrain-char"),
    model={"n_layer": 4, "n_embd": 192, "n_head": 3, "block_size": 256},
    train={"batch_size": 16},
    eval={"batch_size": 1},
)
before = resident_bytes(hardware.device)
probe = Probe(config, hardware, 4, collect=False)
cost = probe.cost(16, seconds=0)
print(memory_bytes(config, hardware, 1, cost.saved), memory_bytes(config, hardware), cost.memory - before)
"""


def test_estimated_memory_comes_near_the_peak(tmp_path):
    """Catches an estimate that misses the activations or counts them twice, in a process that did nothing before."""
    # glibc else keeps freed tensors in its heap, of 390 to 480 MB by chance; from a fixed size on they go back at once.
    settings = {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        cwd=tmp_path, env=environment() | settings, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    informed, uninformed, peak = map(float, done.stdout.split())
    if math.isnan(peak):
        pytest.skip("this system does not tell a process's peak")
    assert peak > 2e8  # enough to stand out
    assert informed == pytest.approx(peak, rel=0.25)
    assert uninformed == pytest.approx(peak, rel=0.5)
