"""A run's folder: config.json, tokenizer.json, metrics.jsonl, samples.txt, checkpoints/ (DESIGN section 6).

A folder is never overwritten: a second run of the same name gets -2. `load_run` gives back the model of any
run, for whoever samples, evaluates or exports it.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from config import Config, ConfigError, require
from data.tokenizers import Tokenizer, load_tokenizer
from files import write_atomic
from model import GPT
from training import checkpoint as checkpoints


def new_run_folder(out_dir: str, name: str) -> Path:
    """Create out_dir/name, or name-2, name-3, … where that exists.

    Raises ConfigError where the folder cannot be made.
    """
    number = 1
    while True:
        folder = Path(out_dir) / (name if number == 1 else f"{name}-{number}")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder
        except FileExistsError:
            if not folder.is_dir():
                raise ConfigError(f"run.out-dir = {out_dir!r}: a file is in the way") from None
            number += 1
        except OSError as error:
            raise ConfigError(
                f"run.out-dir = {out_dir!r}: cannot create {folder} ({error.strerror}); use another folder"
            ) from None


def has_checkpoint(folder: Path) -> bool:
    """Whether the run in `folder` got as far as a checkpoint, whole or not, and can be read again."""
    return bool(checkpoints.stored(folder / "checkpoints")) and (folder / "config.json").is_file()


def read_config(folder: Path) -> tuple[Config, dict[str, Any]]:
    """A run's Config, and the whole of its config.json. Raises ConfigError for a folder that is no run."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such run folder; runs are listed by `ls {folder.parent}`")
    if not path.is_file():
        raise ConfigError(f"{folder}: not a run folder, it has no config.json")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Config.from_dict(record["config"]), record
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not readable as a run's configuration ({error})") from None


def trim_metrics(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl past `step`, and a torn last one: the run continues from there."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            break
    write_atomic(path, "".join(kept))


def trim_samples(path: Path, step: int) -> None:
    """Drop the samples taken past `step`."""
    if not path.is_file():
        return
    blocks = re.split(rf"(?m)^(?={SAMPLE_MARK}\d+$)", path.read_text(encoding="utf-8"))
    kept = [b for b in blocks[1:] if int(b.removeprefix(SAMPLE_MARK).split("\n", 1)[0]) <= step]
    write_atomic(path, "".join(kept))


SAMPLE_MARK = "=== step "


def append_sample(path: Path, step: int, text: str) -> None:
    """Append one sample, under a line that says after how many steps it was taken."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{SAMPLE_MARK}{step}\n{text}\n\n")


@dataclass(frozen=True)
class LoadedRun:
    """A run's model, ready to use, in evaluation mode, and where it came from."""

    folder: Path
    config: Config
    record: dict[str, Any]
    tokenizer: Tokenizer
    model: GPT
    step: int
    checkpoint: Path


def load_run(folder: Path, checkpoint: str = "best", device: torch.device | str = "cpu") -> LoadedRun:
    """Load the model of a run folder at "best", "latest" or a named checkpoint.

    Raises ConfigError for a folder that is no run, a tokenizer that isn't the checkpoint's or a checkpoint
    that isn't there, BrokenCheckpoint for one that cannot be read.
    """
    folder = Path(folder)
    config, record = read_config(folder)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    expected = record.get("tokenizer")
    require(
        expected in (None, tokenizer.fingerprint),
        str(folder / "tokenizer.json"),
        tokenizer.fingerprint[:12],
        f"not the tokenizer that this run was trained with ({str(expected)[:12]}); restore the original file",
    )
    place = checkpoints.find(folder / "checkpoints", checkpoint)
    fix = "not readable as a run's configuration (no vocab_size); restore it"
    require(isinstance(record.get("vocab_size"), int), str(folder / "config.json"), record.get("vocab_size"), fix)
    model = GPT(config.model, record["vocab_size"])
    require(
        tokenizer.vocab_size == model.vocab_size,
        str(folder / "tokenizer.json"),
        tokenizer.vocab_size,
        f"the checkpoint's vocabulary has {model.vocab_size} tokens; restore the run's own tokenizer.json",
    )
    checkpoints.load_weights(place, model)
    step = checkpoints.check(place)["state"]["step"]
    return LoadedRun(folder, config, record, tokenizer, model.to(device).eval(), step, place)
