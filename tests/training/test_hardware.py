"""What a run uses of a machine, chosen from what is there and said in words."""

import json
import os
import time

import pytest
import torch

from config import ConfigError, ModelConfig, RunConfig
from model import GPT
from training import hardware
from training.hardware import choose, choose_device, describe, matmul_peak, peak_memory_gb, prepare_model, versions


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """A machine without a GPU, whose threads are given back."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    torch.set_num_threads(threads)


def test_a_gpu_that_is_not_there(monkeypatch):
    """Catches a fall-back to the CPU that nobody asked for, and an index that fails deep inside CUDA."""
    for wanted in ("cuda", "cuda:0"):
        with pytest.raises(ConfigError, match=r"run\.device.*use --run\.device cpu"):
            choose_device(wanted)
    assert choose_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="has 2 GPUs"):
        choose_device("cuda:2")


def test_each_local_process_takes_its_own_gpu(monkeypatch):
    """Catches eight processes on GPU 0."""
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert [choose_device("auto", rank) for rank in (0, 5)] == taken == [torch.device("cuda:0"), torch.device("cuda:5")]


def test_one_gpu_is_not_named_for_several_processes(monkeypatch):
    """Catches eight processes that are sent to GPU 0 by name, which fails late and in NCCL's words."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with pytest.raises(ConfigError, match="a GPU of its own; use cuda"):
        choose(RunConfig(device="cuda:0"), local_rank=1, local_world=8)


@pytest.mark.parametrize(("said", "threads"), [("3", 3), ("2,1", 2), ("", 6), ("many", 6), ("-1", 6), ("0", 6)])
def test_what_openmp_is_told_counts_where_it_can_be_read(monkeypatch, said, threads):
    """Catches a traceback over a list for nested levels, an empty value, or what OpenMP itself would ignore."""
    monkeypatch.setattr(hardware, "usable_cores", lambda: 6)
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    choose(RunConfig(device="cpu"))
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("wanted", "processes", "expected"), [(0, 1, 6), (0, 4, 1), (0, 99, 1), (3, 2, 3)])
def test_threads_are_divided_among_processes(monkeypatch, wanted, processes, expected):
    """Catches every process of a machine taking all of its cores, or none."""
    monkeypatch.setattr(hardware, "usable_cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    chosen = choose(RunConfig(threads=wanted), local_world=processes)
    assert torch.get_num_threads() == expected
    assert chosen.notes[0].startswith(f"{expected} CPU thread")


@pytest.mark.parametrize(("local_world", "expected"), [(1, 3), (2, 3)])
def test_a_number_of_threads_in_the_environment_is_kept(monkeypatch, local_world, expected):
    """Catches a run that takes all cores although OMP_NUM_THREADS said otherwise; torchrun sets it to 1 by itself,
    so beside other processes it is no one's choice."""
    monkeypatch.setattr(hardware, "usable_cores", lambda: 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "3" if local_world == 1 else "1")
    before = torch.get_num_threads()
    try:
        choose(RunConfig(device="cpu"), 0, local_world)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_cores_are_those_this_process_may_use():
    """Catches os.cpu_count() inside a container or under taskset."""
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("no CPU affinity on this system")
    assert hardware.usable_cores() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_runs_eager_and_what_it_chose_is_said(monkeypatch, fast, dtype):
    """Catches bfloat16 where it is emulated and slow, and choices that nobody can see."""
    monkeypatch.setattr(hardware, "multiplies_bfloat16", lambda device: fast)
    chosen = choose(RunConfig(threads=1))
    assert chosen.dtype == dtype and not chosen.compile and chosen.attention == "blocked"
    said = ", ".join(chosen.notes)
    assert f"{str(dtype).removeprefix('torch.')} products" in said
    assert "attention: blocked" in said and "eager" in said
    assert choose(RunConfig(threads=1, dtype="float32")).dtype == torch.float32


def test_without_a_compiler_compile_is_given_up_with_a_word(monkeypatch):
    """Catches torch.compile's failure in the first step on a machine without g++."""
    monkeypatch.setattr(hardware, "has_compiler", lambda: False)
    chosen = choose(RunConfig(compile="on", threads=1))
    assert not chosen.compile and any("needs a C++ compiler" in note for note in chosen.notes)
    monkeypatch.setattr(hardware, "has_compiler", lambda: True)
    assert choose(RunConfig(compile="on", threads=1)).compile


def test_bfloat16_reaches_products_and_not_weights():
    """Catches a dtype setting that does nothing, or that rounds the weights."""
    a = torch.randn(4, 4)
    for dtype, expected in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        chosen = choose(RunConfig(dtype=dtype, threads=1))  # type: ignore[arg-type]
        with chosen.autocast():
            assert (a @ a).dtype == expected
        model = prepare_model(GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=4), 5), chosen)
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_peak_memory_is_in_gigabytes():
    """Catches kilobytes taken for bytes: a process with torch in it has more than 0.1 GB and less than 100."""
    assert 0.1 < peak_memory_gb(torch.device("cpu")) < 100


def test_the_measured_peak_is_a_peak():
    """Catches FLOPs that are miscounted: no product measured here may be faster than the peak by half again.

    A false alarm needs the machine to slow down to two thirds for 0.2 s and recover; the best of several is taken.
    """
    peak = matmul_peak(torch.device("cpu"), torch.float32, seconds=0.1)
    a = torch.randn(1024, 1024)
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        a @ a
        rates.append(2 * 1024**3 / (time.perf_counter() - start))
    assert 0.05 < max(rates) / peak < 3


def test_what_is_described_can_be_written():
    """Catches objects of torch in config.json, and a version that is missing."""
    described = json.loads(json.dumps(describe(choose(RunConfig(threads=1, dtype="float32")))))
    assert described["device"] == "cpu" and described["dtype"] == "float32" and described["processor"]
    assert versions()["torch"] == torch.__version__.split("+")[0] or versions()["torch"] == torch.__version__


def test_outside_a_repository_there_is_no_commit(monkeypatch):
    """Catches a run that fails where git, or the repository, is missing."""
    monkeypatch.setenv("PATH", "")
    assert hardware.git_state() == {}
