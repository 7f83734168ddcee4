"""When an edit is kept, and how it is taken back: held-out windows decide, its weights are written down.

    held_out = HeldOut(tokens, block_size, windows=128, seed=1)
    trial = held_out.trial(student, operator, action, key, hardware)     # nothing has changed yet
    if trial.accepted(z=2):
        commit(student, operator, action, path)
    undo(student, path)                                                  # True where it is exact

The windows are text that neither student nor critic nor judge sees, and no reported number is measured on. Before and
after are compared on the same windows, so that their noise is that of the paired differences. Source: DESIGN
section 9.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from checks import ConfigError, require
from files import write_atomic
from model import GPT
from surgery.corrections import evaluating
from surgery.operation import Operator
from surgery.theater import SurgicalTheater, projection
from training.hardware import Hardware

ROWS = 64  # windows per forward pass


class Trial(NamedTuple):
    """What an edit does to the held-out cross-entropy, in nats: mean gain (before − after), its standard error."""

    gain: float
    noise: float

    def accepted(self, z: float) -> bool:
        """Whether the gain exceeds `z` standard errors; with noise alone, at z = 2 in one trial of 44."""
        return self.gain > z * self.noise


def compare(before: Tensor, after: Tensor) -> Trial:
    """Paired losses of the same W >= 2 windows, (W,) each, as a trial."""
    differences = before.double() - after.double()
    return Trial(float(differences.mean()), float(differences.std()) / math.sqrt(len(differences)))


@torch.no_grad()
def window_losses(model: GPT, tokens: Tensor, targets: Tensor, hardware: Hardware) -> Tensor:
    """Mean cross-entropy of each window in evaluation mode: tokens and targets (W, T), −1 being padding → (W,)."""
    found = []
    with evaluating(model):
        for some, golds in zip(tokens.split(ROWS), targets.split(ROWS), strict=True):
            with hardware.autocast():
                logits = GPT.hidden(model, some.to(hardware.device)) @ model.unembedding.T  # (w, T, V)
            golds = golds.to(hardware.device)
            nll = F.cross_entropy(logits.float().mT, golds, reduction="none", ignore_index=-1)  # (w, T)
            found.append(nll.double().sum(1) / (golds >= 0).sum(1))
    return torch.cat(found).cpu()


class HeldOut:
    """Windows of a text that nothing else reads, `windows` of them drawn for each decision.

    Raises ConfigError where the text holds fewer.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, *, windows: int, seed: int) -> None:
        count = (len(tokens) - 1) // block_size
        fix = f"the held-out text of {len(tokens):,} tokens has {count}; use fewer, or a larger --accept.held-out"
        require(windows <= count, "accept.windows", windows, fix)
        used = torch.from_numpy(np.asarray(tokens[: count * block_size + 1], dtype=np.int64))
        self.tokens, self.targets = used[:-1].view(count, -1), used[1:].view(count, -1)  # (windows there are, T)
        self.windows, self.seed = windows, seed

    def draw(self, key: int) -> tuple[Tensor, Tensor]:
        """The windows of a decision: tokens and targets (W, T), without repetition."""
        random = np.random.default_rng([self.seed, key])
        chosen = torch.from_numpy(random.permutation(len(self.tokens))[: self.windows])
        return self.tokens[chosen], self.targets[chosen]

    def trial(self, model: GPT, operator: Operator, action: Tensor, key: int, hardware: Hardware) -> Trial:
        """What action (L, r) would do to `model`, which it leaves as it was."""
        tokens, targets = self.draw(key)
        before = window_losses(model, tokens, targets, hardware)
        with SurgicalTheater(model, operator.layers):
            operator.apply(action)
            after = window_losses(model, tokens, targets, hardware)
        return compare(before, after)


@torch.no_grad()
def commit(model: GPT, operator: Operator, action: Tensor, path: Path) -> None:
    """Operate for good, after writing what the weights were and became to `path`, for `undo`."""
    kept = {}
    weights = {str(layer): p.weight for layer, p in zip(operator.layers, operator.projections, strict=True)}
    with SurgicalTheater(model, operator.layers):
        for name, weight in weights.items():
            kept[f"before.{name}"] = weight.detach().cpu().clone()
        operator.apply(action)
        for name, weight in weights.items():
            kept[f"after.{name}"] = weight.detach().cpu().clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save(kept))
    for name, weight in weights.items():
        weight.copy_(kept[f"after.{name}"])


@torch.no_grad()
def undo(model: GPT, path: Path) -> bool:
    """Take the edit written at `path` back out of `model`; whether its weights are bit for bit what they were.

    They are where nothing has changed them since. Where the student has learned on, the edit's difference is
    subtracted, up to rounding. Raises ConfigError for a file that is no edit of this model.
    """
    try:
        kept = load_file(path)
    except Exception as error:  # safetensors raises its own kinds
        raise ConfigError(f"{path}: no edit can be read there ({error})") from None
    names = [name.removeprefix("before.") for name in kept if name.startswith("before.")]
    require(len(names) > 0, "edit", str(path), "it holds no weights")
    exact, new = True, {}
    for name in names:
        layer = int(name)
        weight = projection(model, layer).weight
        before, after = (kept[f"{when}.{name}"].to(weight) for when in ("before", "after"))
        require(before.shape == weight.shape, "edit", str(path), f"block {layer} has weights {tuple(weight.shape)}")
        untouched = torch.equal(weight, after)
        exact &= untouched
        new[weight] = before if untouched else weight - (after - before)
    for weight, value in new.items():
        weight.copy_(value)
    return exact
