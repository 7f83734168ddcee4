"""From documents to tokens on disk, in parallel and in pieces that survive being killed: OpenWebText and the like.

    python -m data.prepare openwebtext                              the 8 M documents, from the Hugging Face Hub
    python -m data.prepare mine --source FOLDER_OR_FILE             .txt, .jsonl or .parquet from this machine
    python -m data.prepare openwebtext --verify                     read it all again and check it

One process reads, all others tokenise shards of consecutive documents, and the reader joins what they finish in
order. Ctrl-C, SIGTERM and SIGKILL cost at most the shards in work; the same command goes on. Source: DESIGN section 5.
"""

import functools
import hashlib
import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from tqdm import tqdm

from cli import parse
from config import ConfigError, require
from data import corpora, shards
from data.documents import Place, Source, Unit, open_source
from data.shards import Manifest, Shard
from data.tokenizers import Gpt2Tokenizer

OPENWEBTEXT = "openwebtext"
OPENWEBTEXT_SOURCE = "Skylion007/openwebtext"
OPENWEBTEXT_DOCUMENTS, OPENWEBTEXT_BYTES = 8_013_769, 39_769_491_688  # as its makers and its data card say
SAMPLE_CHARACTERS = 4_000_000  # tokenised before the start, to predict from
UNCOUNTED = "reading and downloading, which may take longer, not counted"
WAITING = 2  # shards that are read ahead, besides those in work


@dataclass(frozen=True)
class Settings:
    """A corpus of documents, tokenised with GPT-2's tokens."""

    name: Annotated[str, tyro.conf.Positional]
    """Name of the corpus, by which --data.corpus finds it."""
    source: str = ""
    """A folder or file of .txt, .jsonl or .parquet, or a data set of the Hub. Empty: that of openwebtext."""
    out: Path | None = None
    """Folder to write. Unset: $AVATARL_DATA/NAME, or data/NAME of this project."""
    column: str = "text"
    """Which column of .jsonl, .parquet or a data set holds the text."""
    unit: Unit = "file"
    """What a document is in .txt files: the whole file, a paragraph (up to an empty line), or a line."""
    revision: str = ""
    """Branch or commit of a data set of the Hub. Empty: its main one."""
    processes: int = 0
    """Processes that tokenise; 0: one for every core; 1: none besides this one."""
    shard_characters: int = 32_000_000
    """Characters of text from which a shard is closed: what a kill costs each process at most."""
    verify: bool = False
    """Only read the finished corpus and compare it with its checksums."""

    def __post_init__(self) -> None:
        require(
            Path(self.name).name == self.name and self.name not in ("", ".."),
            "name",
            self.name,
            "use a plain folder name such as openwebtext",
        )
        require(self.processes >= 0, "processes", self.processes, "use 0 (every core) or a positive number")
        require(self.shard_characters >= 1, "shard-characters", self.shard_characters, "use a positive number")

    @property
    def folder(self) -> Path:
        """Where the corpus is written."""
        root = os.environ.get("AVATARL_DATA")
        return self.out or (Path(root) if root else corpora.DATA_FOLDER) / self.name

    @property
    def workers(self) -> int:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.processes or usable


class Cut(NamedTuple):
    """Documents that become one shard."""

    number: int
    texts: list[str]
    after: Place


class Prediction(NamedTuple):
    """What is still to be done, from a sample of it."""

    text_bytes: float | None
    tokens: float | None
    bytes_per_second: float
    """Of one process."""
    library: str
    """Which makes the tokens."""


def main(words: Sequence[str]) -> int:
    """Predict, tokenise, join, say what came out; returns the exit code."""
    settings = parse(Settings, words, prog="python -m data.prepare", description=__doc__ or "")
    with stopped_by_sigterm():
        if settings.verify:
            return verify(settings.folder)
        return prepare_documents(settings)


def prepare_documents(settings: Settings) -> int:
    """Make the corpus of `settings`, or the rest of it.

    Raises ConfigError for a source that can't be had, a folder of something else, or a disk without room.
    """
    tokenizer, folder = tokenizer_here(), settings.folder
    if not settings.source and (folder / corpora.MANIFEST).exists() and Manifest.load(folder).complete:
        print(f"{folder} is complete: {summary(Manifest.load(folder))}")
        return 0
    name = settings.source or (OPENWEBTEXT_SOURCE if settings.name == OPENWEBTEXT else "")
    require(bool(name), "source", name, "name a folder, a file or a data set of the Hub with --source")
    source = open_source(name, settings.column, settings.unit, settings.revision or None)
    facts = {
        **source.identity,
        "tokenizer": tokenizer.fingerprint,
        "end_of_text": tokenizer.end_of_text,
        "shard_characters": settings.shard_characters,
    }
    with shards.locked(folder):
        manifest = shards.begin(folder, facts)
        if manifest.complete:
            print(f"{folder} is complete: {summary(manifest)}")
            return 0
        if manifest.shards:
            print(f"continuing    {folder}: {summary(manifest)} are there")
        predicted = predict(settings, source, manifest, tokenizer)
        if predicted is not None:
            check_disk(folder, manifest, predicted)
            print("\n".join(plan(settings, source, manifest, predicted)), flush=True)
        before, start = manifest.text_bytes, time.perf_counter()
        try:
            tokenise(settings, source, manifest, None if predicted is None else predicted.text_bytes)
        except (KeyboardInterrupt, SystemExit):
            print(f"\nstopped with {summary(manifest)} in {folder}; {shards.AGAIN}", flush=True)
            raise
        seconds = time.perf_counter() - start
        if not manifest.shards:
            raise ConfigError(f"source = {source.name!r}: it holds no text")
        manifest.complete = True
        manifest.save(folder)
    done = (manifest.text_bytes - before) / 1e6
    print(f"tokenised     {done:,.1f} MB of text in {seconds:,.1f} s, {done / seconds:,.1f} MB/s")
    print(f"corpus        {folder}: {summary(manifest)}")
    print(f"sha256        {manifest.sha256}")
    found_as = settings.name if settings.out is None else folder
    print(f"train on it   python train.py avatarl-30m --data.corpus {found_as}")
    return 0


def tokenise(settings: Settings, source: Source, manifest: Manifest, total: float | None) -> None:
    """Read, tokenise and join all documents that the manifest lacks; `total` bytes of text are expected."""
    folder, waiting = settings.folder, deque[Future[Shard]]()
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="text", disable=None, leave=False)

    def join_first() -> None:
        shard = waiting.popleft().result()
        shards.join(folder, manifest, shard)
        bar.update(shard.text_bytes)

    with bar, pool(settings.workers) as submit:
        try:
            for cut in cuts(source, manifest, settings.shard_characters):
                shard = shards.finished_shard(folder, cut.number)
                if shard is not None and shard.after == cut.after and shard.documents == len(cut.texts):
                    waiting.append(Future())
                    waiting[-1].set_result(shard)
                else:
                    waiting.append(submit(functools.partial(make_shard, folder, cut)))
                while waiting and (waiting[0].done() or len(waiting) > settings.workers + WAITING):
                    join_first()
            while waiting:
                join_first()
        except BrokenProcessPool:
            raise RuntimeError(
                f"a process that tokenised was killed, perhaps for lack of memory; {shards.AGAIN}, if need be with "
                "fewer --processes or smaller --shard-characters"
            ) from None
        except OSError as error:
            raise RuntimeError(f"{folder} cannot be written ({error.strerror}); make room and {shards.AGAIN}") from None


def cuts(source: Source, manifest: Manifest, shard_characters: int) -> Iterator[Cut]:
    """The documents behind the manifest's last shard, in runs that depend on nothing but the documents."""
    index, texts, size, after = len(manifest.shards), list[str](), 0, manifest.place
    for document in source.read(manifest.place):
        texts.append(document.text)
        size, after = size + len(document.text), document.after
        if size >= shard_characters:
            yield Cut(index, texts, after)
            index, texts, size = index + 1, [], 0
    if texts:
        yield Cut(index, texts, after)


@functools.cache
def tokenizer_here() -> Gpt2Tokenizer:
    """This process's tokenizer."""
    return Gpt2Tokenizer()


def make_shard(folder: Path, cut: Cut) -> Shard:
    """Tokenise a run of documents and store it."""
    data = tokenizer_here().encode_documents(cut.texts).astype(shards.DTYPE, copy=False).tobytes()
    shard = Shard(
        index=cut.number,
        documents=len(cut.texts),
        text_bytes=sum(len(text.encode()) for text in cut.texts),
        tokens=len(data) // shards.DTYPE.itemsize,
        sha256=hashlib.sha256(data).hexdigest(),
        after=cut.after,
    )
    shards.write_shard(folder, shard, data)
    return shard


@contextmanager
def pool(workers: int) -> Iterator[Any]:
    """Gives `submit(job)`, which returns a Future: of `workers` processes, or of this one where that is 1."""

    def here(job: Any) -> Future[Shard]:
        done: Future[Shard] = Future()
        done.set_result(job())
        return done

    if workers == 1:
        yield here
        return
    processes = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=die_with_parent)
    try:
        yield processes.submit
    except BaseException:
        processes.shutdown(wait=False, cancel_futures=True)
        raise
    processes.shutdown()


def die_with_parent() -> None:
    """In a worker: leave signals to the parent, and end when it ends, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Within the block SIGTERM ends the command as Ctrl-C does, with exit code 143."""

    def stop(*_: Any) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def predict(settings: Settings, source: Source, manifest: Manifest, tokenizer: Gpt2Tokenizer) -> Prediction | None:
    """Tokenise the first documents that are left and scale to all of them, where it is known how many there are.

    None where no text is left.
    """
    sample, size = list[str](), 0
    for document in source.read(manifest.place):
        sample.append(document.text[:SAMPLE_CHARACTERS])
        size += len(sample[-1])
        if size >= SAMPLE_CHARACTERS:
            break
    if not size:
        return None
    library = tokenizer.library(size)
    start = time.perf_counter()
    tokens = len(tokenizer.encode_documents(sample))
    seconds = max(time.perf_counter() - start, 1e-9)
    read = sum(len(text.encode()) for text in sample)
    total = source.text_bytes
    if source.name == OPENWEBTEXT_SOURCE and total is None:
        total = OPENWEBTEXT_BYTES
    left = None if total is None else max(total - manifest.text_bytes, read)
    return Prediction(left, None if left is None else left * tokens / max(read, 1), read / seconds, library)


def plan(settings: Settings, source: Source, manifest: Manifest, predicted: Prediction) -> list[str]:
    """What will be made and how long it should take."""
    documents = source.documents
    if documents is None and source.name == OPENWEBTEXT_SOURCE:
        documents = OPENWEBTEXT_DOCUMENTS
    count = "documents" if documents is None else f"{documents - manifest.documents:,} documents"
    rate = f"{settings.workers} x {predicted.bytes_per_second / 1e6:,.1f} MB/s"
    speed = f"{rate} by {predicted.library}, measured on the first of them"
    if predicted.text_bytes is None or predicted.tokens is None:
        return [f"source        {source.name}: {count} of unknown size", f"tokenising    {speed}; {UNCOUNTED}"]
    seconds = predicted.text_bytes / predicted.bytes_per_second / settings.workers
    return [
        f"source        {source.name}: {count}, {predicted.text_bytes / 1e6:,.1f} MB of text",
        f"tokens        about {predicted.tokens / 1e6:,.1f} M, {2 * predicted.tokens / 1e6:,.1f} MB on disk in "
        f"{settings.folder}",
        f"tokenising    about {seconds / 60:,.1f} min: {speed}; {UNCOUNTED}",
    ]


def check_disk(folder: Path, manifest: Manifest, predicted: Prediction) -> None:
    """Raise ConfigError when the disk lacks room for what is predicted."""
    if predicted.tokens is None:
        return
    needed, free = 2 * predicted.tokens, shutil.disk_usage(folder).free
    require(
        needed <= free,
        "out",
        str(folder),
        f"about {needed / 1e9:,.3f} GB are needed and its disk has {free / 1e9:,.3f} GB free; make room, or name "
        "another folder with --out",
    )


def verify(folder: Path) -> int:
    """Compare a finished corpus with its checksums; returns 0 where all match."""
    corpus = shards.open_corpus(folder)
    wrong = shards.damaged(corpus)
    if wrong:
        listed = ", ".join(map(str, islice(wrong, 10)))
        raise RuntimeError(
            f"{folder}: {len(wrong)} of {len(corpus.manifest.shards)} shards do not match their checksums ({listed}); "
            "delete the folder and prepare the corpus again"
        )
    print(f"{folder} is whole: {summary(corpus.manifest)}, sha256 {corpus.sha256}")
    return 0


def summary(manifest: Manifest) -> str:
    """Counts in words."""
    return (
        f"{manifest.documents:,} documents, {manifest.text_bytes:,} bytes of text, {manifest.tokens:,} tokens in "
        f"{len(manifest.shards):,} shards"
    )
