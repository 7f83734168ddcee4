"""Critics on disk: what a critic thinks of every training window, written once (DESIGN sections 3 and 5).

    meta.json        what the cache was made for, and the checksums of the parts that are written
    ids.bin          (windows, T, M): the M likeliest tokens, best first, in the smallest type that holds V
    log_probs.bin    (windows, T, M) float16: their log-probabilities over the full vocabulary

Windows are cut from offset 0: window i starts at position i · T of the training stream. A pass writes part by
part; each is flushed to the disk and then recorded, so that a pass that was killed continues after its last
recorded part and ends with the same bytes.
"""

import hashlib
import json
import os
import shutil
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from config import ConfigError
from data.corpora import warn
from files import write_json

FORMAT = 1  # to be raised with the layout of the files, or when a critic of the same settings says something else
# A part is so many bytes of both files: what a killed pass loses at most, and what is held in memory.
PART_BYTES = 32 * 2**20
IDS, LOG_PROBS, META = "ids.bin", "log_probs.bin", "meta.json"

Identity = dict[str, Any]  # facts, as JSON knows them, that decide what a critic says


class BrokenCache(RuntimeError):
    """A cache that cannot be used: which one, what is wrong with it."""


@dataclass(frozen=True)
class CacheLayout:
    """How much is stored, and in which types."""

    windows: int
    block_size: int
    """Positions T of a window."""
    top: int
    """Tokens M that are kept for a position."""
    vocab_size: int

    @property
    def ids_type(self) -> np.dtype:
        """The smallest unsigned integers that tell V tokens apart."""
        return np.min_scalar_type(self.vocab_size - 1)

    @property
    def window_bytes(self) -> int:
        return self.block_size * self.top * (self.ids_type.itemsize + 2)

    @property
    def total_bytes(self) -> int:
        return self.windows * self.window_bytes

    @property
    def part_windows(self) -> int:
        """Windows of a part; the last one may have fewer."""
        return max(1, PART_BYTES // self.window_bytes)

    @property
    def parts(self) -> list[range]:
        """The windows of every part."""
        starts = range(0, self.windows, self.part_windows)
        return [range(start, min(start + self.part_windows, self.windows)) for start in starts]

    def files(self) -> list[tuple[str, np.dtype]]:
        """The two files and the types of their numbers."""
        return [(IDS, self.ids_type), (LOG_PROBS, np.dtype(np.float16))]


def cache_facts(layout: CacheLayout, identity: Identity) -> dict[str, Any]:
    """All that a cache is made for: its format, its layout, and what its critic's words depend on."""
    facts = {"format": FORMAT, **identity, **asdict(layout), "part_windows": layout.part_windows}
    return json.loads(json.dumps(facts))


def cache_folder(parent: Path, layout: CacheLayout, identity: Identity) -> Path:
    """Where the cache for these facts belongs: parent/cache-<hash>."""
    facts = json.dumps(cache_facts(layout, identity), sort_keys=True)
    return parent / f"cache-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"


class CacheWriter:
    """Writes a cache part by part, or completes one that was begun. Nothing is read or made before `begin`."""

    def __init__(self, folder: Path, layout: CacheLayout, identity: Identity) -> None:
        self.folder, self.layout = folder, layout
        self._facts = cache_facts(layout, identity)
        self._sums: dict[str, list[int]] = {}

    def begin(self) -> int:
        """Find what is recorded and make sure that the rest fits the disk; the number of bytes still to write.

        Raises ConfigError for a cache of something else, a folder that can't be made or a disk without room,
        BrokenCache for a meta.json that can't be read.
        """
        self._sums = _recorded(self.folder, self._facts) if (self.folder / META).exists() else {}
        missing = sum(len(part) for i, part in enumerate(self.layout.parts) if str(i) not in self._sums)
        needed = missing * self.layout.window_bytes
        free = shutil.disk_usage(_existing(self.folder)).free
        if needed > free:
            raise ConfigError(
                f"critic.cache = True: {self.folder} needs {needed / 1e9:,.3f} GB more and its disk has only "
                f"{free / 1e9:,.3f} GB free; make room, use another --run.out-dir or a smaller --critic.cache-top"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run.out-dir: cannot create {self.folder} ({error.strerror})") from None
        return needed

    def holds(self, part: int) -> bool:
        """Whether a part is written and unaltered. Warns of one that was recorded and no longer matches."""
        recorded = self._sums.get(str(part))
        if recorded is None:
            return False
        if recorded == _checksums(self.folder, self.layout, part):
            return True
        count = len(self.layout.parts)
        warn(f"{self.folder}: part {part + 1} of {count} does not match its checksum; it is made again")
        return False

    def write(self, part: int, ids: np.ndarray, log_probs: np.ndarray) -> None:
        """Store and record a part: ids (w, T, M) of any integer type, log_probs (w, T, M), w its windows.

        Raises RuntimeError where that cannot be written; what was recorded before stays.
        """
        windows = self.layout.parts[part]
        shape = (len(windows), self.layout.block_size, self.layout.top)
        if ids.shape != shape or log_probs.shape != shape:
            raise ValueError(f"part {part} has shape {shape}, not {ids.shape} and {log_probs.shape}")
        sums = []
        try:
            for (name, dtype), values in zip(self.layout.files(), (ids, log_probs), strict=True):
                data = np.ascontiguousarray(values, dtype=dtype).tobytes()
                with os.fdopen(os.open(self.folder / name, os.O_WRONLY | os.O_CREAT, 0o644), "wb") as file:
                    file.seek(windows.start * self.layout.block_size * self.layout.top * dtype.itemsize)
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                sums.append(zlib.crc32(data))
            self._sums[str(part)] = sums
            ordered = {name: self._sums[name] for name in sorted(self._sums, key=int)}
            write_json(self.folder / META, {"made_for": self._facts, "crc32": ordered})
        except OSError as error:
            raise RuntimeError(
                f"{self.folder}: the cache cannot be written ({error.strerror}); make room and give the same command "
                "again: it continues where it stopped"
            ) from None


class CriticCache:
    """A finished cache, memory-mapped.

    Raises ConfigError for a cache of something else, BrokenCache for one that is missing, unfinished or, with
    `verify`, altered (which reads all of it, under a bar where that takes long).
    """

    def __init__(self, folder: Path, layout: CacheLayout, identity: Identity, *, verify: bool = True) -> None:
        self.folder, self.layout = folder, layout
        recorded, parts = _recorded(folder, cache_facts(layout, identity)), layout.parts
        if len(recorded) < len(parts):
            raise BrokenCache(
                f"{folder}: only {len(recorded)} of its {len(parts)} parts are written; "
                "give the command that began it again"
            )
        shape = (layout.windows, layout.block_size, layout.top)
        for name, dtype in layout.files():
            path, size = folder / name, int(np.prod(shape)) * dtype.itemsize
            found = path.stat().st_size if path.is_file() else 0
            if found != size:
                raise BrokenCache(
                    f"{folder}: {name} has {found:,} of {size:,} bytes; delete the folder to make it anew"
                )
        for part in tqdm(range(len(parts)) if verify else (), desc="checking the cache", delay=2, leave=False):
            if recorded[str(part)] != _checksums(folder, layout, part):
                raise BrokenCache(
                    f"{folder}: part {part + 1} of {len(parts)} does not match its checksum; "
                    "delete the folder to make it anew"
                )
        self._ids, self._log_probs = (np.memmap(folder / n, dtype=t, mode="r", shape=shape) for n, t in layout.files())

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is stored of the windows that start at `positions` (B,): ids (B, T, M) int32, float16 log-probs.

        Raises ValueError for positions where no window of the cache starts.
        """
        windows, inside = np.divmod(positions, self.layout.block_size)
        if inside.any() or (windows < 0).any() or (windows >= self.layout.windows).any():
            raise ValueError(
                f"{self.folder}: it holds windows at multiples of {self.layout.block_size} below "
                f"{self.layout.windows * self.layout.block_size}, not at {positions.tolist()}"
            )
        # Of PyTorch's integers the smallest that holds every vocabulary and can be compared everywhere.
        return self._ids[windows].astype(np.int32), np.asarray(self._log_probs[windows])


def _recorded(folder: Path, facts: dict[str, Any]) -> dict[str, list[int]]:
    """The checksums of a cache's written parts. Raises ConfigError when it was made for other facts."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        made_for, sums = dict(meta["made_for"]), dict(meta["crc32"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrokenCache(f"{folder}: {META} is missing or unreadable ({error}); delete the folder") from None
    for name in facts | made_for:  # the text and the critic first: the windows follow from them
        if facts.get(name) != made_for.get(name):
            raise ConfigError(
                f"{folder}: made for {name} = {made_for.get(name)!r}, not for {facts.get(name)!r}; "
                "delete that folder, or give it back its own name"
            )
    return sums


def _checksums(folder: Path, layout: CacheLayout, part: int) -> list[int]:
    """CRC-32 of a part in each of the two files, as they are on the disk; of nothing where there is none."""
    windows, found = layout.parts[part], []
    for name, dtype in layout.files():
        window_bytes = layout.block_size * layout.top * dtype.itemsize
        try:
            with open(folder / name, "rb") as file:
                file.seek(windows.start * window_bytes)
                found.append(zlib.crc32(file.read(len(windows) * window_bytes)))
        except FileNotFoundError:
            found.append(-1)
    return found


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
