"""Documents to be tokenised, the command that does it in this process, and what has to come of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import openwebtext
from data.tokenizers import Gpt2Tokenizer
from tests.tiny_train import SAYING, here

TEXTS = [f"Document {i}.\n\n" + " ".join(SAYING.split()[: 3 + i % 7]) for i in range(23)]
DONE = {"manifest.json", "tokens.bin"}


def furnished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory whose folder `source` holds TEXTS in three files; corpora are kept below `data`."""
    (tmp_path / "source").mkdir()
    for name, texts in (("a", TEXTS[:9]), ("b", TEXTS[9:10]), ("c", TEXTS[10:])):
        put(tmp_path / "source" / f"{name}.jsonl", texts)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AVATARL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    openwebtext.tokenizer_here.cache_clear()
    return tmp_path


def put(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts), encoding="utf-8")


def make(*words: str, characters: int = 100) -> Any:
    """The command for the corpus `mine`, in this process."""
    size = ["--shard-characters", str(characters)]
    return here("mine", "--source", "source", "--processes", "1", *size, *words, main=openwebtext.main)


def expected(gpt2: Gpt2Tokenizer, texts: list[str] = TEXTS) -> np.ndarray:
    return np.concatenate([np.append(gpt2.encode(text), 50256) for text in texts]).astype(np.uint16)


def made(home: Path) -> np.ndarray:
    return np.fromfile(home / "data" / "mine" / "tokens.bin", dtype=np.uint16)
