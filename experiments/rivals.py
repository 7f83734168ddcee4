"""The rivals on DESIGN's protocol, as entries of studies: the same model, tokens and batches for all of them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from config import ConfigError, CriticConfig, MethodConfig, require
from experiments.study import Entry, Knob, StudySettings, rate
from presets import hand_over

METHODS = {"cross-entropy": "protocol-pretrain", "AvataRL": "protocol-avatarl"}
OPTIMIZERS = ("muon", "adamw")
HALF = {"optim.lr": 1.5e-3, "optim.muon-lr": 0.01}
"""Of protocol-pretrain's rates, which cross-entropy chooses when it is tuned (`python -m experiments.protocol`)."""
NO_SCHEDULES = {f"method.{name.replace('_', '-')}-schedule": "" for name in MethodConfig.SCHEDULED}
PUBLISHED = {
    f"method.{f.name.replace('_', '-')}": getattr(MethodConfig(), f.name) for f in dataclasses.fields(MethodConfig)
}
"""Every setting of the method as published, whatever a preset changes."""
NGRAM = {
    "critic.kind": "ngram",
    "critic.ngram-context": 4,
    "critic.ngram-discount": CriticConfig().ngram_discount,
    "critic.leave-one-out": True,
}
DISTILLATION = {
    **NO_SCHEDULES,
    "method.reality-weight": 0.0,
    "method.critic-weight": 1.0,
    "method.sparsify": "none",
    "method.normalize": "sum",
    "method.entropy-coef": 0.0,
}
"""The critic alone, over the whole action set: soft targets without reality's vote.

What gold earns that nobody proposed is the preset's `method.unproposed`."""


def rival(method: str, settings: Mapping[str, Any] | None = None, label: str = "", **entry: Any) -> Entry:
    """An entry on the protocol in float32; cross-entropy as it stands is its group's baseline.

    entry: further fields of it, such as another preset than the method's.
    """
    chosen = {"preset": METHODS[method], "baseline": method == "cross-entropy" and not label, **entry}
    return Entry(label or method, settings={"run.dtype": "float32", **(settings or {})}, **chosen)


def falling(critic: tuple[float, float], reality: tuple[float, float] | None = None) -> dict[str, Any]:
    """w_c on a straight line from the first step to the last, and w_r on one of its own, or as 1 − w_c."""
    made = hand_over(critic, reality)["method"]
    return {f"method.{name.replace('_', '-')}": knots for name, knots in made.items()}


def ends(fall: str, name: str = "falls") -> list[tuple[float, float]]:
    """What `falling` wants, of "0.9:0.6" or "0.93:0.7/0.1:0.4": the critic's weights, and reality's where told.

    name: the option that was given, for the ConfigError that others raise.
    """
    try:
        pairs = [(float(first), float(last)) for first, last in (pair.split(":") for pair in fall.split("/"))]
    except ValueError:
        pairs = []
    if not 1 <= len(pairs) <= 2:
        raise ConfigError(f"{name} = {fall!r}: write first:last, such as 0.9:0.6, or the critic's/reality's")
    require(all(0 <= w <= 1 for pair in pairs for w in pair), name, fall, "use weights from 0 to 1")
    return pairs


def regularizers(dropouts: Sequence[float], decays: Sequence[float]) -> None:
    """Raises ConfigError for what `tuning` can't try."""
    require(all(0 <= p < 1 for p in dropouts), "dropouts", dropouts, "use probabilities below 1, such as 0 0.2 0.4")
    require(all(0 < d < math.inf for d in decays), "decays", decays, "use factors above 0, such as 1 10")


def tuning(how: StudySettings, dropouts: Sequence[float], decays: Sequence[float]) -> list[Knob]:
    """What is tuned where a text is read again and again, in this order: rate, dropout, weight decay.

    decays: multiples of the presets', of both optimisers; of what has no values, nothing is tried.
    """
    decay = ("optim.weight-decay", "optim.muon-weight-decay")
    knobs = [
        rate(how),
        Knob("dropout", ("model.dropout",), tuple(dropouts), relative=False, stride=0.2, low=0.0, high=0.8),
        Knob("decay", decay, tuple(decays), stride=10.0, low=0.1, high=100.0),
    ]
    return [knob for knob in knobs if knob.values]


def optimizer(name: str) -> dict[str, Any]:
    """The settings that choose an optimiser."""
    return {"optim.name": name}
