"""Real processes for tests: train.py's main on several that talk over gloo, and torchrun itself.

`together` takes them from a server that has imported everything once, so that a test of four processes does not wait
for four imports of PyTorch; what they run is what torchrun's workers run.
"""

import contextlib
import io
import multiprocessing.context
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self
from unittest import mock

import train_core
from tests.tiny_train import PRESET, ROOT, Outcome, environment, flags, here

PRELOAD = ["torch._dynamo", "train", "launch", "tests.tiny_train"]


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def together(count: int, work: Callable[..., Any], *rest: Any, timeout: float = 100) -> list[Any]:
    """What work(*rest) returns in each of `count` processes that have the environment of torchrun's workers.

    `work` is a function of a module, its result can be pickled. Raises AssertionError with what a process said
    when it does not end well.
    """
    context, port, here_now = _server(), free_port(), os.getcwd()
    parents, processes = [], []
    for rank in range(count):
        parent, child = context.Pipe(duplex=False)
        arguments = (child, rank, count, port, here_now, work, rest)
        process = context.Process(target=_worker, args=arguments, daemon=True)
        process.start()
        child.close()
        parents.append(parent)
        processes.append(process)
    try:
        return [_answer(rank, parent, timeout) for rank, parent in enumerate(parents)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def apart(work: Callable[..., Any], *rest: Any) -> BaseProcess:
    """work(*rest), begun in a process of its own in this folder: to be killed, or waited for with `join`."""
    process = _server().Process(target=_in_folder, args=(os.getcwd(), work, rest), daemon=True)
    process.start()
    return process


def _server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with mock.patch.dict(os.environ, {"PYTHONPATH": str(ROOT)}):  # the server finds what it is to import there alone
        forkserver.ensure_running()
    return context


def _in_folder(folder: str, work: Callable[..., Any], rest: Any) -> None:
    os.chdir(folder)
    work(*rest)


def _answer(rank: int, pipe: Any, timeout: float) -> Any:
    assert pipe.poll(timeout), f"process {rank} did not end within {timeout} s"
    try:
        good, result = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise AssertionError(f"process {rank} died") from None
    assert good, f"process {rank}: {result}"
    return result


def _worker(pipe: Any, rank: int, count: int, port: int, folder: str, work: Callable[..., Any], rest: Any) -> None:
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            answer = True, work(*rest)
    except BaseException as error:
        answer = False, f"{type(error).__name__}: {error}\n{said.getvalue()}"
    pipe.send_bytes(pickle.dumps(answer))  # tensors as bytes: this process takes its memory with it


def command(words: Sequence[str]) -> Outcome:
    """train.py with these words, in the processes of `together`."""
    with mock.patch.object(train_core, "matmul_peak", return_value=1e11):  # saves a fifth of a second
        return here(*words)


def trained_together(count: int, words: Sequence[str]) -> list[Outcome]:
    """train.py with these words on `count` processes. Raises AssertionError when one of them fails."""
    outcomes: list[Outcome] = together(count, command, words)
    assert [o.code for o in outcomes] == [0] * count, outcomes[0].err
    return outcomes


def words(name: str, parallel: str = "ddp", **settings: Any) -> list[str]:
    """A tiny run on corpus.txt, as a command."""
    return [PRESET, *flags(run_name=name, data_corpus="corpus.txt", run_parallel=parallel, **settings)]


def on(count: int, name: str, parallel: str = "ddp", **settings: Any) -> Path:
    """A finished run on `count` processes."""
    trained_together(count, words(name, parallel, **settings))
    return Path("runs") / name


class Torchrun:
    """`torchrun OPTIONS train.py WORDS`, begun, behind the words `through`; leaving the block ends it."""

    def __init__(
        self, options: Sequence[str], line: Sequence[str], *, through: Sequence[str] = (), **environ: str
    ) -> None:
        self.log = Path(tempfile.mkstemp(suffix=".log", dir=".")[1])
        words = [*through, sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "train.py"), *line]
        with open(self.log, "w") as file:
            self.process = subprocess.Popen(words, env=environment() | environ, stdout=file, stderr=file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *rest: object) -> None:
        self.kill()

    @property
    def said(self) -> str:
        return self.log.read_text()

    def workers(self) -> list[int]:
        """The processes that it started."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []

    def kill(self) -> None:
        """As if the machine had lost power."""
        for pid in [self.process.pid, *self.workers()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def wait_until(self, there: Callable[[], bool], what: str, timeout: float = 120) -> None:
        """Wait for something that it is to do. Raises AssertionError where it ends or takes too long."""
        deadline = time.monotonic() + timeout
        while not there():
            assert self.process.poll() is None, f"it ended before {what}: {self.said}"
            assert time.monotonic() < deadline, f"{what} did not come: {self.said}"
            time.sleep(0.01)
