"""What a run will cost, said before it starts."""

import pytest
import torch

from config import Config, RunConfig, override, preset
from model import GPT
from tests.tiny_train import files_below, here
from training import plan
from training.distributed import World
from training.hardware import choose
from training.plan import duration, forecast, human, memory_bytes


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (12345, "12.3 k"), (1.065e7, "10.7 M"), (2e9, "2 G"), (3.2e12, "3.2 T"), (5e17, "500 P")],
)
def test_numbers_a_person_reads(number, text):
    """Catches a prefix that is off by a thousand."""
    assert human(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(4, "4 s"), (95, "1 min 35 s"), (3600, "1 h 0 min"), (9000, "2 h 30 min")]
)
def test_durations_a_person_reads(seconds, text):
    """Catches minutes reported as seconds."""
    assert duration(seconds) == text


def test_the_forecast_follows_the_settings(monkeypatch):
    """Catches counts that are not the run's own: each is computed here from the settings."""
    monkeypatch.setattr(plan, "matmul_peak", lambda device, dtype: 1e12)
    hardware = choose(RunConfig(device="cpu", threads=1))
    config = preset("pretrain-char")
    text = "\n".join(forecast(config, hardware, World()))
    model = GPT(config.model, 65)
    flops = 3 * model.flops_per_token() * 2000 * 12 * 64
    assert f"parameters  {human(model.parameter_count())}" in text
    assert "1.54 M in 2,000 steps of 768" in text
    assert f"FLOPs       {human(flops)}" in text
    assert f"about {duration(flops / 0.25e12)} of training" in text
    assert "GB per process" in text


def test_memory_grows_with_what_needs_it():
    """Catches an estimate that ignores batch, context or accumulation."""
    base = override(Config(), train={"batch_size": 64})

    def memory(config: Config, world: int = 1) -> float:
        return memory_bytes(config, 10**8, 50257, torch.float32, world)

    assert memory(override(base, train={"batch_size": 128})) > 1.5 * memory(base)
    assert memory(override(base, train={"grad_accum": 4})) < memory(base)
    assert memory(base, world=4) == memory(override(base, train={"grad_accum": 4}))


@pytest.mark.parametrize("name", ["avatarl-char", "avatarl-250m", "pretrain-30m"])
def test_a_dry_run_writes_nothing(place, name):
    """Catches a forecast that downloads, trains a critic or makes a folder."""
    before = files_below(place)
    outcome = here(name, "--dry-run")
    assert outcome.code == 0 and outcome.err == ""
    for what in ("parameters", "tokens", "FLOPs", "memory", "time", "hardware"):
        assert f"\n{what} " in outcome.out
    assert files_below(place) == before
