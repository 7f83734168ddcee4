"""How fast text becomes tokens and tokens become batches: what feeds a GPU, without the GPU.

    python -m experiments.loading
    python -m experiments.loading --corpora tinyshakespeare wikitext-2
    python -m experiments.loading --text FILE_OR_FOLDER        a large text too: one pass, tenth by tenth

Tokenising: GPT-2's tokens on one core, by tiktoken's own call for each document and by gigatoken as data/gpt2_quick.py
uses it, which remembers words: of that the first pass over a text, another one, and one without a cut. All tokens are
compared.
Loading: batches of several shapes from a memory-mapped stream of random tokens, in one thread. Needs a quiet machine.
Writes results/loading/table.md and record.json.
"""

import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from cli import parse, run_main
from config import ConfigError, require
from data.batches import TrainingBatches
from data.corpora import load_corpus
from data.gpt2_quick import QuickEncoder
from data.tokenizers import Gpt2Tokenizer
from experiments.arms import ROOT
from experiments.study import stamp
from experiments.tables import machine
from files import write_atomic, write_json

SHAPES = ((64, 12), (128, 16), (64, 512), (1024, 24), (1024, 480))
KINDS = (".txt", ".md", ".rst")
DOCUMENT = 5000  # characters: about OpenWebText's mean


@dataclass(frozen=True)
class Settings:
    """Tokenising and loading, timed."""

    corpora: tuple[str, ...] = ("tinyshakespeare",)
    """Texts to tokenise, cut into documents."""
    text: tuple[Path, ...] = ()
    """Large texts, each a UTF-8 file or a folder of .txt, .md and .rst: tokenised once, as words become known."""
    seconds: float = 3.0
    """For each measurement, about."""
    tokens: int = 100_000_000
    """Length of the stream that batches are cut from; it is written to a temporary file of twice as many bytes."""
    out: Path = ROOT / "results" / "loading"
    """Folder of the table and the record."""

    def __post_init__(self) -> None:
        require(self.seconds > 0, "seconds", self.seconds, "use a positive time")
        require(self.tokens > 500_000, "tokens", self.tokens, "use more than 500,000, which the largest batch needs")
        require("pydoc" not in self.corpora, "corpora", "pydoc", "it differs between versions of Python; name another")


class Tokenised(NamedTuple):
    """MB of UTF-8 per second of processor time."""

    corpus: str
    megabytes: float
    tiktoken: float
    first: float
    known: float
    uncut: float


class Loaded(NamedTuple):
    """What batches of one shape come at."""

    block_size: int
    batch_size: int
    microseconds: float
    """Of a batch."""
    tokens_per_second: float


def tokenised(name: str, seconds: float) -> Tokenised:
    """One text, all ways. Raises ConfigError where they differ in a token."""
    text, encoding = load_corpus(name).text, Gpt2Tokenizer()._encoding
    documents = [text[i : i + DOCUMENT] for i in range(0, len(text), DOCUMENT)]
    size, expected = len(text.encode()), by_tiktoken(encoding, documents)
    found: dict[str, list[float]] = {name: [] for name in ("tiktoken", "first", "known", "uncut")}
    begin = time.perf_counter()
    while time.perf_counter() - begin < 4 * seconds or len(found["known"]) < 3:  # in turns
        fresh = QuickEncoder(encoding)
        again = partial(by_gigatoken, fresh, documents)
        found["tiktoken"].append(timed(partial(by_tiktoken, encoding, documents), time.process_time))
        found["first"].append(timed(again, time.process_time))
        found["known"].append(timed(again, time.process_time))
        found["uncut"].append(timed(partial(by_gigatoken, fresh, [text]), time.process_time))
        if not np.array_equal(again(), expected):
            raise ConfigError(f"corpora: {name!r} is not tokenised as tiktoken tokenises it")
    return Tokenised(name, size / 1e6, *(size / median(times) / 1e6 for times in found.values()))


def by_tiktoken(encoding: Any, documents: Sequence[str]) -> np.ndarray:
    """Token ids of all documents, each followed by <|endoftext|>, (n,) uint16."""
    parts = [encoding.encode_to_numpy(document, disallowed_special=()) for document in documents]
    return np.concatenate([np.append(part, encoding.eot_token) for part in parts]).astype(np.uint16)


def by_gigatoken(encoder: QuickEncoder, documents: Sequence[str]) -> np.ndarray:
    """The same."""
    parts, end = list[np.ndarray](), np.array([Gpt2Tokenizer.end_of_text], np.uint16)
    for document in documents:
        parts += (encoder.encode(document.encode()), end)
    return np.concatenate(parts)


def gigatoken_version() -> str:
    """Which gigatoken is measured. Raises ConfigError where there is none."""
    try:
        return version("gigatoken")
    except PackageNotFoundError:
        raise ConfigError("gigatoken is what is measured, and not installed; pip install gigatoken") from None


class OnePass(NamedTuple):
    """A large text, tokenised from nothing."""

    name: str
    megabytes: float
    sha256: str
    tiktoken: float
    """MB of UTF-8 per second of processor time, as all below."""
    first: float
    """Of the whole pass."""
    tenths: list[float]


def one_pass(path: Path) -> OnePass:
    """One pass over a text in tenths, each by tiktoken too. Raises ConfigError where they differ in a token."""
    documents, encoding = documents_of(path), Gpt2Tokenizer()._encoding
    encoder, digest = QuickEncoder(encoding), hashlib.sha256()
    sizes, ours, theirs = list[int](), list[float](), list[float]()
    for i in range(10):
        part = documents[i * len(documents) // 10 : (i + 1) * len(documents) // 10]
        data = "".join(part).encode()
        digest.update(data)
        sizes.append(len(data))
        begin = time.process_time()
        found = by_gigatoken(encoder, part)
        ours.append(time.process_time() - begin)
        begin = time.process_time()
        expected = by_tiktoken(encoding, part)
        theirs.append(time.process_time() - begin)
        if not np.array_equal(found, expected):
            raise ConfigError(f"text: {path.name!r} is not tokenised as tiktoken tokenises it")
    tenths = [size / took / 1e6 for size, took in zip(sizes, ours, strict=True)]
    total = sum(sizes) / 1e6
    return OnePass(path.name, total, digest.hexdigest(), total / sum(theirs), total / sum(ours), tenths)


def documents_of(path: Path) -> list[str]:
    """A file or the text files of a folder, cut into documents. Raises ConfigError for what cannot be read or cut."""
    inside = sorted(p for p in path.rglob("*") if p.suffix in KINDS and p.is_file()) if path.is_dir() else [path]
    try:
        texts = [p.read_text(encoding="utf-8") for p in inside]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"text = {str(path)!r}: {error}; name UTF-8 files that exist") from None
    documents = [text[i : i + DOCUMENT] for text in texts for i in range(0, len(text), DOCUMENT)]
    require(
        len(documents) >= 10, "text", str(path), f"use more than {10 * DOCUMENT:,} characters of {', '.join(KINDS)}"
    )
    return documents


def loaded(tokens: np.ndarray, block_size: int, batch_size: int, seconds: float) -> Loaded:
    """Batches of one shape, the epoch's permutation drawn beforehand."""
    batches = TrainingBatches(tokens, block_size, batch_size, seed=0)
    batches.batch(0)
    times, step, begin = [], 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        step += 1
        times.append(timed(partial(batches.batch, step % int(batches.steps_per_epoch))))
    took = median(times)
    return Loaded(block_size, batch_size, took * 1e6, batch_size * block_size / took)


def timed(action: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call."""
    start = clock()
    action()
    return clock() - start


def large_table(large: list[OnePass]) -> list[str]:
    """The part of the page about large texts."""
    if not large:
        return []
    return [
        "One pass over a large text by an encoder that knows no word yet, and how fast each tenth of it went:",
        "",
        "| text | MB | sha256 | tiktoken | gigatoken: whole pass | tenths |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r.name} | {r.megabytes:.1f} | {r.sha256[:12]} | {r.tiktoken:.1f} | **{r.first:.0f}** | "
            f"{', '.join(f'{rate:.0f}' for rate in r.tenths)} |"
            for r in large
        ),
        "",
    ]


def table(made: dict, text: list[Tokenised], large: list[OnePass], batches: list[Loaded], settings: Settings) -> str:
    """The page."""
    lines = [
        "# Tokenising and loading",
        "",
        f"`{made['command']}` on {machine(made)}. Medians; ways to tokenise in turns.",
        "",
        "GPT-2's tokens, MB of text per second of one core's time (of the processor, not the wall), documents of "
        f"{DOCUMENT:,} characters, each followed by its end. gigatoken {made['versions']['gigatoken']} remembers "
        "words: the first pass over a text; another one; one over the text uncut.",
        "",
        "| corpus | MB | tiktoken | gigatoken: first pass | known | known, uncut |",
        "|---|---|---|---|---|---|",
        *(
            "| "
            + " | ".join([r.corpus, f"{r.megabytes:.2f}", f"{r.tiktoken:.1f}", *(f"{rate:.0f}" for rate in r[3:])])
            + " |"
            for r in text
        ),
        "",
        *large_table(large),
        f"Batches (tokens, targets, positions) from {settings.tokens:,} memory-mapped uint16 tokens, one thread, from "
        "the page cache:",
        "",
        "| T | sequences | µs a batch | M tokens/s |",
        "|---|---|---|---|",
        *(
            f"| {r.block_size:,} | {r.batch_size:,} | {r.microseconds:,.0f} | {r.tokens_per_second / 1e6:,.0f} |"
            for r in batches
        ),
    ]
    return "\n".join(lines) + "\n"


def main(words: Sequence[str]) -> int:
    """Measure, write, print; returns the exit code."""
    settings = parse(Settings, words, prog="python -m experiments.loading", description=__doc__ or "")
    # Where a text lies on this machine is nobody's business.
    made = stamp("loading", [Path(word).name if Path(word) in settings.text else word for word in words])
    made["versions"]["gigatoken"] = gigatoken_version()
    large = [one_pass(path) for path in settings.text]
    text = [tokenised(name, settings.seconds) for name in settings.corpora]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        np.random.default_rng(0).integers(50257, size=settings.tokens, dtype=np.uint16).tofile(path)
        stream = np.memmap(path, dtype=np.uint16, mode="r")
        int(stream.sum(dtype=np.int64))  # reads it into the page cache
        batches = [loaded(stream, *shape, settings.seconds) for shape in SHAPES]
        del stream
    settings.out.mkdir(parents=True, exist_ok=True)
    page = table(made, text, large, batches, settings)
    rows = {
        "tokenised": [r._asdict() for r in text],
        "large": [r._asdict() for r in large],
        "loaded": [r._asdict() for r in batches],
    }
    asked = {name: value for name, value in asdict(settings).items() if name != "out"}
    asked["text"] = [path.name for path in settings.text]
    write_json(settings.out / "record.json", made | {"settings": asked} | rows)
    write_atomic(settings.out / "table.md", page)
    print(page)
    return 0


if __name__ == "__main__":
    run_main(main)
