"""What the keys health/… of metrics.jsonl mean; the thresholds stand in bootstrap/thresholds.py."""

from reporting.metric import Metric

HEALTH_METRICS: dict[str, Metric] = {
    "health/status": Metric(
        "Health",
        "",
        "The worst state of the signs below that a run has: 0 ok, 1 warn, 2 bad.",
        "lower",
    ),
    "health/ece": Metric(
        "Calibration error on the batch",
        "",
        "As val/ece, on the training batch before its step, with fewer bins for few decisions.",
        "lower",
        noisy=True,
    ),
    "health/confidence_gap": Metric(
        "Confidence over accuracy",
        "",
        "Mean probability of the likeliest token minus how often it is right, on the training batch: above 0 the "
        "policy is surer than it should be.",
        noisy=True,
    ),
    "health/entropy": Metric(
        "Entropy on the batch",
        "nats",
        "Entropy of π over the full vocabulary, averaged over the training batch: near 0 nothing else is considered "
        "any more.",
        noisy=True,
    ),
    "health/grad_spike": Metric(
        "Gradient norm over its median",
        "",
        "Norm before clipping over the median of those logged before it.",
        log=True,
        noisy=True,
    ),
}
