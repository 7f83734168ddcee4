"""What runs in Modal's containers, on this machine: attempts that train, stop, resume, meet, and give up."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from torch.distributed import run

from on_modal import container
from on_modal.container import Incomplete, Job
from tests.processes import apart
from tests.tiny_train import PRESET, ROOT, environment, flags, here, lines, same, trained, weights

STEPS = 200


def job(store: Path, *words: str, folder: str = "run", **changes) -> Job:
    settings = {"resume": False, "gpus": 1, "nodes": 1, "seconds": 600.0} | changes
    return Job("0123abcd", folder, words, store=str(store), **settings)


def tiny_job(store: Path, **settings) -> Job:
    return job(store, PRESET, *flags(data_corpus="corpus.txt", **settings))


def attempts(store: Path) -> list[dict]:
    return json.loads((store / "runs" / ".jobs" / "0123abcd.json").read_text())


def when(ready: Callable[[], bool], action: Callable[[], object]) -> threading.Thread:
    """Do `action` as soon as `ready`, in a thread."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.005)
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def instead(monkeypatch, code: str) -> None:
    """Attempts run this Python with the run's folder and train.py's words as arguments, and no torchrun."""

    def command(job: Job, rank: int, address: str, words) -> list[str]:
        return [sys.executable, "-c", code, str(job.run), *words]

    monkeypatch.setattr(container, "torchrun", command)


def words_of(command: Sequence[str]) -> Sequence[str]:
    """What an attempt's command gives train.py."""
    return command[command.index(str(ROOT / "train.py")) + 1 :]


def torchrun(line: list[str], said: str) -> None:
    """torchrun's own main, in a process of its own; what it and its workers say goes to a file."""
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    run.main(line)


def test_a_preempted_attempt_is_resumed_to_the_same_weights(place, monkeypatch):
    """Catches a preemption that loses steps: a signal that never reaches train.py, or a retry that starts anew."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    store = place / "store"
    work = tiny_job(store, train_steps=STEPS, eval_every=0)
    metrics = work.run / "metrics.jsonl"
    taken = when(
        lambda: metrics.is_file() and metrics.read_text().count("\n") > 5, lambda: os.kill(os.getpid(), signal.SIGTERM)
    )
    with pytest.raises(KeyboardInterrupt):
        container.train_on_modal(work)
    taken.join()
    reached = container.newest_step(work.run)
    assert 0 < reached < STEPS
    # The retry in this process: how one is started and watched is above and below.
    monkeypatch.setattr(container, "supervise", lambda command, seconds: (here(*words_of(command)).code, False))
    assert container.train_on_modal(work) == 0
    undisturbed = trained("undisturbed", train_steps=STEPS, eval_every=0)
    assert same(weights(work.run, STEPS), weights(undisturbed, STEPS))
    assert [line["step"] for line in lines(work.run)] == [line["step"] for line in lines(undisturbed)]
    first, second = attempts(store)
    assert (first["to"], first["stopped"], second["from"], second["code"]) == (reached, True, reached, 0)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_two_containers_train_together(place):
    """Catches nodes that never meet (an IPv6 address as Modal gives them), and command lines that differ by node."""
    both = job(place / "store", PRESET, *flags(data_corpus="corpus.txt"), nodes=2)
    words = container.training_words(both)
    lines = [list(container.torchrun(both, rank, "::1", words)) for rank in range(2)]
    assert all(line[:3] == [sys.executable, "-m", "torch.distributed.run"] for line in lines)
    nodes = [apart(torchrun, line[3:], f"node-{rank}") for rank, line in enumerate(lines)]
    for node in nodes:
        node.join(100)
    said = [(place / f"node-{rank}").read_text() for rank in range(2)]
    assert [node.exitcode for node in nodes] == [0, 0], said
    assert (both.run / "result.json").is_file()
    assert "sample: python sample.py" in said[0] and "sample:" not in said[1]


def test_an_attempt_whose_hours_are_over_saves_and_asks_for_the_next(tmp_path, monkeypatch):
    """Catches a run that Modal kills at its timeout, and one that ends there as if it were complete."""
    saves = (
        "import os, signal, sys, time\n"
        "def save(*_): os.makedirs(f'{sys.argv[1]}/checkpoints/step-000007'); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "time.sleep(60)\n"
    )
    instead(monkeypatch, saves)
    with pytest.raises(Incomplete, match="stands at step 7"):
        container.train_on_modal(job(tmp_path, seconds=1.0))
    assert attempts(tmp_path)[0]["stopped"] is True


def test_commits_go_on_while_training(tmp_path, monkeypatch):
    """Catches a Volume that is committed at the end only: a lost container then loses the whole attempt."""
    commits = []
    monkeypatch.setattr(container, "commit", lambda: commits.append(time.monotonic()))
    monkeypatch.setattr(container, "COMMIT_EVERY", 0.05)
    assert container.supervise([sys.executable, "-c", "import time; time.sleep(0.5)"], 60) == (0, False)
    assert len(commits) >= 4


def test_logs_stream(capfd):
    """Catches output that is collected, or lost, while Modal shows what the container itself writes."""
    saying = "import sys; print('step 1'); print('warning: slow', file=sys.stderr)"
    assert container.supervise([sys.executable, "-S", "-c", saying], 60) == (0, False)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("step 1\n", "warning: slow\n")


def test_a_process_that_will_not_stop_is_killed(tmp_path):
    """Catches an attempt that hangs for ever on a worker which ignores SIGTERM."""
    ready = tmp_path / "ready"
    code = f"import signal, time; signal.signal(15, signal.SIG_IGN); open({str(ready)!r}, 'w'); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    when(ready.exists, lambda: None).join()
    assert container.stop(process, patience=0.1) == -signal.SIGKILL


def test_attempts_end_where_two_fail_alike(tmp_path, monkeypatch):
    """Catches ten rented retries of a mistake, and giving up on a run that still makes progress."""
    instead(monkeypatch, "import sys; sys.exit(3)")
    with pytest.raises(Incomplete):
        container.train_on_modal(job(tmp_path))
    assert container.train_on_modal(job(tmp_path)) == 1
    advancing = (
        "import os, sys\n"
        "done = len(os.listdir(sys.argv[1] + '/checkpoints')) if os.path.isdir(sys.argv[1]) else 0\n"
        "os.makedirs(f'{sys.argv[1]}/checkpoints/step-{done + 1:06d}')\n"
        "sys.exit(3)\n"
    )
    instead(monkeypatch, advancing)
    for _ in range(3):
        with pytest.raises(Incomplete):
            container.train_on_modal(job(tmp_path))


def test_a_folder_without_a_checkpoint_keeps_its_files_and_frees_its_name(tmp_path, monkeypatch):
    """Catches a retry that trains into NAME-2, which nobody looks for, and one that deletes what it finds."""
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("first\n")
    (tmp_path / "runs" / ".run.attempt-1").mkdir()
    instead(monkeypatch, "import os, sys; os.mkdir(sys.argv[1])")
    assert container.train_on_modal(job(tmp_path)) == 0
    assert (tmp_path / "runs" / ".run.attempt-2" / "metrics.jsonl").read_text() == "first\n"
    assert list(run.iterdir()) == []


def test_a_resumed_run_takes_changes_and_is_never_set_aside(tmp_path, monkeypatch):
    """Catches `--resume NAME --train.steps 900` that forgets the change, or moves a broken run out of sight."""
    more = job(tmp_path, "--train.steps", "900", resume=True)
    assert container.training_words(more) == ["--resume", f"{tmp_path}/runs/run", "--train.steps", "900"]
    more.run.mkdir(parents=True)
    instead(monkeypatch, "")
    assert container.train_on_modal(more) == 0
    assert more.run.is_dir()


def test_the_words_of_an_attempt(tmp_path):
    """Catches a retry that gives the preset with --resume, which train.py refuses, and a run beside the Volume."""
    new = job(tmp_path, "avatarl-char", "--train.steps", "5")
    place = ["--run.name", "run", "--run.out-dir", f"{tmp_path}/runs"]
    assert container.training_words(new) == ["avatarl-char", "--train.steps", "5", *place]
    (new.run / "checkpoints" / "step-000004").mkdir(parents=True)
    (new.run / "checkpoints" / ".step-000009").mkdir()
    assert container.newest_step(new.run) == 4
    assert container.training_words(new) == ["--resume", f"{tmp_path}/runs/run"]


def test_torchrun_lines(tmp_path):
    """Catches processes per node that are not the GPUs, and workers restarted where nodes do not share a disk."""
    alone = container.torchrun(job(tmp_path, gpus=4), 0, "", ["x"])
    assert alone[1:3] == ["-m", "torch.distributed.run"]
    assert {"--standalone", "--nproc-per-node=4", "--max-restarts=2"} <= set(alone)
    assert alone[-2:] == [str(container.ROOT / "train.py"), "x"] and Path(alone[-2]).is_file()
    second = container.torchrun(job(tmp_path, gpus=8, nodes=3), 1, "fd00::5", ["x"])
    assert {"--nnodes=3", "--node-rank=1", "--master-addr=fd00::5", "--nproc-per-node=8"} <= set(second)
    assert not any("restarts" in word or word == "--standalone" for word in second)


def test_a_cluster_tells_rank_address_and_interface(tmp_path, monkeypatch):
    """Catches ranks by the order of start, and gloo on the interface that other containers do not reach."""
    import modal

    class Cluster:
        def container_rank(self) -> int:
            return 1

        def container_ips(self) -> list[str]:
            return ["fd00::1", "::1"]

    monkeypatch.setattr(modal.Cluster, "from_context", staticmethod(Cluster))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "before")
    assert container.place_in_cluster(job(tmp_path, nodes=2)) == (1, "fd00::1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == ("lo" if Path("/proc/net/if_inet6").is_file() else "before")
    table = tmp_path / "if_inet6"
    table.write_text("fd000000000000000000000000000005 04 40 00 80   i6pn0\n")
    assert container.interface_of("fd00::5", table) == "i6pn0"
    assert container.interface_of("fd00::6", table) == ""


def test_only_the_first_container_keeps_the_record(tmp_path, monkeypatch):
    """Catches two containers that both rename the run's folder, or a second one that asks for retries of its own."""
    monkeypatch.setattr(container, "place_in_cluster", lambda job: (1, "::1"))
    instead(monkeypatch, "import sys; sys.exit(4)")
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    assert container.train_on_modal(job(tmp_path, nodes=2)) == 4
    assert run.is_dir() and not (tmp_path / "runs" / ".jobs").exists()


def test_caches_are_linked_once(tmp_path):
    """Catches tokens that every container computes anew, and a second attempt that fails on the first one's link."""
    place, target = tmp_path / "data" / "cache", tmp_path / "store" / "cache"
    for _ in range(2):
        container.link_caches(place, target)
    (place / "tokens").write_text("1 2 3")
    assert (target / "tokens").read_text() == "1 2 3"


def test_a_corpus_that_fails_is_tried_again(monkeypatch):
    """Catches a preparation that ends half-way and looks complete."""
    monkeypatch.setattr(container, "preparing", lambda corpus: [sys.executable, "-c", "import sys; sys.exit(1)"])
    with pytest.raises(Incomplete, match="preparing web ended with exit code 1"):
        container.prepare_on_modal("web")
    monkeypatch.setattr(container, "preparing", lambda corpus: [sys.executable, "-c", ""])
    assert container.prepare_on_modal("web") == 0


def test_the_preparing_command_exists():
    """Catches a command line of data.prepare that was renamed."""
    command = [*container.preparing("openwebtext"), "--help"]
    done = subprocess.run(command, cwd=container.ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "openwebtext" in done.stdout


def test_volumes_are_committed_only_on_modal(monkeypatch, capsys):
    """Catches calls to Modal from a laptop, and a failed commit that stops the training."""
    import modal

    assert not container.on_modal()
    called = []

    def commit(self) -> None:
        called.append(self.name)
        raise RuntimeError("busy")

    monkeypatch.setattr(modal.Volume, "commit", commit)
    container.commit()
    assert called == []
    monkeypatch.setattr(container, "on_modal", lambda: True)
    container.commit()
    assert called == list(container.VOLUMES.values())
    assert capsys.readouterr().err.count("warning: commit of avatarl-") == 3
