"""Workers that die and machines that leave: torchrun starts anew, and the run goes on as if nothing had happened."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Torchrun, free_port, on, words
from tests.test_train_core import COMPARED
from tests.tiny_train import before_step, crash, here, lines, same, trained, weights
from training.distributed import World
from training.elastic import RECORD, begun, sign, signed, torchrun_name, torchruns

RUN = Path("runs/run")
LENGTH: dict[str, Any] = {"train_steps": 120, "eval_every": 40, "train_checkpoint_every": 10, "log_every": 1}


def checkpointed() -> bool:
    return (RUN / "checkpoints" / "latest").exists()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds torchrun's workers in /proc, as Linux has it")
def test_a_killed_worker_costs_nothing(place):
    """Catches a restart that begins anew or in another folder, repeats or skips a batch, or leaves lines twice.

    The moment is random: a failure names it. Only timing can make it pass by luck, never fail by chance.
    """
    pause, victim = 0.5 * random.random(), random.randrange(2)
    options = ["--nproc_per_node=2", "--max-restarts=1", f"--master_port={free_port()}"]
    with Torchrun(options, words("run", **LENGTH)) as job:
        job.wait_until(checkpointed, "a checkpoint")
        time.sleep(pause)
        os.kill(job.workers()[victim], signal.SIGKILL)
        assert job.process.wait(120) == 0, job.said
    assert job.said.count("resuming runs/run at step") == 1, "the run was over before it was killed: make it longer"
    whole = on(2, "whole", **LENGTH)
    assert same(weights(whole, 120), weights(RUN, 120)), f"worker {victim} killed {pause} s after the first checkpoint"
    assert lines(whole) == lines(RUN)
    assert sorted(p.name for p in Path("runs").iterdir()) == ["run", "whole"]


@pytest.fixture
def under_torchrun(place: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of a lone worker of torchrun, started for the first time."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/torchelastic_x/none_y/attempt_0/0/error.json")
    return monkeypatch


def next_attempt(patch: pytest.MonkeyPatch) -> None:
    """The same torchrun started its worker again."""
    patch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/torchelastic_x/none_y/attempt_1/0/error.json")


@pytest.mark.parametrize("at", [1, 5], ids=["before its first checkpoint", "after it"])
def test_the_next_attempt_continues_the_run(under_torchrun, at):
    """Catches a run that is left behind as it was, or one from which nothing but its checkpoints is continued."""
    whole = trained("whole", train_checkpoint_every=3)
    with before_step(at, crash):
        assert here(*words("run", train_checkpoint_every=3)).code == 1
    next_attempt(under_torchrun)
    again = here(*words("run", train_checkpoint_every=3))
    assert again.code == 0 and ("resuming runs/run at step 3" in again.out) is (at == 5)
    assert same(weights(whole), weights(RUN)) and lines(whole) == lines(RUN)
    assert (whole / "samples.txt").read_text() == (RUN / "samples.txt").read_text()
    assert not Path("runs/run-2").exists()


def test_an_attempt_after_the_end_leaves_the_run_alone(under_torchrun):
    """Catches a worker that dies while it cleans up, and costs the whole run a second training."""
    run = trained("run")
    next_attempt(under_torchrun)
    before, text = weights(run), (run / "metrics.jsonl").read_text()
    assert here(*words("run")).code == 0
    assert same(before, weights(run)) and (run / "metrics.jsonl").read_text() == text


def test_another_torchrun_gets_another_folder(under_torchrun):
    """Catches a new job that continues, or writes over, an old one of the same command."""
    with before_step(5, crash):
        assert here(*words("run", train_checkpoint_every=3)).code == 1
    under_torchrun.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/torchelastic_x/none_z/attempt_0/0/error.json")
    text = (RUN / "metrics.jsonl").read_text()
    assert here(*words("run", train_checkpoint_every=3)).code == 0
    assert Path("runs/run-2/result.json").exists() and (RUN / "metrics.jsonl").read_text() == text


def test_what_was_resumed_by_hand_is_found_too(under_torchrun):
    """Catches a run whose first torchrun alone may restart it."""
    with before_step(5, crash):
        assert here(*words("run", train_checkpoint_every=3)).code == 1
    under_torchrun.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/torchelastic_x/none_z/attempt_0/0/error.json")
    assert here("--resume", "runs/run").code == 0
    assert [Path(name).name for name in signed(RUN)] == ["none_y", "none_z"]


def test_who_began_which_run(under_torchrun, tmp_path):
    """Catches runs of other names, of other torchruns or without a record, and names that merely begin alike."""
    (name,) = torchruns(World())
    assert name == torchrun_name() and name.endswith("none_y")
    for folder, by in (("run", ["other"]), ("run-2", ["other", name]), ("run-b-3", [name]), ("runner", [name])):
        (tmp_path / "runs" / folder).mkdir(parents=True)
        sign(tmp_path / "runs" / folder, by)
    (tmp_path / "runs" / "run-4").mkdir()
    (tmp_path / "runs" / "run-4" / RECORD).write_text("{")
    assert begun("runs", "run", World()) == Path("runs/run-2")
    assert begun("runs", "nothing", World()) is None and begun("elsewhere", "run", World()) is None
    under_torchrun.delenv("TORCHELASTIC_ERROR_FILE")
    assert begun("runs", "run", World()) is None and torchruns(World()) == []


def enter(pid: int) -> list[str]:
    """What a command begins with that is to run in the namespaces of a process."""
    return ["nsenter", "-t", str(pid), "-U", "-n", "--preserve-credentials"]


@pytest.fixture
def machines() -> Iterator[list[list[str]]]:
    """Two network namespaces with a cable between them, 10.77.0.1 and 10.77.0.2, as prefixes of commands."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        pytest.skip("needs unshare, nsenter (util-linux) and ip (iproute2)")
    with contextlib.ExitStack() as stack:

        def hold(*words: str) -> int:
            process = subprocess.Popen([*words, "sleep", "600"], stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
            time.sleep(0.3)
            return process.pid

        one = hold("unshare", "-r", "-n")
        two = hold(*enter(one), "unshare", "-n")
        cable = [
            (one, f"link add cable0 type veth peer name cable1 netns {two}"),
            *((pid, f"addr add 10.77.0.{i + 1}/24 dev cable{i}") for i, pid in enumerate((one, two))),
            *((pid, f"link set {name} up") for i, pid in enumerate((one, two)) for name in (f"cable{i}", "lo")),
        ]
        for pid, what in cable:
            done = subprocess.run([*enter(pid), "ip", *what.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces for this user: ip {what}: {done.stderr.strip()}")
        yield [enter(one), enter(two)]


def on_machine(number: int, through: list[str], line: list[str]) -> Torchrun:
    """One of two machines of a job that can do with one: a worker on each."""
    options = ["--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv-id=job", "--rdzv-backend=c10d"]
    options += ["--rdzv-endpoint=10.77.0.1:29400", f"--local-addr=10.77.0.{number + 1}"]
    # No name resolves to these addresses, so the host must be told; a machine is lost after three silent seconds.
    options += [f"--rdzv-conf=last_call_timeout=3,keep_alive_interval=1,is_host={number == 0}"]
    return Torchrun(options, line, through=through, GLOO_SOCKET_IFNAME=f"cable{number}")


def test_a_machine_that_is_lost_is_done_without(place, machines):
    """Catches workers that meet on one machine only, and a lost machine that ends the job or changes its batches."""
    line = words("run", **LENGTH)
    with on_machine(0, machines[0], line) as first, on_machine(1, machines[1], line) as second:
        first.wait_until(lambda: checkpointed() and len(signed(RUN)) == 2, "a checkpoint of two machines")
        second.kill()
        assert first.process.wait(150) == 0, first.said
    assert "on 2 processes" in first.said and "resuming runs/run at step" in first.said
    alone = trained("alone", **LENGTH)
    for one, other in zip(lines(alone), lines(RUN), strict=True):
        assert one["step"] == other["step"]
        for key in one.keys() & set(COMPARED):  # another batch would differ by tenths
            assert other[key] == pytest.approx(one[key], rel=0, abs=5e-3), (key, one["step"])
