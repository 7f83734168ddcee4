"""Files that are whole or not there, on file systems that cannot do everything."""

import errno
import os
import stat
from pathlib import Path

import pytest

from files import sync_folder, write_atomic
from tests.tiny_train import files_below


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
