"""The model of a cluster: its limits, and what may never happen however its constants are chosen."""

import dataclasses
from itertools import pairwise
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import preset
from forecasting import cluster
from forecasting.cluster import H100, Cluster, efficiency, exchange_seconds, grown, shared, step
from forecasting.workload import Workload, count

WORK = count(preset("avatarl-250m"))
GPUS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
rates = st.floats(1e6, 1e15)
clusters = st.builds(
    Cluster, peak=rates, utilisation=st.floats(0.01, 1), node_bandwidth=rates, network_bandwidth=rates,
    node_latency=st.floats(0, 1e-3), network_latency=st.floats(0, 1e-3), memory_bandwidth=rates, least=st.floats(0, 1),
)  # fmt: skip
overlaps = st.floats(0, 1)


def test_one_gpu_talks_to_nobody():
    """Catches a ring of one, and communication that a single machine pays for."""
    assert exchange_seconds(1e9, 1) == 0
    alone = step(WORK, 1, overlap=0)
    assert alone.exchange == alone.exposed == 0
    assert efficiency(WORK, 1, WORK, overlap=0) == 1


def test_a_ring_moves_each_byte_nearly_twice():
    """Catches a ring factor that does not tend to 2, and an all-reduce of float16."""
    free = dataclasses.replace(H100, node_latency=0.0, network_latency=0.0)
    assert exchange_seconds(1e9, 2, free) == pytest.approx(4e9 / 450e9)
    node = exchange_seconds(1e9, 8, free)
    assert node == pytest.approx(2 * 7 / 8 * 4e9 / 450e9)
    # Between nodes every GPU carries an eighth.
    assert exchange_seconds(1e9, 8 * 10_000, free) - node == pytest.approx(2 * 4e9 / 8 / 50e9, rel=1e-3)


def test_latency_counts_hops():
    """Catches latencies that are charged once, or by GPU where they are by node."""
    endless = Cluster(node_bandwidth=inf, network_bandwidth=inf)
    assert exchange_seconds(1e9, 64, endless) == pytest.approx(14 * 3e-6 + 14 * 10e-6)


def test_nodes_are_full():
    """Catches a prediction for one node and a half."""
    with pytest.raises(ValueError, match="12 GPUs do not fill nodes of 8"):
        exchange_seconds(1e9, 12)


@settings(deadline=None)
@given(clusters, overlaps)
def test_weak_scaling_only_gets_worse(machine: Cluster, overlap: float) -> None:
    """Catches a model in which more GPUs each work faster."""
    alone = grown(WORK, 1)
    found = [efficiency(grown(WORK, n), n, alone, overlap=overlap, cluster=machine) for n in GPUS]
    assert found[0] == pytest.approx(1)
    assert all(0 < b <= a * (1 + 1e-9) for a, b in pairwise(found))


@settings(deadline=None)
@given(clusters, overlaps)
def test_strong_scaling_only_gets_worse(machine: Cluster, overlap: float) -> None:
    """Catches a fixed batch that is shared at a gain: by a forgotten least time, or an exchange that hides too well."""
    work = dataclasses.replace(WORK, batch_size=1024, micro_batch=32, tokens_per_step=1024 * 1024)
    found = [efficiency(work, n, work, overlap=overlap, cluster=machine) for n in GPUS]
    assert all(0 < b <= a * (1 + 1e-9) for a, b in pairwise(found))


@settings(deadline=None)
@given(clusters, overlaps, st.sampled_from(GPUS))
def test_overlap_hides_at_most_the_exchange(machine: Cluster, overlap: float, gpus: int) -> None:
    """Catches an exchange below nothing, or hidden behind more than one backward pass."""
    work = grown(WORK, gpus)
    none, some, full = (step(work, gpus, overlap=o, cluster=machine) for o in (0.0, overlap, 1.0))
    assert 0 <= full.exposed <= some.exposed <= none.exposed == none.exchange
    assert none.exchange - full.exposed <= 2 / 3 * none.compute * (1 + 1e-9)


@given(st.integers(1, 2048), st.sampled_from(GPUS))
def test_shared_batches_can_be_shared(batch: int, gpus: int) -> None:
    """Catches a prediction for a batch that launch refuses, and a budget of tokens that grows with the GPUs."""
    micro = max(m for m in range(1, 25) if batch % m == 0)
    work = dataclasses.replace(WORK, batch_size=batch, micro_batch=micro, tokens_per_step=batch * 1024)
    for changed in (shared(work, gpus), grown(work, gpus)):
        assert cluster.obstacle(changed, gpus) == ""
        assert changed.tokens == pytest.approx(work.tokens, rel=changed.tokens_per_step / work.tokens)
    assert shared(work, gpus).batch_size - batch < gpus


def test_more_parameters_take_longer_to_exchange():
    """Catches a formula without the gradients in it."""
    small: Workload = dataclasses.replace(WORK, parameters=WORK.parameters // 2)
    assert step(small, 8, overlap=0).exchange < step(WORK, 8, overlap=0).exchange
