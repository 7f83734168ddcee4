"""Documents one after the other, through the library `datasets`: from its Hub, or from files on this machine.

Nothing is downloaded as a whole: documents stream from the files in order, and a place in them (which file, which
row) can be returned to. Source: DESIGN section 5.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from config import ConfigError

READERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""What reads the files of a folder."""
CONVERTED = "refs/convert/parquet"
"""Where the Hub keeps the files of a data set that would need a script."""
ROWS = 256  # read at a time
TEXTS = {"string", "large_string", "string_view", "null"}
"""Arrow's types of columns that hold text, or nothing."""

Unit = Literal["file", "paragraph", "line"]


class Place(NamedTuple):
    """A position between two documents."""

    file: int
    row: int


START = Place(0, 0)


class Document(NamedTuple):
    """A text and the place behind it."""

    text: str
    after: Place


@dataclass(frozen=True)
class Source:
    """Where documents come from."""

    name: str
    identity: dict[str, Any]
    """Facts, as JSON knows them, that change when the documents do."""
    text_bytes: int | None
    """UTF-8 bytes of all documents; None where only reading would tell."""
    documents: int | None
    column: str
    stream: Any = field(repr=False)
    """The data set, streaming."""

    def read(self, place: Place) -> Iterator[Document]:
        """All documents from `place` on; empty ones are left out.

        Raises ConfigError for a missing column or files that are not UTF-8, RuntimeError when the source fails.
        """
        files = self.stream.num_shards
        for file in range(place.file, files):
            row = place.row if file == place.file else 0
            rows = self.stream.shard(num_shards=files, index=file)
            for text in self._texts(rows.skip(row) if row else rows):
                row += 1
                if text:
                    yield Document(text, Place(file, row))

    def _texts(self, rows: Any) -> Iterator[str]:
        try:
            for batch in rows.with_format("arrow").iter(batch_size=ROWS):
                if self.column not in batch.column_names:
                    raise ConfigError(
                        f"column = {self.column!r}: {self.name} has {', '.join(batch.column_names)}; name the one "
                        "that holds the text"
                    )
                texts = batch.column(self.column)
                if str(texts.type) not in TEXTS:
                    raise ConfigError(f"column = {self.column!r}: {self.name} has {texts.type} there, not text")
                yield from texts.to_pylist()
        except ConfigError:
            raise
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.name} holds a file that is not UTF-8 ({error}); convert it") from None
        except Exception as error:  # whatever the network, a disk or a parser raises comes through the library
            raise RuntimeError(
                f"{self.name} can't be read on ({type(error).__name__}: {error}); give the same command again: it "
                "continues where it stopped"
            ) from error


def open_source(name: str, column: str, unit: Unit, revision: str | None = None) -> Source:
    """A file, a folder of .txt, .jsonl, .json or .parquet files, or a data set of the Hub by its name.

    unit: what a document is in .txt files. Raises ConfigError when it can't be had.
    """
    datasets = _datasets()
    path = Path(name).expanduser()
    if path.exists():
        return _local(datasets, path.resolve(), column, unit)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"source = {name!r}: there is no such file or folder")
    return _from_hub(datasets, name, column, revision)


def _local(datasets: Any, path: Path, column: str, unit: Unit) -> Source:
    below = path.rglob("*") if path.is_dir() else [path]
    files = sorted(file for file in below if file == path or (file.suffix in READERS and file.is_file()))
    kinds = {READERS.get(file.suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        found = "no file that is" if not files or None in kinds else "files of several kinds;"
        raise ConfigError(f"source = {str(path)!r}: {found} .txt, .jsonl, .json or .parquet; name files of one kind")
    kind = str(kinds.pop())
    options = {"sample_by": {"file": "document"}.get(unit, unit)} if kind == "text" else {}
    names = [str(file) for file in files]
    stream = datasets.load_dataset(kind, data_files={"train": names}, split="train", streaming=True, **options)
    base = path if path.is_dir() else path.parent
    sizes = [(str(file.relative_to(base)), file.stat().st_size) for file in files]
    return Source(
        name=str(path),
        identity={
            "files": len(files),
            "files' names and sizes": hashlib.sha256(repr(sizes).encode()).hexdigest(),
            "column": "text" if kind == "text" else column,
            "unit": unit if kind == "text" else "row",
        },
        text_bytes=sum(size for _, size in sizes) if kind == "text" else None,
        documents=len(files) if kind == "text" and unit == "file" else None,
        column="text" if kind == "text" else column,
        stream=stream,
    )


def _from_hub(datasets: Any, name: str, column: str, revision: str | None) -> Source:
    def load(revision: str | None) -> Any:
        return datasets.load_dataset(name, split="train", streaming=True, revision=revision)

    try:
        try:
            stream = load(revision)
        except RuntimeError as error:
            if revision is not None or "scripts" not in str(error):
                raise
            revision = CONVERTED
            stream = load(revision)
    except Exception as error:  # of the network, the Hub and the library, each with its own kinds
        raise ConfigError(
            f"source = {name!r}: {' '.join(str(error).split())}; connect to the network, or name a folder or file "
            "of .txt, .jsonl or .parquet with --source"
        ) from None
    split = (stream.info.splits or {}).get("train")
    facts = {"data set": name, "revision": revision or "main", "files": stream.num_shards, "column": column}
    facts["commit"] = _commit(name, revision)
    rows = split.num_examples if split is not None else None
    return Source(name, facts, split.num_bytes if split is not None else None, rows, column, stream)


def _commit(name: str, revision: str | None) -> str | None:
    """The commit that a revision stands for now: one that moves between two attempts is another source."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, revision=revision).sha
    except Exception:  # the library has read the data set already; its Hub may refuse to describe it
        return None


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError("preparing a corpus of documents needs datasets; pip install datasets") from None
    return datasets
