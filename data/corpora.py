"""Corpora: where text is looked for, how it is checked, and the two that need no preparation.

A corpus is named by a path (a UTF-8 file, or a folder of .txt files) or by a name. It is looked for as the
path given, as $AVATARL_DATA/<name>, as the project's data/<name>, and only then elsewhere: `tinyshakespeare`
is downloaded once, `pydoc` is the English of Python's own `pydoc_data.topics` and always there (it differs
between Python versions, so nothing is benchmarked on it). A folder may also hold tokens instead of text, such as
those of `openwebtext`; data/shards.py reads those. Source: DESIGN section 5.
"""

import hashlib
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from config import ConfigError, require
from files import write_atomic

DATA_FOLDER = Path(__file__).resolve().parent
TINYSHAKESPEARE = "tinyshakespeare"
TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINYSHAKESPEARE_BYTES = 1_115_394
MANIFEST = "manifest.json"
"""Describes the tokens that a folder holds."""


def cache_folder() -> Path:
    """Where what took time to make is kept for the next run: $AVATARL_CACHE, else data/cache."""
    return Path(os.environ.get("AVATARL_CACHE") or DATA_FOLDER / "cache")


@dataclass(frozen=True)
class Corpus:
    """A text and where it came from."""

    name: str
    """As the user wrote it; loads the same corpus again."""
    text: str = field(repr=False)
    sha256: str
    """Of the text's UTF-8 bytes, in hexadecimal."""
    source: str
    """Path or address it was read from; 'embedded' for pydoc."""
    fallback: bool = False
    """The user named no corpus, tinyshakespeare was not to be had, and this is pydoc."""


class CorpusMissing(ConfigError):
    """A corpus that was found nowhere. The message lists where it was looked for and what to do."""


class DownloadError(RuntimeError):
    """A download that failed, was cut short, or brought something else."""


def load_corpus(name: str | None) -> Corpus:
    """The corpus of that name or path; None: tinyshakespeare, else pydoc with a warning on stderr.

    Raises CorpusMissing when a named corpus can't be had, ConfigError when a text is empty, unreadable or not
    UTF-8. Source: DESIGN section 5.
    """
    if name is not None:
        return _find(name)
    try:
        return _find(TINYSHAKESPEARE)
    except CorpusMissing as missing:
        warn(f"using the embedded corpus pydoc, because none was named and {missing}")
        return replace(_pydoc(), fallback=True)


def tokens_folder(name: str | None) -> Path | None:
    """The folder of that name or path, where what is found first under it are tokens and not text."""
    for path in places(name) if name else ():
        try:
            if (path / MANIFEST).is_file():
                return path
        except OSError as error:  # such as a name that is too long for the file system
            raise ConfigError(f"data.corpus = {name!r}: cannot be looked for ({error.strerror})") from None
        if path.is_file() or (path.is_dir() and any(p.suffix == ".txt" for p in path.iterdir())):
            return None
    return None


def warn(message: str) -> None:
    """Print one visible `warning: …` line to stderr."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _find(name: str) -> Corpus:
    require(name.strip() != "", "data.corpus", name, _advice(name))
    tried = []
    for path in places(name):
        if not os.path.exists(path):
            tried.append(f"{path} is not there")
        elif (path / MANIFEST).is_file():
            tried.append(f"{path} holds tokens of GPT-2 instead of text")
        elif (text := _read(path)) is None:
            tried.append(f"{path} is a folder without .txt files")
        else:
            return _checked(name, text, str(path))
    if name == "pydoc":
        return _pydoc()
    if name == TINYSHAKESPEARE:
        try:
            return _checked(name, *_download_tinyshakespeare())
        except DownloadError as error:
            tried.append(str(error))
    raise CorpusMissing(f"corpus {name!r} was not found ({'; '.join(tried)}); {_advice(name)}")


def places(name: str) -> list[Path]:
    """Where a corpus of that name or path is looked for, in order."""
    path = Path(os.path.abspath(os.path.expanduser(name)))
    if Path(name).name != name or name == "..":  # a path says where it is; only a bare name is looked up
        return [path]
    root = os.environ.get("AVATARL_DATA")
    return [path, *([Path(root) / name] if root else []), DATA_FOLDER / name]


def _advice(name: str) -> str:
    if name == TINYSHAKESPEARE:
        return (
            f"connect to the network once, or save that file as {DATA_FOLDER / name / 'input.txt'}, "
            "or use --data.corpus pydoc, which is always there"
        )
    if name == "openwebtext":
        return "make it with python -m data.prepare openwebtext, or put its text there as .txt files"
    return "use tinyshakespeare, pydoc, or the path of a UTF-8 text file or of a folder of .txt files"


def _read(path: Path) -> str | None:
    """Text of a file, or of a folder's input.txt or else all its .txt files in order; None if it has none."""
    try:
        if not path.is_dir():
            text = _decoded(path)
        elif (path / "input.txt").is_file():
            text = _decoded(path / "input.txt")
        else:
            parts = sorted(p for p in path.iterdir() if p.suffix == ".txt" and p.is_file())
            if not parts:
                return None
            text = "".join(map(_decoded, parts))
    except OSError as error:
        raise ConfigError(f"corpus {error.filename or path} can't be read: {error.strerror}") from None
    if not text:
        raise ConfigError(f"corpus {path} is empty; give it some text, or name another with --data.corpus")
    return text


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"corpus {path} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}; "
            "convert it, for example with iconv -t UTF-8"
        ) from None


def _checked(name: str, text: str, source: str) -> Corpus:
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    if name == TINYSHAKESPEARE and sha256 != TINYSHAKESPEARE_SHA256:
        warn(
            f"{source} is not the published tinyshakespeare and is used as it is: its sha256 is {sha256}, "
            f"not {TINYSHAKESPEARE_SHA256}"
        )
    return Corpus(name, text, sha256, source)


def _pydoc() -> Corpus:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ConfigError(
            "corpus 'pydoc': this Python comes without pydoc_data; name a text file with --data.corpus"
        ) from None
    return _checked("pydoc", "\n".join(topics[key] for key in sorted(topics)), "embedded")


def _download_tinyshakespeare() -> tuple[str, str]:
    """Its text and where that now is: the project's data folder, or memory where that can't be written."""
    content = _fetch(TINYSHAKESPEARE_URL, TINYSHAKESPEARE_BYTES)
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != TINYSHAKESPEARE_SHA256:
        raise DownloadError(
            f"{TINYSHAKESPEARE_URL} brought {len(content)} bytes with sha256 {sha256} instead of "
            f"{TINYSHAKESPEARE_SHA256}, perhaps a page of a proxy"
        )
    path = DATA_FOLDER / TINYSHAKESPEARE / "input.txt"
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, content)
    except OSError as error:
        warn(f"{path} can't be written ({error.strerror}), so tinyshakespeare is kept in memory only")
        return content.decode(), TINYSHAKESPEARE_URL
    return content.decode(), str(path)


def _fetch(url: str, size: int) -> bytes:
    """The bytes at `url`, with a progress bar over the expected `size`; one try. Raises DownloadError."""
    try:
        import requests
        from tqdm import tqdm
    except ImportError as error:
        raise DownloadError(f"downloading needs a missing library; pip install {error.name}") from None
    content = bytearray()
    seconds = (5, 15)  # to connect, of silence
    try:
        with (
            requests.get(url, stream=True, timeout=seconds) as response,
            tqdm(total=size, unit="B", unit_scale=True, desc="download", disable=None, leave=False) as bar,
        ):
            response.raise_for_status()
            for chunk in response.iter_content(1 << 16):
                content += chunk
                bar.update(len(chunk))
    except requests.ConnectionError:
        raise DownloadError(f"{url} can't be reached") from None
    except OSError as error:  # every exception of requests, and certificates that are not there
        raise DownloadError(f"{url} could not be downloaded ({error})") from None
    return bytes(content)
