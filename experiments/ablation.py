"""What every choice is worth: change one at a time, equal tokens, several seeds.

    python -m experiments.ablation                       the method, around the preset protocol-avatarl
    python -m experiments.ablation --of model            the model and its training, around the preset avatarl-char
    python -m experiments.ablation --seeds 1 --steps 400 --jobs 1

Rates stay the preset's unless --tune. Writes results/ablation-method/ or results/ablation-model/: record.json,
runs.jsonl, table.md (best first) and figure.svg.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cli import parse, run_main
from config import preset
from experiments.figures import dots
from experiments.rivals import NO_SCHEDULES, falling
from experiments.study import Entry, Row, StudySettings, conduct, publish, rate, stamp
from experiments.tables import page, values_of

Variants = Mapping[str, Mapping[str, Any]]
BASELINE = "as it stands"


def constant(critic: float) -> dict[str, Any]:
    """Weights that stay: w_c and w_r = 1 − w_c."""
    return {**NO_SCHEDULES, "method.critic-weight": critic, "method.reality-weight": round(1 - critic, 6)}


def paced(factor: float) -> dict[str, float]:
    """The default preset's rates times a factor."""
    optim = preset("avatarl-char").optim
    return {"optim.lr": factor * optim.lr, "optim.muon-lr": factor * optim.muon_lr}


EXPECTED = {"method.policy-weighting": "expected"}
KNOWN = {"method.critic-trust": "known"}
METHOD: Variants = {
    BASELINE: {},
    "cross-entropy": {"train.objective": "cross-entropy"},
    "sparse rewards (above the mean)": {"method.sparsify": "above_mean"},
    "capped rewards": {"method.normalize": "cap"},
    "sparse and capped, as published": {"method.sparsify": "above_mean", "method.normalize": "cap"},
    "w_c 0 throughout: reality alone": constant(0.0),
    "w_c 0.3 throughout": constant(0.3),
    "w_c 0.5 throughout": constant(0.5),
    "w_c 0.7 throughout": constant(0.7),
    "w_c 1 throughout: the critic alone": constant(1.0),
    "w_c 0.8 → 0.3": falling((0.8, 0.3)),
    "w_c 0.8 → 0.05": falling((0.8, 0.05)),
    "w_c 0.5 → 0.2": falling((0.5, 0.2)),
    "w_c 0.95 → 0.5": falling((0.95, 0.5)),
    "w_c 0.3 → 0.8, rising": falling((0.3, 0.8)),
    "handed over from the first step on": falling((0.93, 0.4), (0.1, 0.7)),
    "arithmetic mean of the experts": {"method.mean": "arithmetic"},
    "k 1": {"method.top-k": 1},
    "k 4": {"method.top-k": 4},
    "k 8": {"method.top-k": 8},
    "k 4, unproposed gold by consensus": {"method.top-k": 4, "method.unproposed": "consensus"},
    "k 32": {"method.top-k": 32},
    "unproposed gold by consensus": {"method.unproposed": "consensus"},
    "ε 0.01": {"method.epsilon": 0.01},
    "ε 0.03": {"method.epsilon": 0.03},
    "ε 0.3": {"method.epsilon": 0.3},
    "β 0.01": {"method.entropy-coef": 0.01},
    "β 0.05": {"method.entropy-coef": 0.05},
    "k 4 → 16": {"method.top-k-schedule": "0:4,1:16"},
    "ε 0.3 → 0.03": {"method.epsilon-schedule": "0:0.3,1:0.03"},
    "β 0.05 → 0": {"method.entropy-coef-schedule": "0:0.05,1:0"},
    "critic trusted by position": KNOWN,
    "exact policy gradient": EXPECTED,
    "group advantages": {**EXPECTED, "method.advantage": "group"},
    "group advantages, 4 inner epochs": {**EXPECTED, "method.advantage": "group", "method.inner-epochs": 4},
    "student's own context, share 0.1": {"method.context": "student", "method.student-context-share": 0.1},
    "student's own context, share 0.25": {"method.context": "student", "method.student-context-share": 0.25},
    "student proposes nothing": {"method.proposals": "critic"},
    "critic: n-grams of 2 characters": {"critic.kind": "ngram", "critic.ngram-context": 2},
    "critic: n-grams of 3 characters": {"critic.kind": "ngram", "critic.ngram-context": 3},
    "critic: n-grams of 4 characters": {"critic.kind": "ngram", "critic.ngram-context": 4},
    "critic: n-grams of 4 characters, w_c 0.72 → 0.48": {  # about the mean weight of the next one
        **falling((0.72, 0.48)),
        "critic.kind": "ngram",
        "critic.ngram-context": 4,
    },
    "critic: n-grams of 4 characters, trusted by position": {
        **KNOWN,
        "critic.kind": "ngram",
        "critic.ngram-context": 4,
    },
    "critic: n-grams of 6 characters": {"critic.kind": "ngram", "critic.ngram-context": 6},
    "critic: mixed contexts of up to 4 characters": {"critic.mixed-context": 4},
    "critic: mixed contexts of up to 8 characters": {"critic.mixed-context": 8},
    "critic: a suffix array": {"critic.kind": "suffix"},
    "critic: its own occurrence kept": {"critic.leave-one-out": False},
    "critic: mixed contexts and the student's average": {
        "critic.kind": "ensemble",
        "critic.ensemble": "mixed:0.5,self:0.5",
        "critic.past": "ema",
    },
    "critic: a model": {"critic.kind": "model", "critic.preset": "pretrain-char"},
    "critic: two models, cross-fitted": {
        "critic.kind": "model",
        "critic.preset": "pretrain-char",
        "critic.cross-fit": True,
    },
    "critic: the student's average": {"critic.kind": "self", "critic.past": "ema"},
    "critic: the student's snapshots": {"critic.kind": "self", "critic.past": "ring"},
    "critic: a twin": {"critic.kind": "self", "critic.past": "twin"},
}
MODEL: Variants = {
    BASELINE: {},
    "cross-entropy": {"train.objective": "cross-entropy"},
    "3 layers": {"model.n-layer": 3},
    "1 layer": {"model.n-layer": 1},
    "4 heads": {"model.n-head": 4},
    "learned positions": {"model.position": "learned"},
    "no QK-norm": {"model.qk-norm": False},
    "no short convolution": {"model.short-conv": 0},
    "no n-gram embeddings": {"model.ngram-embed": 0},
    "no n-gram embeddings, cross-entropy": {"model.ngram-embed": 0, "train.objective": "cross-entropy"},
    "embeddings of up to 3 tokens": {"model.ngram-embed": 3},
    "embeddings of up to 5 tokens": {"model.ngram-embed": 5},
    "squared ReLU": {"model.activation": "relu2"},
    "float32": {"run.dtype": "float32"},
    "AdamW": {"optim.name": "adamw"},
    "half the rates": paced(0.5),
    "twice the rates": paced(2),
    "context 256, 8 rows": {"model.block-size": 256, "train.batch-size": 8},
    "w_c 0.3 throughout": constant(0.3),
    "sparse and capped, as published": {"method.sparsify": "above_mean", "method.normalize": "cap"},
}
OF: dict[str, tuple[str, Variants, dict[str, Any]]] = {
    "method": ("protocol-avatarl", METHOD, {"run.dtype": "float32"}),
    "model": ("avatarl-char", MODEL, {}),
}


@dataclass(frozen=True)
class Settings(StudySettings):
    """One change at a time."""

    of: Literal["method", "model"] = "method"
    """method: around protocol-avatarl; model: around the default preset."""
    only: tuple[str, ...] = ()
    """Only variants whose label holds one of these words, and the baseline."""
    steps: int = 500
    """Optimiser steps of every run."""
    seeds: int = 2
    """Seeds of every variant, from 1 on."""
    tune: bool = False
    """Give every variant its own best learning rate, found with seed 1; else all keep the preset's."""


def entries(settings: Settings) -> list[Entry]:
    """Every variant, the baseline first."""
    around, variants, shared = OF[settings.of]
    wanted = {
        label: changes
        for label, changes in variants.items()
        if label == BASELINE or not settings.only or any(word in label for word in settings.only)
    }
    return [
        Entry(label, around, {**shared, **changes}, baseline=label == BASELINE) for label, changes in wanted.items()
    ]


def best_first(rows: Sequence[Row]) -> list[Row]:
    """Rows by their mean cross-entropy; what diverged last."""
    return sorted(rows, key=lambda row: (statistics.mean(o.loss("final") for o in row.outcomes), row.entry.label))


def main(words: Sequence[str]) -> int:
    """Run the study and write its figures; returns the exit code."""
    settings = parse(Settings, words, prog="python -m experiments.ablation", description=__doc__ or "")
    made = stamp("ablation", words) | {"study": f"ablation-{settings.of}"}
    rows = best_first(conduct(entries(settings), settings, made["study"], [rate(settings)]))
    title = f"What the choices of {OF[settings.of][0]} are worth, {settings.steps:,} steps"
    seen = [v for row in rows if row.entry.baseline for v in values_of(row, "val/ce")]
    note = f"Between seeds the baseline differs by {max(seen) - min(seen):.4f} nats." if len(seen) > 1 else ""
    publish(settings, made, rows, page(title, made, settings, rows, note=note), dots(rows))
    return 0


if __name__ == "__main__":
    run_main(main)
