"""What runs in Modal's containers: one attempt at a job, as `torchrun … train.py`. Started by train_modal.py.

An attempt finds what earlier ones left of its run on the Volume and resumes it. It ends by returning 0 for a complete
run, by raising Incomplete for Modal to make another attempt, or by returning 1 where that is hopeless.
All of it works on an ordinary machine too, where there is no Volume to commit: that is how it is tested.
"""

import contextlib
import ipaddress
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from files import write_json

CHECKOUT = "/root"  # where containers see the project; Modal's Python starts there
STORE = "/store"
PLACES = {"data": f"{STORE}/data", "runs": f"{STORE}/runs", "cache": f"{STORE}/cache"}
VOLUMES = {"data": "avatarl-data", "runs": "avatarl-runs", "cache": "avatarl-cache"}
ROOT = Path(__file__).resolve().parent.parent
PORT = 29400
RESTARTS = 2  # of the workers within an attempt; in a cluster none, because a node does not see what another saved
COMMIT_EVERY = 60.0  # seconds between commits of the Volumes while training
NOTICE = 25.0  # seconds to save in when the container is taken away: Modal kills it after 30


class Incomplete(RuntimeError):
    """An attempt that ended before its run did: Modal is to make another."""


@dataclass(frozen=True)
class Job:
    """What a container is told, the same at every attempt."""

    id: str
    """Tells this job from others of the same run."""
    folder: str
    """Name of the run's folder."""
    words: tuple[str, ...]
    """Arguments of train.py: the preset and its settings, or with `resume` what --resume changes."""
    resume: bool
    """Continue a run that an earlier job made."""
    gpus: int
    """Processes of a node."""
    nodes: int
    """Containers."""
    seconds: float
    """After so long an attempt saves and ends."""
    store: str = STORE
    """Folder with runs/."""

    @property
    def runs(self) -> Path:
        """Where run folders stand."""
        return Path(self.store) / "runs"

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.runs / self.folder


def train_on_modal(job: Job) -> int:
    """One attempt at `job`, called in each of its containers; 0, or 1 where more attempts are hopeless.

    Raises Incomplete in the first container for Modal to make another, KeyboardInterrupt when one is taken away.
    """
    rank, address = place_in_cluster(job)
    prepare_container()
    if rank > 0:
        return attempt(job, rank, address)[0]  # the first container speaks for all
    if not job.resume:
        set_aside(job.run)
    record = Attempts(job.runs / ".jobs" / f"{job.id}.json")
    record.begin(newest_step(job.run))
    code: int | None = None
    stopped = True
    try:
        code, stopped = attempt(job, rank, address)
    finally:
        step = newest_step(job.run)
        record.end(step, code, stopped)
        commit()
    if code == 0:
        return 0
    if record.hopeless:
        print(f"{job.folder}: two attempts failed at step {step}; another would too", file=sys.stderr)
        return 1
    raise Incomplete(f"{job.folder} stands at step {step} (exit code {code}); the next attempt resumes")


def attempt(job: Job, rank: int, address: str) -> tuple[int, bool]:
    """Train on this node; the exit code, and whether the attempt was stopped by its clock."""
    command = torchrun(job, rank, address, training_words(job))
    print(f"$ {' '.join(command)}", flush=True)
    return supervise(command, job.seconds)


def prepare_on_modal(corpus: str) -> int:
    """Prepare a corpus on the Volume; 0. Raises Incomplete for Modal to try again: what is done is kept."""
    prepare_container()
    code, _ = supervise(preparing(corpus), seconds=float("inf"))
    if code:
        raise Incomplete(f"preparing {corpus} ended with exit code {code}")
    return 0


def preparing(corpus: str) -> list[str]:
    """The command that prepares a corpus."""
    return [sys.executable, "-m", "data.prepare", corpus]


def torchrun(job: Job, rank: int, address: str, words: Sequence[str]) -> list[str]:
    """The command of node `rank`; `address` is node 0's. Nodes meet there, a node alone meets itself."""
    meeting = ["--standalone", f"--max-restarts={RESTARTS}"]
    if job.nodes > 1:
        meeting = [f"--nnodes={job.nodes}", f"--node-rank={rank}", f"--master-addr={address}", f"--master-port={PORT}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *meeting, f"--nproc-per-node={job.gpus}"]
    return [*launcher, str(ROOT / "train.py"), *words]


def training_words(job: Job) -> list[str]:
    """Arguments of train.py for this attempt: resume what has a checkpoint, else start."""
    if job.resume:
        return ["--resume", str(job.run), *job.words]
    if newest_step(job.run) >= 0:
        return ["--resume", str(job.run)]
    return [*job.words, "--run.name", job.folder, "--run.out-dir", str(job.runs)]


# ---- what earlier attempts left


def newest_step(run: Path) -> int:
    """The step of a run's newest checkpoint; -1 where there is none."""
    steps = [path.name.partition("-")[2] for path in run.glob("checkpoints/step-*")]
    return max((int(step) for step in steps if step.isdigit()), default=-1)


def set_aside(run: Path) -> None:
    """Rename a run's folder that has no checkpoint: the attempt that made it ended too early, the next starts anew."""
    if not run.exists() or newest_step(run) >= 0:
        return
    number = 1
    while (other := run.with_name(f".{run.name}.attempt-{number}")).exists():
        number += 1
    run.rename(other)


class Attempts:
    """The record of a job's attempts, beside the runs: when, from and to which step, how each ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []

    def begin(self, step: int) -> None:
        """Note that an attempt begins where `step` is the newest checkpoint's."""
        self.rows.append({"began": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "from": step})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.rows)

    def end(self, step: int, code: int | None, stopped: bool) -> None:
        """Note how it ended; stopped: from outside or by its clock, and not by itself."""
        self.rows[-1] |= {"to": step, "code": code, "stopped": stopped}
        write_json(self.path, self.rows)

    @property
    def hopeless(self) -> bool:
        """Whether the last two attempts ended by themselves without a new checkpoint."""
        ends = self.rows[-2:]
        return len(ends) == 2 and all(row.get("stopped") is False and row["to"] == row["from"] for row in ends)


# ---- the process


def supervise(command: Sequence[str], seconds: float) -> tuple[int, bool]:
    """Run `command` for at most `seconds` and commit the Volumes on the way; its exit code, and whether it was stopped.

    An interrupt (Modal's notice that the container goes) is passed on as SIGTERM, waited for, and raised again.
    """
    deadline = time.monotonic() + seconds
    with interrupted_by_sigterm():
        process = subprocess.Popen(command, start_new_session=True)  # signals come from here only, once
        try:
            while True:
                left = deadline - time.monotonic()
                try:
                    return process.wait(max(0.0, min(COMMIT_EVERY, left))), False
                except subprocess.TimeoutExpired:
                    commit()
                if left <= 0:
                    print("this attempt's hours are over: saving", flush=True)
                    return stop(process, patience=600), True
        except BaseException:
            stop(process, patience=NOTICE)
            raise
        finally:
            commit()


def stop(process: subprocess.Popen[bytes], patience: float) -> int:
    """SIGTERM, which makes train.py save; SIGKILL after `patience` seconds. Returns the exit code."""
    process.terminate()
    try:
        return process.wait(patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Within the block SIGTERM raises KeyboardInterrupt, as SIGINT does; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


# ---- Modal


def on_modal() -> bool:
    """Whether this process runs a function in one of Modal's containers."""
    modal = sys.modules.get("modal")
    return modal is not None and not modal.is_local()


def prepare_container() -> None:
    """See what other containers left on the Volumes, and keep the project's caches there."""
    if on_modal():
        each_volume("reload")
        link_caches(Path(CHECKOUT) / "data" / "cache", Path(PLACES["cache"]))


def link_caches(place: Path, target: Path) -> None:
    """Make `place` another name of `target`, unless something stands there."""
    target.mkdir(parents=True, exist_ok=True)
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target, target_is_directory=True)


def commit() -> None:
    """Make what stands on the Volumes last, where there are any."""
    if on_modal():
        each_volume("commit")


def each_volume(action: str) -> None:
    """Call `action`, "commit" or "reload", of every Volume. A failure is a warning: the next commit covers it."""
    import modal

    for name in VOLUMES.values():
        try:
            getattr(modal.Volume.from_name(name), action)()
        except Exception as error:
            print(f"warning: {action} of {name} failed ({type(error).__name__}: {error})", file=sys.stderr, flush=True)


def place_in_cluster(job: Job) -> tuple[int, str]:
    """This container's rank and the first one's address on their private network; 0 and "" for a single one."""
    if job.nodes == 1:
        return 0, ""
    import modal

    cluster = modal.Cluster.from_context()
    rank, addresses = cluster.container_rank(), cluster.container_ips()
    interface = interface_of(addresses[rank])
    if interface:
        os.environ["GLOO_SOCKET_IFNAME"] = interface  # by itself gloo goes by the host's name
    return rank, addresses[0]


def interface_of(address: str, table: Path = Path("/proc/net/if_inet6")) -> str:
    """The network interface with this IPv6 address; empty where none has it."""
    wanted = f"{int(ipaddress.IPv6Address(address)):032x}"
    rows = [line.split() for line in table.read_text().splitlines()] if table.is_file() else []
    return next((row[-1] for row in rows if row[0] == wanted), "")
