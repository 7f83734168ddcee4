"""Optimisers and their learning-rate schedule.

adamw: AdamW for everything, with decay on matrices only. muon: Muon for the blocks' matrices,
AdamW without decay for embeddings, head, norms and biases (DESIGN section 3, "What is known").
"""

import math

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from config import OptimConfig
from training.muon import Muon
from training.parallel import whole


def lr_share(step: int, steps: int, config: OptimConfig) -> float:
    """Share of the peak rate at `step` of `steps`: linear warm-up, then a cosine down to min_lr_ratio."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    span = max(1, steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - config.warmup_steps) / span)))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine


def build_optimizers(module: nn.Module, config: OptimConfig, dtype: torch.dtype = torch.float32) -> list[Optimizer]:
    """The optimisers of every trainable parameter of `module`; each group remembers its peak rate.

    `dtype` is that of the products of Muon's orthogonalisation.
    """
    trainable = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    matrices = [p for n, p in trainable if p.ndim == 2 and ".blocks." in f".{n}"]
    in_blocks = {id(p) for p in matrices}
    embeddings = [p for _, p in trainable if p.ndim == 2 and id(p) not in in_blocks]
    vectors = [p for _, p in trainable if p.ndim != 2]
    use_muon = config.name == "muon"
    decay = 0.0 if use_muon else config.weight_decay
    groups = [{"params": embeddings, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    if not use_muon:
        groups[0]["params"] = embeddings + matrices
    groups = [g for g in groups if g["params"]]
    optimizers: list[Optimizer] = [AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)]
    if use_muon:
        optimizers.append(
            Muon(
                matrices,
                dtype=dtype,
                lr=config.muon_lr,
                momentum=config.muon_momentum,
                weight_decay=config.muon_weight_decay,
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_lr(optimizers: list[Optimizer], share: float) -> None:
    """Set every group's rate to `share` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak_lr"]


def clip_gradients(module: nn.Module, limit: float) -> Tensor:
    """Scale gradients down to a global norm of `limit` (0: leave them); returns the norm before, a 0-d tensor."""
    parameters = [p for p in module.parameters() if p.grad is not None]
    return whole(torch.nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else math.inf))
