"""Files that are either whole or not there: written beside their target, synced, then renamed onto it."""

import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

UNABLE = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM}
"""What a file system answers that cannot flush a folder; a disk that fails or is full answers something else."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) to `path`; whoever reads it sees the old file or the new one, whole."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Whether this process has the folder for itself within the block: nobody else who asks gets True meanwhile.

    It ends with the process, however that does, and leaves nothing behind. Where a file system has no locks, such as
    some networks', everybody gets True.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except BlockingIOError:
        free = False
    except OSError:
        free = True
    try:
        yield free
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush every file below `folder`, and the folder itself, to the disk.

    Some network file systems cannot flush a folder, and say so (EINVAL, ENOTSUP and the like): they are believed.
    """
    for path in [*folder.rglob("*"), folder]:
        try:
            _flush(path)
        except OSError as error:
            if not (path.is_dir() and error.errno in UNABLE):
                raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
