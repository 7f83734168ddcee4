"""Files that are whole or not there, on file systems that cannot do everything."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from files import held, sync_folder, write_atomic
from tests.tiny_train import ROOT, files_below


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder in a folder, with a file."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_text("text")
    return tmp_path


def unable(monkeypatch: pytest.MonkeyPatch, code: int, folders: bool) -> list[bool]:
    """fsync fails with `code` on folders, or on files; returns what it was asked for, True for folders."""
    asked, fsync = list[bool](), os.fsync

    def fails(descriptor: int) -> None:
        asked.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        if asked[-1] == folders:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails)
    return asked


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_folder_that_cannot_be_flushed_ends_no_run(tree, monkeypatch, code):
    """Catches a checkpoint that fails on a network's file system, and files that are left out with their folders."""
    asked = unable(monkeypatch, code, folders=True)
    sync_folder(tree)
    assert sorted(asked) == [False, True, True]


@pytest.mark.parametrize(("code", "folders"), [(errno.EIO, True), (errno.ENOSPC, False), (errno.EINVAL, False)])
def test_what_is_lost_is_said(tree, monkeypatch, code, folders):
    """Catches a full or failing disk that goes unnoticed: only folders may be unable to be flushed."""
    unable(monkeypatch, code, folders)
    with pytest.raises(OSError, match=os.strerror(code)):
        sync_folder(tree)


def test_a_write_that_fails_leaves_the_old_file(tree, monkeypatch):
    """Catches half a file, and a temporary one that stays."""
    unable(monkeypatch, errno.ENOSPC, folders=False)
    before = files_below(tree)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tree / "inner" / "file", "other")
    assert (tree / "inner" / "file").read_text() == "text" and files_below(tree) == before


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    """Catches a lock that two get, one that outlives its block or its process, and one that leaves a file behind."""
    with held(tmp_path) as first, held(tmp_path) as second:
        assert (first, second) == (True, False)
    code = "import sys; from pathlib import Path; from files import held\n"
    code += "with held(Path(sys.argv[1])): print(1, flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "1\n"
    with held(tmp_path) as ours:
        assert not ours
    other.kill()
    other.communicate()
    with held(tmp_path) as ours:
        assert ours
    assert list(tmp_path.iterdir()) == []


def test_without_locks_everybody_may(tmp_path, monkeypatch):
    """Catches a run that cannot start on a network's file system, which has no locks."""
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with held(tmp_path) as ours:
        assert ours
