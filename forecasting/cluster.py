"""What a training step takes on 1 to 1,024 GPUs: a model from stated constants, in which nothing is measured.

A step is its FLOPs at an assumed share of the peak, then the optimiser, which passes over the memory once, and one
all-reduce of the float32 gradients. That goes in a ring inside a node, then every GPU exchanges its share with its
counterparts in the other nodes, in rings of their own, and back:

    2 (g − 1)/g · S / B_node  +  2 (m − 1)/m · (S/g) / B_network  +  2 (g − 1) · l_node  +  2 (m − 1) · l_network

for S bytes on m nodes of g GPUs. As far as `overlap` says, it hides behind the backward pass of the last
micro-batch. Left out: loading data, stragglers, failures, checkpoints, evaluations, and FSDP's gathering of weights.
Source: docs/scaling.md.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from forecasting.workload import Workload
from training.micro_batches import fewest_parts

GRADIENT_BYTES = 4.0  # of each parameter
OPTIMIZER_BYTES = 28.0  # of each parameter: AdamW reads weight, gradient and two moments, and writes three of them
BACKWARD = 2 / 3  # of the student's FLOPs


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs and what is assumed of them. The defaults: H100 SXM, by data sheet where there is one."""

    peak: float = 989e12
    """FLOP/s of a GPU in bfloat16, dense: NVIDIA's data sheet."""
    utilisation: float = 0.40
    """Share of the peak that a step reaches, assumed; well-tuned GPT-2-sized runs report 0.3 to 0.5."""
    gpus_per_node: int = 8
    node_bandwidth: float = 450e9
    """Bytes/s per GPU and direction inside a node: NVLink 4, data sheet."""
    network_bandwidth: float = 50e9
    """Bytes/s per GPU and direction between nodes: one 400 Gbit/s port each, as in NVIDIA's DGX H100."""
    node_latency: float = 3e-6
    """Seconds of a hop inside a node, assumed."""
    network_latency: float = 10e-6
    """Seconds of a hop between nodes, assumed."""
    memory_bandwidth: float = 3.35e12
    """Bytes/s of a GPU's memory: data sheet."""
    least: float = 5e-3
    """Seconds of a micro-batch, assumed: however small, its kernels have to be launched."""


H100 = Cluster()


class Step(NamedTuple):
    """Seconds of one optimiser step's parts."""

    compute: float
    optimizer: float
    exchange: float
    """Of the gradients, all of it."""
    exposed: float
    """What of the exchange is not hidden behind the backward pass."""

    @property
    def seconds(self) -> float:
        return self.compute + self.optimizer + self.exposed


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
    """How many micro-batches each of `gpus` GPUs makes of its share: the fewest of which none is larger than on one."""
    return fewest_parts(work.batch_size // gpus, work.micro_batch)


def exchange_seconds(parameters: float, gpus: int, cluster: Cluster = H100) -> float:
    """One all-reduce of `parameters` float32 gradients. Raises ValueError for nodes that are not full."""
    inside = min(gpus, cluster.gpus_per_node)
    nodes, rest = divmod(gpus, inside)
    if rest:
        raise ValueError(f"{gpus} GPUs do not fill nodes of {cluster.gpus_per_node}")
    size = GRADIENT_BYTES * parameters
    node = 2 * (inside - 1) * (size / inside / cluster.node_bandwidth + cluster.node_latency)
    share = size / inside
    return node + 2 * (nodes - 1) * (share / nodes / cluster.network_bandwidth + cluster.network_latency)


def compute_seconds(flops: float, gpus: int, cluster: Cluster = H100) -> float:
    """`flops` shared by `gpus` GPUs."""
    return flops / (gpus * cluster.peak * cluster.utilisation)


def step(work: Workload, gpus: int, *, overlap: float, cluster: Cluster = H100) -> Step:
    """One optimiser step of `work`, whose batch the GPUs share; overlap: in [0, 1], of what could be hidden."""
    micros = accumulation(work, gpus)
    compute = max(micros * cluster.least, compute_seconds(work.flops_per_step, gpus, cluster))
    exchange = exchange_seconds(work.parameters, gpus, cluster)
    students = work.student_flops / (work.student_flops + work.critic_flops)
    hidden = overlap * min(exchange, BACKWARD * students * compute / micros)
    optimizer = OPTIMIZER_BYTES * work.parameters / cluster.memory_bandwidth
    return Step(compute, optimizer, exchange, exchange - hidden)


def shared(work: Workload, gpus: int) -> Workload:
    """`work` for that many GPUs: its batch rounded up to a multiple of them, and as many tokens in fewer steps."""
    batch = -(-work.batch_size // gpus) * gpus
    length = work.tokens_per_step // work.batch_size
    return replace(
        work,
        batch_size=batch,
        micro_batch=min(work.micro_batch, batch),
        tokens_per_step=batch * length,
        steps=max(1, round(work.tokens / (batch * length))),
    )


def grown(work: Workload, gpus: int) -> Workload:
    """`work` with one micro-batch of its own size for each GPU, and as many tokens in fewer steps."""
    batch, length = work.micro_batch * gpus, work.tokens_per_step // work.batch_size
    steps = max(1, round(work.tokens / (batch * length)))
    return replace(work, batch_size=batch, tokens_per_step=batch * length, steps=steps)


def tokens_per_second(work: Workload, gpus: int, *, overlap: float, cluster: Cluster = H100) -> float:
    """What all GPUs together train on."""
    return work.tokens_per_step / step(work, gpus, overlap=overlap, cluster=cluster).seconds


def efficiency(work: Workload, gpus: int, alone: Workload, *, overlap: float, cluster: Cluster = H100) -> float:
    """Tokens per second of `work` on `gpus` GPUs over `gpus` times those of `alone` on one."""
    reached = tokens_per_second(work, gpus, overlap=overlap, cluster=cluster)
    return reached / (gpus * tokens_per_second(alone, 1, overlap=overlap, cluster=cluster))
