"""Tensors that took time to make, kept on disk for the next run: whole and of the right origin, or made again.

    tensors = read_stored(path, digest)                 # None: make them, and then
    write_stored(path, digest, tensors)

A file that is damaged or was made from something else is as good as none; a folder that cannot be written to costs
nothing but the time next time.
"""

import os
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Tensors = Mapping[str, Tensor]


def read_stored(path: Path, digest: str) -> dict[str, Tensor] | None:
    """The tensors in `path`, or None where there are none that were stored under `digest`, or damaged ones."""
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (OSError, SafetensorError):
        return None
    return tensors if found == _labels(digest, tensors) else None


def write_stored(path: Path, digest: str, tensors: Tensors) -> None:
    """Store tensors whole or not at all; processes that do so at once don't disturb each other."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        save_file(dict(tensors), temporary, metadata=_labels(digest, tensors))
        os.replace(temporary, path)
    except (OSError, SafetensorError):
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _labels(digest: str, tensors: Tensors) -> dict[str, str]:
    """What stands beside the tensors: where they come from, and a checksum of each."""
    return {"digest": digest} | {n: str(zlib.crc32(t.contiguous().numpy().data)) for n, t in tensors.items()}
