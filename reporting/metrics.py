"""What every number of metrics.jsonl means: the one place that charts, tooltips and docs take it from.

Definitions are those of DESIGN section 6. A key that is not listed here is charted under its own name.
"""

from bootstrap.thresholds import SIGNS
from reporting.bootstrap_metrics import BOOTSTRAP_METRICS
from reporting.health_metrics import HEALTH_METRICS
from reporting.metric import Metric
from reporting.surgery_metrics import SURGERY_METRICS

METRICS: dict[str, Metric] = {
    "val/ce": Metric(
        "Validation cross-entropy",
        "nats",
        "Mean of -log π(gold) per token over the whole validation split.",
        "lower",
        settles=True,
    ),
    "val/accuracy": Metric(
        "Validation accuracy",
        "%",
        "Share of validation positions at which the student's most likely token is the one that came next.",
        "higher",
    ),
    "val/ece": Metric(
        "Calibration error (ECE)",
        "",
        "Expected gap between the confidence in the most likely token and how often it is right, "
        "over equal-width confidence bins.",
        "lower",
    ),
    "val/bpb": Metric(
        "Bits per byte",
        "bits",
        "Validation cross-entropy per UTF-8 byte of text: comparable between tokenizers.",
        "lower",
        settles=True,
    ),
    "val/ppl": Metric(
        "Validation perplexity",
        "",
        "exp of the validation cross-entropy: among how many equally likely tokens the student hesitates.",
        "lower",
        settles=True,
    ),
    "train/reward": Metric(
        "Expected reward",
        "",
        "Reward under the policy, Σ π(a) r(a) over the action set, averaged over positions: "
        "it rises as the student moves its mass to rewarded tokens.",
        "higher",
        noisy=True,
    ),
    "train/reward_std": Metric(
        "Reward spread",
        "",
        "Standard deviation of r over the actions of a position, averaged over positions: how sharply the rewards "
        "tell actions apart.",
        noisy=True,
    ),
    "train/p_gold": Metric(
        "P(gold)",
        "%",
        "Probability that the policy gives to the token that really came next, averaged over positions.",
        "higher",
        noisy=True,
    ),
    "train/gold_rank": Metric(
        "Gold's rank",
        "",
        "Mean rank of gold among all V tokens by the student's logits; 1 is first.",
        "lower",
        log=True,
        noisy=True,
    ),
    "train/gold_kept": Metric(
        "Gold kept",
        "%",
        "Share of positions at which gold keeps a reward; elsewhere a confident critic out-voted it.",
        noisy=True,
    ),
    "train/entropy": Metric(
        "Policy entropy",
        "nats",
        "Entropy of π over the full vocabulary; ln V is uniform, 0 is certain.",
        noisy=True,
    ),
    "train/action_mass": Metric(
        "Action mass",
        "%",
        "Σ π(a) over the action set: how much of the policy the rewards speak about.",
        noisy=True,
    ),
    "train/action_count": Metric(
        "Action count",
        "",
        "|A|, the mean number of distinct actions judged per position; at most 2k + 1.",
        noisy=True,
    ),
    "train/overlap": Metric(
        "Student-critic overlap",
        "%",
        "Share of the student's top k that the critic's top k contains too.",
        noisy=True,
    ),
    "train/critic_kl": Metric(
        "KL(critic ‖ student)",
        "nats",
        "How far the student is from the critic, both renormalised over the action set.",
        noisy=True,
    ),
    **HEALTH_METRICS,
    "train/loss": Metric(
        "Training loss",
        "",
        "What the optimiser minimises; comparable only between runs with the same objective and rewards.",
        noisy=True,
        settles=True,
    ),
    "imagination/critic_kl": Metric(
        "KL(critic ‖ student), imagined",
        "nats",
        "How far the student is from the critic where the critic wrote, both renormalised over the action set.",
        noisy=True,
    ),
    "train/grad_norm": Metric(
        "Gradient norm",
        "",
        "Global L2 norm of the gradient before clipping.",
        log=True,
        noisy=True,
    ),
    "lr": Metric(
        "Learning rate",
        "",
        "AdamW's rate at this step: linear warm-up, then cosine decay to optim.min-lr-ratio. Muon's is shaped alike.",
    ),
    "train/tokens_per_second": Metric(
        "Throughput",
        "tokens/s",
        "Tokens trained on per second of training time; evaluations are not counted.",
        "higher",
        noisy=True,
    ),
    "train/utilisation": Metric(
        "Utilisation",
        "%",
        "Achieved FLOPs as a share of the matmul peak measured on this machine for the dtype in use.",
        "higher",
        noisy=True,
    ),
    "train/peak_memory_gb": Metric(
        "Peak memory",
        "GB",
        "Largest memory use so far: the whole process's on a CPU, the allocator's on a GPU.",
        "lower",
    ),
    **BOOTSTRAP_METRICS,
    **SURGERY_METRICS,
}

SECTIONS: dict[str, tuple[str, ...]] = {
    "Validation": ("val/ce", "val/accuracy", "val/ece", "val/bpb", "val/ppl"),
    "Reward and policy": (
        "train/reward",
        "train/reward_std",
        "train/p_gold",
        "train/gold_rank",
        "train/gold_kept",
        "train/entropy",
        "train/action_mass",
        "train/action_count",
        "train/overlap",
        "train/critic_kl",
        "imagination/critic_kl",
    ),
    "Health": tuple(HEALTH_METRICS),
    "Optimiser and machine": (
        "train/loss",
        "train/grad_norm",
        "lr",
        "train/tokens_per_second",
        "train/utilisation",
        "train/peak_memory_gb",
    ),
    "Bootstrapping": tuple(BOOTSTRAP_METRICS),
    "Surgery": tuple(SURGERY_METRICS),
}
"""Order of the charts on a page; keys of other groups follow, a section each."""

AXES = ("step", "tokens", "seconds")
"""Keys that a curve can be drawn over."""


def describe(key: str) -> Metric:
    """The entry of `key`, or a plain one under its own name."""
    return METRICS.get(key) or Metric(key, "", "")


def explained(key: str) -> str:
    """What a key means, with the thresholds of its sign of health."""
    said = describe(key).explanation
    if key in SIGNS:
        sign = SIGNS[key]
        side = "or more" if sign.worse == "above" else "or less"
        said += f" Warning at {sign.warn:g} {side}, bad at {sign.bad:g} {side}."
    return said


def as_markdown() -> str:
    """The page docs/metrics.md: every key with its meaning."""
    lines = [
        "# What the numbers mean",
        "",
        "Every line of `metrics.jsonl` is one JSON object with `step` (optimiser steps done), `tokens` (trained on so",
        "far), `seconds` (training time, evaluations excluded) and some of the keys below. `train/…` is the batch of",
        "that step; `val/…` is the whole validation split. A key that does not apply is absent. A value that is not",
        "finite is written as a string.",
        "",
        "Written by `python -m reporting.metrics`.",
    ]
    for section, keys in SECTIONS.items():
        lines += [
            "",
            f"## {section}",
            "",
            "| key | name | unit | better | meaning |",
            "|---|---|---|---|---|",
        ]
        for key in keys:
            m = METRICS[key]
            unit = {"%": "share, 0 to 1"}.get(m.unit, m.unit)
            lines.append(f"| `{key}` | {m.label} | {unit} | {m.better} | {explained(key)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(as_markdown(), end="")
