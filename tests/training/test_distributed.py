"""The world as torchrun describes it; without torchrun, a world of one in which every call is a no-op.

That two processes give the curve of one is tested in test_parallel.py.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from config import ConfigError
from tests.tiny_train import ROOT, environment
from training.distributed import (
    World,
    all_sum,
    ask_all,
    barrier,
    divided,
    from_first,
    own_cores,
    process_group,
    world_from_environment,
)


def test_half_of_what_torchrun_says_is_refused(monkeypatch):
    """Catches ranks that a batch system left in the environment, and a traceback about MASTER_ADDR."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    told = pytest.raises(ConfigError, match="start with torchrun, or unset them")
    with told, process_group(world_from_environment(), torch.device("cpu")):
        pass


def test_without_torchrun_there_is_one_process(monkeypatch):
    """Catches a plain run that waits for others."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert world_from_environment() == World(0, 1, 0, 1)
    with process_group(World(), torch.device("cpu")):
        assert not dist.is_initialized()


def test_the_second_machine_of_two(monkeypatch):
    """Catches global ranks used as local ones: rank 9 of 16 has GPU 1 of its machine, and writes nothing."""
    values = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    world = world_from_environment()
    assert world == World(rank=9, size=16, local_rank=1, local_size=8) and not world.first


def test_a_world_of_one_agrees_with_itself():
    """Catches collective calls that need a process group where there is none."""
    tensor = torch.tensor([1.0, 2.0])
    assert all_sum(tensor).tolist() == [1.0, 2.0]
    assert ask_all(lambda: True)() is True and ask_all(lambda: False)() is False
    barrier()
    assert from_first(World(), lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        from_first(World(), lambda: 1 / 0)


def test_alone_the_answer_is_the_latest():
    """Catches a Ctrl-C during a step that costs a process without partners another one."""
    heard: list[int] = []
    answer = ask_all(lambda: bool(heard))
    heard.append(1)
    assert answer()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not let a process choose its cores")
@pytest.mark.parametrize(("cores", "size"), [({0, 1}, 2), ({2, 3, 5, 7, 8}, 2), ({0, 1, 2, 3}, 3), ({4}, 1)])
def test_processes_of_a_machine_have_cores_of_their_own(monkeypatch, cores, size):
    """Catches two processes on one core beside an idle one, a core that nobody gets, and cores that stay taken."""
    now: dict[str, set[int]] = {}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: now["own"])
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, wanted: now.update(own=set(wanted)))
    taken = []
    for rank in range(size):
        now["own"] = cores
        with own_cores(World(rank, size, rank, size)):
            taken += sorted(now["own"])
            assert now["own"]
        assert now["own"] == cores
    assert taken == sorted(cores)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not let a process choose its cores")
def test_more_processes_than_cores_share_them_all(monkeypatch):
    """Catches processes without any core, and a system that forbids the choice and so ends the run."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})

    def forbidden(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", forbidden)
    for size in (2, 4):
        with own_cores(World(1, size, 1, size)):
            assert os.sched_getaffinity(0) == {0, 1}


def test_work_is_divided_by_its_size():
    """Catches a process that has all the large matrices, or waits for one that has more."""
    shapes = [(3, 384, 128), (3, 128, 128), (3, 512, 128), (3, 128, 512)]
    for size in (1, 2, 3, 4):
        owners = divided(shapes, size)
        assert [len(whose) for whose in owners] == [3, 3, 3, 3]
        load = [0.0] * size
        for (_, rows, columns), whose in zip(shapes, owners, strict=True):
            for owner in whose:
                load[owner] += max(rows, columns) * min(rows, columns) ** 2
        assert max(load) - min(load) <= 512 * 128**2
    assert divided([(1, 2, 2)], 3) == [[0]]


@pytest.fixture
def group(tmp_path):
    """A real process group, of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_the_first_makes_or_raises_reaches_all(group):
    """Catches an error on rank 0 that leaves the others waiting for ever: it must travel, not be thrown before."""
    two = World(rank=0, size=2)
    assert from_first(two, lambda: {"a": 1}) == {"a": 1}
    with pytest.raises(ValueError, match="no corpus"):
        from_first(two, lambda: (_ for _ in ()).throw(ValueError("no corpus")))
    assert from_first(World(rank=1, size=2), lambda: 1 / 0) is None  # only the first makes anything
    assert ask_all(lambda: True)() and not ask_all(lambda: False)()


STUCK = """
import time
from cli import run_main
from training.distributed import World, process_group

class Waits:
    def __del__(self):
        print("freed", flush=True)
        time.sleep(60)

def main(words):
    with process_group(World(size=2), torch.device("cpu")):
        held = Waits()
        print("begun")
        raise RuntimeError("connection reset by peer")

import torch, torch.distributed as dist
dist.init_process_group = lambda backend: None
run_main(main)
"""


def test_a_process_that_lost_its_partner_leaves_at_once():
    """Catches a worker that reports its error and then waits for ever to free what waits for the dead one."""
    done = subprocess.run(
        [sys.executable, "-c", STUCK], cwd=ROOT, env=environment(), capture_output=True, text=True,
        timeout=50,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "begun\n")
    assert done.stderr == "error: connection reset by peer\n"
