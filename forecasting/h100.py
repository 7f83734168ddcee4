"""What a run would cost on 1 to 64 H100s, from stated constants: a model, never measured by us.

A step takes its FLOPs at an assumed share of the peak, and then one all-reduce of the float32 gradients:
2 (n − 1) / n times 4 bytes per parameter through a ring, as fast as its slowest link. In truth part of it
overlaps with the backward pass; none does here. A micro-batch takes an assumed least time for launching its
kernels; the optimiser and the data are left out.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from forecasting.workload import Workload
from training.plan import duration, human

PEAK = 989e12  # FLOP/s, H100 SXM, bfloat16, dense: NVIDIA's data sheet
UTILISATION = 0.40  # assumed; well-tuned GPT-2-sized runs report 0.3 to 0.5
GPUS_PER_NODE = 8
NVLINK = 450e9  # bytes/s per GPU and direction inside a node
NETWORK = 50e9  # bytes/s per GPU between nodes: 400 Gbit/s
DOLLARS_PER_GPU_HOUR = 3.95  # assumed: Modal's list price for an H100, May 2026
COUNTS = (1, 2, 4, 8, 16, 32, 64)
LEAST = 5e-3  # seconds of a micro-batch, assumed: however small, its kernels have to be launched


class Prediction(NamedTuple):
    """Seconds of one run's parts."""

    training: float
    evaluation: float


def exchange_seconds(parameters: float, gpus: int) -> float:
    """One all-reduce of `parameters` float32 gradients over `gpus` GPUs."""
    bandwidth = NVLINK if gpus <= GPUS_PER_NODE else NETWORK
    return 2 * (gpus - 1) / gpus * 4 * parameters / bandwidth


def compute_seconds(flops: float, gpus: int) -> float:
    """`flops` shared by `gpus` GPUs."""
    return flops / (gpus * PEAK * UTILISATION)


def predict(work: Workload, gpus: int) -> Prediction:
    """Training and evaluations of `work` on `gpus` GPUs; no evaluations where the text's length is unknown."""
    least = accumulation(work, gpus) * LEAST
    step = max(least, compute_seconds(work.flops_per_step, gpus)) + exchange_seconds(work.parameters, gpus)
    return Prediction(work.steps * step, compute_seconds((work.evaluated_tokens or 0) * work.forward_flops, gpus))


def obstacle(work: Workload, gpus: int) -> str:
    """Why the global batch cannot be shared by `gpus` GPUs, and which could be; empty where it can."""
    batch = work.batch_size
    if batch < gpus:
        return f"{batch} sequences are less than one for each of {gpus} GPUs; use at least {gpus}"
    if batch % gpus:
        near = " or ".join(str(n * gpus) for n in (batch // gpus, batch // gpus + 1))
        return f"{batch} sequences do not divide among {gpus} GPUs; {near} would"
    return ""


def accumulation(work: Workload, gpus: int) -> int:
    """The least grad-accum with which no micro-batch on `gpus` GPUs is larger than the preset's own."""
    share = work.batch_size // gpus
    return next(a for a in range(1, share + 1) if share % a == 0 and share // a <= work.micro_batch)


def table(work: Workload, critics: Iterable[Workload] = (), extra_flops: float = 0.0) -> list[str]:
    """Lines for --dry-run. `critics` are trained first; `extra_flops` are spent once, before the first step."""
    critics = list(critics)
    lines = [
        f"H100 SXM    predicted from stated constants, never measured: {human(PEAK, 'FLOP/s')} in bfloat16 at an "
        f"assumed {UTILISATION:.0%};",
        f"            float32 gradients through one ring after the backward pass, {NVLINK / 1e9:.0f} GB/s within "
        f"{GPUS_PER_NODE} GPUs, {NETWORK / 1e9:.0f} GB/s per GPU beyond;",
        f"            at least {LEAST * 1e3:.0f} ms for a micro-batch and ${DOLLARS_PER_GPU_HOUR:.2f} per GPU-hour "
        "(a list price of May 2026), both assumed",
        f"{'GPUs':>6} {'sequences':>10} {'grad-accum':>11} {'training':>9} {'evaluation':>11} "
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
            f"{gpus:>6} {work.batch_size // gpus:>10} {accumulation(work, gpus):>11} {duration(run.training):>9} "
            f"{evaluated:>11} {duration(first) if first else '-':>13} {duration(total):>9} {dollars(total, gpus):>9}"
        )
    return lines


def dollars(seconds: float, gpus: int) -> str:
    """What `gpus` GPUs cost for that long, in whole dollars of two digits."""
    cost = seconds / 3600 * gpus * DOLLARS_PER_GPU_HOUR
    if cost < 1:
        return "< $1"
    return f"${round(cost, 1 - math.floor(math.log10(cost))):,.0f}"
