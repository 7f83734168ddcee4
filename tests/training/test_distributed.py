"""The world as torchrun describes it; without torchrun, a world of one in which every call is a no-op.

That two processes give the curve of one is tested in test_train_core.py.
"""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from tests.tiny_train import ROOT, environment
from training.distributed import World, all_sum, any_rank, barrier, from_first, process_group, world_from_environment


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
    assert any_rank(True) is True and any_rank(False) is False
    barrier()
    assert from_first(World(), lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        from_first(World(), lambda: 1 / 0)


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
    assert any_rank(True) and not any_rank(False)


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
