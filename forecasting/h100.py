"""What a run would cost on 1 to 64 H100s, from stated constants: a model, never measured by us.

The steps are those of forecasting/cluster.py, with no overlap of the gradients' exchange and the backward pass; the
price of an hour is an assumption that `--price` replaces. Loading data is left out.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from forecasting import cluster
from forecasting.cluster import H100, accumulation, compute_seconds, obstacle
from forecasting.workload import Workload
from training.plan import duration, human

DOLLARS_PER_GPU_HOUR = 3.95  # assumed: Modal's list price for an H100, May 2026
COUNTS = (1, 2, 4, 8, 16, 32, 64)


class Prediction(NamedTuple):
    """Seconds of one run's parts."""

    training: float
    evaluation: float


def predict(work: Workload, gpus: int) -> Prediction:
    """Training and evaluations of `work` on `gpus` GPUs; no evaluations where the text's length is unknown."""
    step = cluster.step(work, gpus, overlap=0.0).seconds
    return Prediction(work.steps * step, compute_seconds((work.evaluated_tokens or 0) * work.forward_flops, gpus))


def assumptions(price: float | None) -> list[str]:
    """What the table rests on, in lines."""
    dollars = f"${DOLLARS_PER_GPU_HOUR:.2f} per GPU-hour (a list price of May 2026; --price sets another), both assumed"
    if price is not None:
        dollars = f"${price:.2f} per GPU-hour as given with --price"
    return [
        f"H100 SXM    predicted from stated constants, never measured: {human(H100.peak, 'FLOP/s')} in bfloat16 at an "
        f"assumed {H100.utilisation:.0%};",
        f"            float32 gradients exchanged after the backward pass, {H100.node_bandwidth / 1e9:.0f} GB/s within "
        f"{H100.gpus_per_node} GPUs, {H100.network_bandwidth / 1e9:.0f} GB/s per GPU beyond;",
        f"            at least {H100.least * 1e3:.0f} ms for a micro-batch and {dollars}",
    ]


def table(
    work: Workload, critics: Iterable[Workload] = (), extra_flops: float = 0.0, price: float | None = None
) -> list[str]:
    """Lines for --dry-run. `critics` are trained first; `extra_flops` are spent once, before the first step.

    price: dollars of a GPU-hour; None: the assumed one.
    """
    critics = list(critics)
    lines = [
        *assumptions(price),
        f"{'GPUs':>6} {'sequences':>10} {'micro-batches':>13} {'training':>9} {'evaluation':>11} "
        f"{'critic first':>13} {'total':>9} {'dollars':>9}",
    ]
    for gpus in COUNTS:
        problem = obstacle(work, gpus) or next((f"the critic's {o}" for c in critics if (o := obstacle(c, gpus))), "")
        if problem:
            lines.append(f"{gpus:>6} {problem}")
            continue
        run = predict(work, gpus)
        first = sum(sum(predict(c, gpus)) for c in critics) + compute_seconds(extra_flops, gpus)
        total = sum(run) + first
        evaluated = "unknown" if work.val_tokens is None else duration(run.evaluation)
        lines.append(
            f"{gpus:>6} {work.batch_size // gpus:>10} {accumulation(work, gpus):>13} {duration(run.training):>9} "
            f"{evaluated:>11} {duration(first) if first else '-':>13} {duration(total):>9} "
            f"{dollars(total, gpus, price):>9}"
        )
    return lines


def dollars(seconds: float, gpus: int, price: float | None = None) -> str:
    """What `gpus` GPUs cost for that long, in whole dollars of two digits."""
    cost = seconds / 3600 * gpus * (DOLLARS_PER_GPU_HOUR if price is None else price)
    if cost < 1:
        return "< $1"
    return f"${round(cost, 1 - math.floor(math.log10(cost))):,.0f}"
