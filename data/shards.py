"""A tokenised corpus on disk: one stream of token ids, written shard by shard, each of which is finished or not there.

    manifest.json     what the corpus was made of, and its shards: documents, tokens, bytes of text, sha256
    tokens.bin        all documents in order, (L,) uint16, each followed by <|endoftext|>
    shard-00012.bin   while it is made: a shard that is finished before the ones in front of it, with shard-00012.json

A shard is a run of consecutive documents. It is written beside its name, flushed and renamed; when all before it are
joined it goes to the end of tokens.bin, that is flushed, and only then the manifest names it. What a kill leaves
beyond the manifest's length is cut off, so that nothing is lost or repeated. Source: DESIGN section 5.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from config import ConfigError, require
from data.corpora import MANIFEST
from data.documents import START, Place
from files import held, write_atomic, write_json

FORMAT = 1  # to be raised when the same documents would give other files
TOKENS = "tokens.bin"
DTYPE = np.dtype("<u2")
AGAIN = "give the same command again: it continues where it stopped"


@dataclass(frozen=True)
class Shard:
    """A finished run of documents."""

    index: int
    documents: int
    text_bytes: int
    tokens: int
    sha256: str
    """Of the tokens as they are stored."""
    after: Place
    """Where the documents behind it begin."""

    @staticmethod
    def from_json(facts: dict[str, Any]) -> "Shard":
        return Shard(**(facts | {"after": Place(*facts["after"])}))


@dataclass
class Manifest:
    """What tokens.bin holds so far."""

    made_for: dict[str, Any]
    """Source, tokenizer and size of the shards: a corpus is continued only for the same."""
    shards: list[Shard] = field(default_factory=list)
    complete: bool = False

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        return sum(shard.text_bytes for shard in self.shards)

    @property
    def place(self) -> Place:
        """Where the next shard begins."""
        return self.shards[-1].after if self.shards else START

    @property
    def sha256(self) -> str:
        """Of all tokens and what they mean, put together from the shards' own."""
        parts = [self.made_for.get("tokenizer", ""), *(shard.sha256 for shard in self.shards)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        write_json(
            folder / MANIFEST,
            {
                "format": FORMAT,
                "complete": self.complete,
                "documents": self.documents,
                "text_bytes": self.text_bytes,
                "tokens": self.tokens,
                "sha256": self.sha256,
                "made_for": self.made_for,
                "shards": [asdict(shard) for shard in self.shards],
            },
        )

    @staticmethod
    def load(folder: Path) -> "Manifest":
        """The manifest in `folder`. Raises ConfigError when it can't be understood."""
        path = folder / MANIFEST
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["format"] != FORMAT:
                raise ValueError(f"format {stored['format']}, not {FORMAT}")
            shards = [Shard.from_json(facts) for facts in stored["shards"]]
            return Manifest(dict(stored["made_for"]), shards, bool(stored["complete"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"corpus {folder}: {MANIFEST} can't be understood ({type(error).__name__}: {error}); restore it, or "
                "delete the folder and prepare the corpus again"
            ) from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else prepares the corpus in `folder` within the block. Raises ConfigError when someone does."""
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder) as free:
        require(free, "out", str(folder), "another process is preparing this corpus; let it finish")
        yield


def begin(folder: Path, made_for: dict[str, Any]) -> Manifest:
    """The manifest to go on with, after what was left unfinished is cleared away.

    Raises ConfigError for a corpus that was begun for something else, or whose tokens.bin has lost tokens.
    """
    made_for = json.loads(json.dumps({"format": FORMAT, **made_for}))
    manifest = Manifest(made_for)
    if (folder / MANIFEST).exists():
        manifest = Manifest.load(folder)
        for name in made_for | manifest.made_for:
            old, new = manifest.made_for.get(name), made_for.get(name)
            if old != new:
                raise ConfigError(
                    f"out = {str(folder)!r}: the corpus there was begun for {name} = {old!r}, not for {new!r}; use "
                    "another --out, or delete that folder"
                )
    elif any(folder.glob("*.bin")) or any(folder.glob("*.txt")):
        raise ConfigError(f"out = {str(folder)!r}: the folder holds other files; name an empty one with --out")
    size, held = manifest.tokens * DTYPE.itemsize, 0
    if (folder / TOKENS).exists():
        held = (folder / TOKENS).stat().st_size
    if held < size:
        raise ConfigError(
            f"corpus {folder}: {TOKENS} has {held:,} of the {size:,} bytes that {MANIFEST} names; delete the folder "
            "and prepare the corpus again"
        )
    if not manifest.complete:
        manifest.save(folder)  # first: without it a folder with tokens is someone else's
        with open(folder / TOKENS, "ab") as file:
            file.truncate(size)
        clear(folder, len(manifest.shards))
    return manifest


def clear(folder: Path, joined: int) -> None:
    """Remove what killed processes left: half-written files, and shards that are joined already."""
    for path in folder.iterdir():
        half = path.name.startswith((f".{MANIFEST}.", ".shard-"))
        number = path.stem.removeprefix("shard-")
        if half or (path.stem.startswith("shard-") and number.isdigit() and int(number) < joined):
            path.unlink()


def write_shard(folder: Path, shard: Shard, data: bytes) -> None:
    """Store a finished shard, `data` its tokens, beside tokens.bin, its description last."""
    write_atomic(folder / f"shard-{shard.index:05d}.bin", data)
    write_json(folder / f"shard-{shard.index:05d}.json", asdict(shard))


def finished_shard(folder: Path, index: int) -> Shard | None:
    """The shard of that number, if it is stored whole: its size and sha256 are checked when it is joined."""
    try:
        facts = json.loads((folder / f"shard-{index:05d}.json").read_text(encoding="utf-8"))
        shard = Shard.from_json(facts)
        size = (folder / f"shard-{index:05d}.bin").stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return shard if size == shard.tokens * DTYPE.itemsize and shard.index == index else None


def join(folder: Path, manifest: Manifest, shard: Shard) -> None:
    """Move the next shard to the end of tokens.bin and enter it in the manifest.

    Raises RuntimeError when the shard is no longer what was written.
    """
    path = folder / f"shard-{shard.index:05d}.bin"
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        path.unlink()  # it is made again
        raise RuntimeError(f"{path} does not match its checksum; {AGAIN}")
    with open(folder / TOKENS, "r+b") as file:
        file.seek(manifest.tokens * DTYPE.itemsize)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    manifest.shards.append(shard)
    manifest.save(folder)
    path.with_suffix(".json").unlink()
    path.unlink()


@dataclass(frozen=True, eq=False)
class TokenCorpus:
    """A corpus that was tokenised once and for all."""

    folder: Path
    manifest: Manifest
    tokens: np.ndarray
    """(L,) uint16, memory-mapped."""

    @property
    def sha256(self) -> str:
        return self.manifest.sha256

    @property
    def tokenizer(self) -> str:
        """Fingerprint of the tokenizer."""
        return str(self.manifest.made_for["tokenizer"])

    @property
    def end_of_text(self) -> int:
        return int(self.manifest.made_for["end_of_text"])


def open_corpus(folder: Path) -> TokenCorpus:
    """The finished corpus in `folder`; nothing of it is read but the manifest.

    Raises ConfigError for one that is unfinished or has lost tokens.
    """
    manifest = Manifest.load(folder)
    path, size = folder / TOKENS, manifest.tokens * DTYPE.itemsize
    if not manifest.complete:
        raise ConfigError(
            f"corpus {folder} is unfinished, with {manifest.tokens:,} tokens so far; give the command that began it "
            "again (python -m data.prepare …)"
        )
    held = path.stat().st_size if path.is_file() else 0
    if held != size or size == 0:
        raise ConfigError(
            f"corpus {folder}: {TOKENS} has {held:,} bytes instead of {size:,}; delete the folder and prepare the "
            "corpus again"
        )
    return TokenCorpus(folder, manifest, np.asarray(np.memmap(path, dtype=DTYPE, mode="r")))


def damaged(corpus: TokenCorpus) -> list[int]:
    """Numbers of the shards in tokens.bin that do not match their checksums; all of it is read."""
    found, start = [], 0
    for shard in tqdm(corpus.manifest.shards, desc="checking", unit="shard", disable=None, leave=False):
        stop = start + shard.tokens
        if hashlib.sha256(corpus.tokens[start:stop].tobytes()).hexdigest() != shard.sha256:
            found.append(shard.index)
        start = stop
    return found
