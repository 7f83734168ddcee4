"""Which parameter learns by which rule, at which rate, and how far gradients are cut."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon

from avatarl.objective import CrossEntropy
from config import ModelConfig, OptimConfig
from model import GPT
from training.optim import build_optimizers, clip_gradients, lr_share, set_lr

CONFIG = OptimConfig(warmup_steps=10, min_lr_ratio=0.1)


def objective(**options: object) -> CrossEntropy:
    settings = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 4} | options
    return CrossEntropy(GPT(ModelConfig(**settings), 5))  # type: ignore[arg-type]


def named(module: nn.Module, parameters: list) -> set[str]:
    ids = {id(p) for p in parameters}
    return {name for name, p in module.named_parameters() if id(p) in ids}


def test_warm_up_then_cosine():
    """Catches a first step at rate 0, a peak that is missed, an end at the wrong floor, a cosine that is a line."""
    shares = [lr_share(step, 110, CONFIG) for step in range(111)]
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(shares) == shares[10] == 1.0
    assert shares[35] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert shares[60] == pytest.approx(0.55)
    assert shares[110] == pytest.approx(0.1) and min(shares[10:]) == shares[110]
    assert all(a > b for a, b in itertools.pairwise(shares[10:]))


@pytest.mark.parametrize(("warmup", "steps"), [(0, 5), (5, 5), (1, 1), (0, 1)])
def test_schedules_of_extreme_length_stay_within_0_and_1(warmup, steps):
    """Catches division by zero where the warm-up is none, or all of the run."""
    config = OptimConfig(warmup_steps=warmup)
    assert all(0 < lr_share(step, steps, config) <= 1 for step in range(steps + 3))


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False, "position": "rope", "norm": "rmsnorm", "qk_norm": True}, {"short_conv": 2, "ngram_embed": 2}],
)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_learns_once(name, options):
    """Catches a parameter that no optimiser has, or two have (the tied embedding is one)."""
    module = objective(**options)
    held = [p for o in build_optimizers(module, OptimConfig(name=name)) for g in o.param_groups for p in g["params"]]
    assert len(held) == len({id(p) for p in held})
    assert {id(p) for p in held} == {id(p) for p in module.parameters()}


def test_muon_has_the_matrices_of_the_blocks():
    """Catches embeddings, the tied head or position tables under Muon, and block matrices left to AdamW."""
    module = objective()
    adamw, muon = build_optimizers(module, OptimConfig(name="muon", lr=3e-3, muon_lr=0.02))
    assert isinstance(adamw, AdamW) and isinstance(muon, Muon)
    matrices = {
        f"student.blocks.{i}.{part}.weight" for i in (0, 1) for part in ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
    }
    assert named(module, muon.param_groups[0]["params"]) == matrices
    assert all(group["weight_decay"] == 0 for group in adamw.param_groups)
    group = muon.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.02, 0.95, 0.01)


def test_adamw_decays_matrices_only():
    """Catches decay of norms, biases and short convolutions, or of nothing."""
    module = objective(short_conv=2)
    (adamw,) = build_optimizers(module, OptimConfig(weight_decay=0.1, beta1=0.8, beta2=0.99))
    decayed = [p for g in adamw.param_groups if g["weight_decay"] == 0.1 for p in g["params"]]
    spared = [p for g in adamw.param_groups if g["weight_decay"] == 0.0 for p in g["params"]]
    assert decayed and spared and len(decayed) + len(spared) == len(list(module.parameters()))
    assert all(p.ndim == 2 for p in decayed) and all(p.ndim != 2 for p in spared)
    assert all(g["betas"] == (0.8, 0.99) for g in adamw.param_groups)


def test_what_is_frozen_stays_out():
    """Catches a critic or a moving average that is trained along with the student."""
    module = objective()
    module.student.wte.requires_grad_(False)
    held = [p for o in build_optimizers(module, CONFIG) for g in o.param_groups for p in g["params"]]
    assert "student.wte.weight" not in named(module, held)


def test_set_lr_scales_every_group_from_its_own_peak():
    """Catches rates that compound from step to step, and one rate for two optimisers."""
    optimizers = build_optimizers(objective(), OptimConfig(name="muon", lr=1e-3, muon_lr=0.02))
    for share in (0.5, 0.25):
        set_lr(optimizers, share)
        rates = [group["lr"] for o in optimizers for group in o.param_groups]
        assert rates == pytest.approx([1e-3 * share, 1e-3 * share, 0.02 * share])


@pytest.mark.parametrize(("limit", "after"), [(1.0, 1.0), (0.0, 5.0), (9.0, 5.0)])
def test_clipping_returns_the_norm_before_it(limit, after):
    """Catches a logged norm that is always the limit, a limit per tensor, and 0 that clips everything away."""
    module = nn.ParameterList([torch.zeros(2), torch.zeros(2)])
    module[0].grad, module[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    norm = clip_gradients(module, limit)
    assert float(norm) == pytest.approx(5.0)
    left = torch.cat([p.grad for p in module])
    assert float(left.norm()) == pytest.approx(after, rel=1e-4)


def test_a_gradient_that_is_not_finite_shows_in_the_norm():
    """Catches a norm that hides a NaN, which the loop would then step on."""
    module = nn.ParameterList([torch.zeros(2), torch.zeros(2)])
    module[0].grad, module[1].grad = torch.tensor([3.0, math.nan]), torch.tensor([0.0, 4.0])
    assert not torch.isfinite(clip_gradients(module, 1.0))
