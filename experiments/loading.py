"""How fast text becomes tokens and tokens become batches: what feeds a GPU, without the GPU.

    python -m experiments.loading
    python -m experiments.loading --corpora tinyshakespeare wikitext-2
    python -m experiments.loading --text FILE_OR_FOLDER        a large text too: one pass, tenth by tenth

Tokenising: GPT-2's tokens on one core, by tiktoken's own call for each document and by data/gpt2_words.py, which
remembers words; of that the first pass over a text, a second half after its first half, and a text that it knows.
Loading: batches of several shapes from a memory-mapped stream of random tokens, in one thread. Needs a quiet machine.
Writes results/loading/table.md and record.json.
"""

import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from cli import parse, run_main
from config import ConfigError, require
from data.batches import TrainingBatches
from data.corpora import load_corpus
from data.gpt2_words import WordEncoder
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
    second_half: float
    known: float


class Loaded(NamedTuple):
    """What batches of one shape come at."""

    block_size: int
    batch_size: int
    microseconds: float
    """Of a batch."""
    tokens_per_second: float


def tokenised(name: str, seconds: float) -> Tokenised:
    """One text, all ways. Raises ConfigError where they differ in a token."""
    text, tokenizer = load_corpus(name).text, Gpt2Tokenizer()
    documents = [text[i : i + DOCUMENT] for i in range(0, len(text), DOCUMENT)]
    half = len(documents) // 2
    size, later = len(text.encode()), len("".join(documents[half:]).encode())
    encoding, end = tokenizer._encoding, tokenizer.vocab_size - 1

    def plain() -> np.ndarray:
        parts = [encoding.encode_to_numpy(document, disallowed_special=()) for document in documents]
        return np.concatenate([np.append(part, end) for part in parts])

    expected = plain()
    found: dict[str, list[float]] = {name: [] for name in ("tiktoken", "first", "second", "known")}
    begin = time.perf_counter()
    while time.perf_counter() - begin < 4 * seconds or len(found["known"]) < 3:  # in turns
        fresh, halves = WordEncoder(encoding), WordEncoder(encoding)
        halves.encode_documents(documents[:half], end)
        found["tiktoken"].append(timed(plain, time.process_time))
        found["first"].append(timed(partial(fresh.encode_documents, documents, end), time.process_time))
        found["second"].append(timed(partial(halves.encode_documents, documents[half:], end), time.process_time))
        found["known"].append(timed(partial(fresh.encode_documents, documents, end), time.process_time))
        if not np.array_equal(fresh.encode_documents(documents, end), expected):
            raise ConfigError(f"corpora: {name!r} is not tokenised as tiktoken tokenises it")
    took = {kind: median(times) for kind, times in found.items()}
    sizes = {"tiktoken": size, "first": size, "second": later, "known": size}
    return Tokenised(name, size / 1e6, *(sizes[kind] / took[kind] / 1e6 for kind in found))


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
    words: int
    """Remembered at the end."""


def one_pass(path: Path) -> OnePass:
    """One pass over a text in tenths, each by tiktoken too. Raises ConfigError where they differ in a token."""
    documents = documents_of(path)
    encoding, end = Gpt2Tokenizer()._encoding, Gpt2Tokenizer().vocab_size - 1
    words, digest = WordEncoder(encoding), hashlib.sha256()
    sizes, ours, theirs = list[int](), list[float](), list[float]()
    for i in range(10):
        part = documents[i * len(documents) // 10 : (i + 1) * len(documents) // 10]
        data = "".join(part).encode()
        digest.update(data)
        sizes.append(len(data))
        begin = time.process_time()
        found = words.encode_documents(part, end)
        ours.append(time.process_time() - begin)
        begin = time.process_time()
        parts = [encoding.encode_to_numpy(document, disallowed_special=()) for document in part]
        theirs.append(time.process_time() - begin)
        if not np.array_equal(found, np.concatenate([np.append(tokens, end) for tokens in parts])):
            raise ConfigError(f"text: {path.name!r} is not tokenised as tiktoken tokenises it")
    tenths = [size / took / 1e6 for size, took in zip(sizes, ours, strict=True)]
    total = sum(sizes) / 1e6
    known = len(words._spaced)
    return OnePass(path.name, total, digest.hexdigest(), total / sum(theirs), total / sum(ours), tenths, known)


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
        "| text | MB | sha256 | tiktoken | whole pass | tenths | words remembered |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {r.name} | {r.megabytes:.1f} | {r.sha256[:12]} | {r.tiktoken:.1f} | **{r.first:.1f}** | "
            f"{', '.join(f'{rate:.1f}' for rate in r.tenths)} | {r.words:,} |"
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
        f"{DOCUMENT:,} characters. Words remembered: the first pass over a text; its second half after its first; a "
        "text that is known already.",
        "",
        "| corpus | MB | tiktoken | words remembered: first pass | second half | known |",
        "|---|---|---|---|---|---|",
        *("| " + " | ".join([r.corpus, f"{r.megabytes:.2f}", *(f"{rate:.1f}" for rate in r[2:])]) + " |" for r in text),
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
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
    asked["text"] = [path.name for path in settings.text]
    write_json(settings.out / "record.json", made | {"settings": asked} | rows)
    write_atomic(settings.out / "table.md", page)
    print(page)
    return 0


if __name__ == "__main__":
    run_main(main)
