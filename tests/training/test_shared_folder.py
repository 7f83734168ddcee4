"""Machines with disks of their own: what they can do is done, what would lose a run is refused by all of them."""

import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.processes import command, together, trained_together, words
from tests.tiny_train import Outcome, files_below, here, trained, write_corpus
from training import shared_folder
from training.distributed import World, process_group, world_from_environment
from training.shared_folder import require_shared


@pytest.fixture
def disks(place: Path) -> list[Path]:
    """A disk for each of two machines, with the corpus on it."""
    for name in ("disk-0", "disk-1"):
        Path(name).mkdir()
        write_corpus(Path(name) / "corpus.txt")
    return [place / "disk-0", place / "disk-1"]


def on_own_disk(line: list[str], attempt: int) -> Outcome:
    """train.py with these words in this process, on the disk of its machine; torchrun's attempt of that number."""
    rank = world_from_environment().rank
    os.chdir(f"disk-{rank}")
    os.environ["TORCHELASTIC_ERROR_FILE"] = f"/tmp/torchelastic_x/none_y/attempt_{attempt}/{rank}/error.json"
    with mock.patch.object(shared_folder, "PATIENCE", 0.0):
        return command(line)


def refused(line: list[str], attempt: int = 0) -> str:
    """The error with which both machines refuse a command: the same one line."""
    outcomes = together(2, on_own_disk, line, attempt)
    assert [o.code for o in outcomes] == [2, 2], [o.err for o in outcomes]
    (said,) = {error for o in outcomes for error in o.errors}
    return str(said)


def test_shares_of_a_checkpoint_are_not_strewn_over_disks(disks):
    """Catches a sharded run that ends well, of whose checkpoints the first machine has half and none can be loaded."""
    said = refused(words("run", "fsdp"))
    assert "run.out-dir: runs is on the first machine's own disk: process 1 on" in said and "share" in said
    assert files_below(disks[0] / "runs") == set() and not (disks[1] / "runs").exists()


def test_replicas_need_no_shared_disk_until_they_start_again(disks):
    """Catches folders left on machines that write nothing, and a restart that dies there without saying why."""
    first, second = together(2, on_own_disk, words("run", train_steps=4), 0)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert files_below(disks[1]) == {"corpus.txt"}
    said = refused(words("run", train_steps=4), attempt=1)
    assert "runs/run is on the first machine's own disk: process 1 on" in said and "config.json" in said
    shutil.copytree(disks[0] / "runs", "runs")
    assert here("--resume", "runs/run", "--train.steps", "5").code == 0  # what the first wrote is whole


def test_a_critic_that_one_machine_lacks_is_named(disks):
    """Catches processes that wait for ever for one that found no critic, after hours of training that critic."""
    shutil.copytree(trained("critic", "pretrain-char", eval_every=0), disks[0] / "runs" / "critic")
    said = refused(words("run", critic_kind="model", critic_run="runs/critic"))
    assert "runs/critic is on the first machine's own disk: process 1 on" in said
    assert not (disks[0] / "runs" / "run").exists()


def test_machines_with_different_texts_are_told(disks):
    """Catches a run whose machines learn from different texts, each believing that the others have its own."""
    write_corpus(disks[1] / "corpus.txt", seed=1)
    assert "data.corpus = 'corpus.txt': the machines of this run have different texts" in refused(words("run"))
    assert not (disks[0] / "runs").exists()


def ask(folder: str) -> None:
    world = world_from_environment()
    with process_group(world, mock.Mock(type="cpu")):
        require_shared(Path(folder), world)


def test_a_shared_folder_is_made_and_left_as_it_was(place):
    """Catches a refusal of what is shared, and a file that stays behind of every start."""
    together(2, ask, "runs/deep")
    assert files_below(place / "runs") == {"deep"}
    trained_together(2, words("run", "fsdp", train_steps=2, eval_every=0, eval_ladder=0))
    assert not [name for name in files_below(place / "runs") if ".seen" in name]


def test_a_file_may_take_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches a shared file system that is taken for two because a file took a moment to appear."""
    answers: Any = iter([False, False, True, True])
    monkeypatch.setattr(shared_folder.time, "sleep", lambda seconds: None)
    shared_folder._require_all(lambda: next(answers), tmp_path / "late", World())
    assert list(answers) == []
