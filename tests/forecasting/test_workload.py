"""What a run has to do, counted from its settings."""

import numpy as np
import pytest
import torch

from avatarl.build import build_objective
from config import Config, RunConfig, differences, override, preset
from critic_runs import pretrained
from data.prepare import prepare
from forecasting.workload import (
    cache_layout,
    count,
    critic_config,
    evaluated_rows,
    flops_per_token,
    memory_bytes,
    split_tokens,
)
from model import GPT
from tests.tiny_train import PRESET, flags, lines, trained
from train import read_command
from training.distributed import World
from training.hardware import choose

HARDWARE = choose(RunConfig(device="cpu", threads=1, dtype="float32"))
GROUP = {"advantage": "group", "policy_weighting": "expected", "inner_epochs": 3}


def tiny(**groups) -> Config:
    """TINY with changes by group."""
    return override(read_command([PRESET, *flags()])[1].config, **groups)


@pytest.mark.parametrize(
    "groups",
    [
        {"train": {"objective": "cross-entropy"}},
        {"critic": {"kind": "ngram"}},
        {"critic": {"kind": "model"}},
        {"critic": {"kind": "model", "cross_fit": True}},
        {"critic": {"kind": "model", "run": "runs/a"}},
        {"critic": {"kind": "model", "cache": True}},
        {"critic": {"kind": "self", "past": "ema"}},
        {"critic": {"kind": "self", "past": "twin"}},
        {"critic": {"kind": "self"}, "method": {"context": "student"}},
        {"critic": {"kind": "model"}, "method": GROUP},
        {"method": {"imagined_windows": 3, "imagined_windows_schedule": "0:3,1:0"}},
    ],
    ids=str,
)
def test_flops_are_those_that_the_objective_reports(groups):
    """Catches a forecast and a logged utilisation that count different work."""
    config = tiny(**groups)
    student = GPT(config.model, 65)
    frozen = [GPT(critic_config(config).model, 65) for _ in range(2 if config.critic.cross_fit else 1)]
    frozen = frozen if config.critic.kind == "model" and config.train.objective == "avatarl" else []
    cache = object() if config.critic.cache else None
    objective = build_objective(student, config, np.arange(65), frozen, HARDWARE.autocast, cache)  # type: ignore[arg-type]
    assert sum(flops_per_token(config, student.flops_per_token())) == pytest.approx(objective.flops_per_token())
    work = count(config)
    assert work.flops_per_step == pytest.approx(objective.flops_per_token() * 4 * 16)
    assert work.parameters == student.parameter_count()


@pytest.mark.parametrize(("steps", "every", "times"), [(8, 4, 3), (9, 4, 4), (8, 0, 2), (8, 100, 2)])
def test_evaluations_are_as_many_as_a_run_makes(place, steps, every, times):
    """Catches a first or last evaluation that is forgotten, or counted twice."""
    assert count(tiny(train={"steps": steps}, eval={"every": every})).evaluations == times
    run = trained("run", train_steps=steps, eval_every=every, eval_ladder=0, eval_sample_tokens=0)
    assert sum("val/ce" in line for line in lines(run)) == times


def test_the_nominal_size_of_the_default_corpus_is_its_own(shakespeare):
    """Catches a validation split that is off by a digit: its evaluations would be too."""
    train, val = split_tokens(preset("avatarl-char"))
    assert train == pytest.approx(0.9 * len(shakespeare), rel=0.001)
    assert val == pytest.approx(0.1 * len(shakespeare), rel=0.001)


def test_a_text_of_ones_own_counts_by_its_size(place):
    """Catches a corpus on disk that is forecast as Shakespeare, and one that nobody has seen as anything at all."""
    mine = tiny(data={"corpus": "corpus.txt", "train_stop": 0.5})
    dataset = prepare(mine.data)
    train, val = split_tokens(mine)
    assert train == pytest.approx(len(dataset.train), abs=2) and val == pytest.approx(len(dataset.val), abs=2)
    (place / "texts").mkdir()
    for name in ("a.txt", "b.txt", "c.pdf"):
        (place / "texts" / name).write_text("word " * 100)
    assert split_tokens(tiny(data={"corpus": "texts", "val_corpus": "corpus.txt"}))[0] == 1000
    assert split_tokens(tiny(data={"corpus": "texts", "val_corpus": "corpus.txt"}))[1] == len(dataset.train) * 2 + 324
    assert split_tokens(tiny(data={"corpus": "unheard-of"})) == (None, None)


def test_tokens_are_fewer_than_characters():
    """Catches OpenWebText measured in characters."""
    train, val = split_tokens(preset("avatarl-250m"))
    assert train and val and 9.0e9 < train < 9.05e9 and 4.5e6 < val < 4.55e6  # of 9.04 G, all but 0.05 %


def test_the_critic_is_the_one_that_gets_trained(place, monkeypatch):
    """Catches a forecast for another critic than the one that is trained when it is missing."""
    config = tiny(critic={"kind": "model"}, data={"corpus": "corpus.txt"}, model={"block_size": 96})
    seen = []

    def stop_here(settings, *rest):
        seen.append(settings)
        raise InterruptedError

    monkeypatch.setattr("critic_runs.make_objective", stop_here)
    with pytest.raises(InterruptedError):
        pretrained(config, prepare(config.data), 0.0, 1.0, World(), HARDWARE)
    mine, (trained_then,) = critic_config(config), seen
    assert mine.model.block_size == 96
    changed = differences(mine, trained_then)
    assert set(changed) <= {"run.name", "data.train_start", "data.train_stop", "log.wandb"}


def test_a_cache_is_as_large_as_its_numbers():
    """Catches a size on disk that forgets positions, log-probabilities, or the width of an id."""
    assert cache_layout(preset("avatarl-250m")) is None
    web = override(preset("avatarl-250m"), critic={"cache": True})
    windows = (int((1 - web.data.val_fraction) * 39.8e9 / 4.4) - 1024) // 1024
    layout = cache_layout(web)
    assert layout is not None and layout.windows == windows
    assert layout.total_bytes == windows * 1024 * 32 * (2 + 2)
    char = cache_layout(override(preset("avatarl-char"), critic={"cache": True, "cache_top": 20}))
    assert char is not None and char.total_bytes == char.windows * 128 * 20 * (1 + 2)
    assert cache_layout(override(web, data={"corpus": "unheard-of"})) is None


def test_memory_grows_with_what_needs_it():
    """Catches an estimate that ignores batch, accumulation, processes, critic, past or evaluation."""
    base = override(Config(), train={"batch_size": 64}, eval={"batch_size": 1}, critic={"kind": "ngram"})

    def memory(world: int = 1, **groups: dict) -> float:
        return memory_bytes(override(base, **groups), HARDWARE, world)

    assert memory(train={"batch_size": 128}) > 1.5 * memory()
    assert memory(train={"grad_accum": 4}) < memory()
    assert memory(4) == memory(train={"grad_accum": 4})
    parameters = count(base).parameters
    assert memory(critic={"kind": "self"}) == memory() + 4 * parameters
    assert memory(critic={"kind": "self", "past": "ring", "ring_size": 3}) == memory() + 12 * parameters
    assert memory(critic={"kind": "self", "past": "twin"}) == memory() + 16 * parameters
    assert memory(critic={"kind": "model"}) > memory() == memory(critic={"kind": "model", "cache": True})
    mixed = memory(critic={"kind": "mixed"}, data={"corpus": "tinyshakespeare", "tokenizer": "char"})
    plain = memory(critic={"kind": "ngram"}, data={"corpus": "tinyshakespeare", "tokenizer": "char"})
    assert 0.25e9 < mixed - plain < 0.45e9  # a whole run's resident memory differed by 0.37 GB
    suffix = memory(critic={"kind": "suffix"}, data={"corpus": "tinyshakespeare", "tokenizer": "char"})
    assert 0.02e9 < suffix - plain < 0.05e9
    assert memory(optim={"name": "muon"}) == memory() - 4 * parameters
    web = {"tokenizer": "gpt2", "corpus": "openwebtext"}
    alone, many = (memory(train={"batch_size": 1}, data=web, eval={"batch_size": rows}) for rows in (1, 64))
    assert many > 10 * alone


def test_no_evaluation_is_larger_than_its_text():
    """Catches memory for 64 windows of a text that has three."""
    config = tiny(eval={"batch_size": 64}, model={"block_size": 64})
    assert evaluated_rows(config) == 64
    assert evaluated_rows(override(config, model={"block_size": 50_000})) == 3


def test_nothing_of_the_models_is_real():
    """Catches a count that fills memory with a model of any size."""
    before = torch.get_rng_state()
    assert count(override(preset("avatarl-250m"), model={"n_layer": 96, "n_embd": 12288})).parameters > 1.7e11
    assert torch.equal(before, torch.get_rng_state())


WRITE_UP = {"top_k": 16, "epsilon": 0.1, "reality_weight": 0.7, "critic_weight": 0.3, "entropy_coef": 0.01}
SIZES = {"30m": (6, 6, 384), "70m": (8, 10, 640), "150m": (16, 12, 768), "250m": (16, 16, 1024)}


@pytest.mark.parametrize("size", SIZES)
def test_the_large_presets_are_the_write_ups(size):
    """Catches a preset that drifted from the published settings: sizes, tokens, method, critic, and its twin."""
    config, twin = preset(f"avatarl-{size}"), preset(f"pretrain-{size}")
    m, method = config.model, config.method
    assert (m.n_layer, m.n_head, m.n_embd, m.block_size) == (*SIZES[size], 1024)
    assert {name: getattr(method, name) for name in WRITE_UP} == WRITE_UP
    assert (method.sparsify, method.normalize, method.reward_scale, method.reward_cap) == (
        "above_mean",
        "cap",
        100,
        1.5,
    )
    assert (method.policy_weighting, method.advantage, method.context) == ("reinforce", "none", "gold")
    assert not any(getattr(method, f"{name}_schedule") for name in method.SCHEDULED)
    assert count(config).tokens == 480 * 1024 * 4000 == pytest.approx(2e9, rel=0.02)
    assert (config.data.corpus, config.data.tokenizer) == ("openwebtext", "gpt2")
    assert (config.eval.every, config.eval.prompt) == (500, "The true meaning of life is often")
    critic = count(critic_config(config))
    assert config.critic.kind == "model" and critic.parameters == pytest.approx(30e6, rel=0.05)
    assert {name.split(".")[0] for name in differences(config, twin)} <= {"train", "critic"}
    assert twin.train.objective == "cross-entropy" and count(twin).parameters == count(config).parameters
    assert count(config).val_tokens == pytest.approx(4.5e6, rel=0.02)


def test_a_corpus_of_tokens_is_counted_by_its_size(tmp_path):
    """Catches a tokenised corpus whose length nobody knows, or that is read to find it out."""
    (tmp_path / "tokens.bin").write_bytes(bytes(2 * 4000))
    config = override(preset("avatarl-30m"), data={"corpus": str(tmp_path), "val_fraction": 0.1})
    train, val = split_tokens(config)
    assert train == pytest.approx(3600) and val == pytest.approx(400)
