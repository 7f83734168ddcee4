"""Training on a corpus that was tokenised ahead: splits, hashes, bytes, and what does not fit it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train_core
from config import ConfigError, DataConfig
from data import openwebtext
from data import prepare as preparing
from data.batches import TrainingBatches
from data.corpora import CorpusMissing, load_corpus, tokens_folder
from data.openwebtext import Settings, prepare_documents
from data.prepare import prepare, split_tokens, text_bytes
from data.shards import Manifest, open_corpus
from data.tokenizers import Gpt2Tokenizer, train_char
from tests.tiny_train import PRESET, SAYING, flags, here

pytest.importorskip("datasets")
TEXTS = [f"Häng {i}: {SAYING}" for i in range(20)]
CONFIG = DataConfig(corpus="mine", tokenizer="gpt2")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, gpt2: Gpt2Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the corpus `mine` of TEXTS in data/, and the text of the last two in held.txt."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AVATARL_DATA", str(tmp_path / "data"))
    openwebtext.tokenizer_here.cache_clear()
    write("mine", TEXTS)
    (tmp_path / "held.txt").write_text("".join(TEXTS[-2:]), encoding="utf-8")
    return tmp_path


def write(name: str, texts: list[str]) -> None:
    Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert prepare_documents(Settings(name, f"{name}.jsonl", processes=1, shard_characters=500)) == 0


def texts_of(tokens: np.ndarray, gpt2: Gpt2Tokenizer) -> list[str]:
    """The documents of a stream that ends with <|endoftext|>."""
    assert tokens[-1] == 50256
    return gpt2.decode(tokens).split("<|endoftext|>")[:-1]


def test_a_split_falls_between_documents(gpt2: Gpt2Tokenizer) -> None:
    """Catches a document whose first half is trained on and whose second half validates; a lost token between."""
    data = prepare(CONFIG)
    train, val = texts_of(data.train, gpt2), texts_of(data.val, gpt2)
    assert train + val == TEXTS and len(val) == 2
    assert data.val_bytes == sum(len(text.encode()) for text in val)
    assert (data.corpus_name, data.fallback) == ("mine", False)
    assert data.corpus_source == str(tokens_folder("mine"))
    assert data.train.dtype == np.uint16


def test_a_split_inside_the_only_document(gpt2: Gpt2Tokenizer) -> None:
    """Catches an empty validation split where no document begins in it."""
    write("one", [" ".join(TEXTS)])
    data = prepare(replace(CONFIG, corpus="one"))
    assert len(data.val) == pytest.approx(0.1 * (len(data.train) + len(data.val)), abs=1)
    assert gpt2.decode(np.concatenate([data.train, data.val])) == " ".join(TEXTS) + "<|endoftext|>"


def test_nothing_is_read_before_it_is_needed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches 18 GB that are copied into memory, hashed or cached at the start of every run."""
    corpus = open_corpus(home / "data" / "mine")
    tokens = corpus.tokens
    assert isinstance(tokens.base, np.memmap) and not tokens.flags.writeable
    batches = TrainingBatches(tokens, 8, 2, seed=0)
    assert np.shares_memory(batches._windows, tokens)
    for name in ("_encoded", "_kept", "load_corpus"):
        monkeypatch.setattr(preparing, name, None)
    data = prepare(CONFIG)
    origin: Any = data.train
    while not isinstance(origin, np.memmap):
        origin = origin.base  # ends at None, which has none
    assert not (home / "data" / "cache").exists()


def test_halves_for_cross_fitting_meet() -> None:
    """Catches halves that overlap or leave a gap."""
    whole = prepare(CONFIG)
    halves = [prepare(replace(CONFIG, train_stop=0.5)), prepare(replace(CONFIG, train_start=0.5))]
    assert np.array_equal(np.concatenate([half.train for half in halves]), whole.train)
    assert all(np.array_equal(half.val, whole.val) for half in halves)


def test_validation_corpora_of_text_and_of_tokens(gpt2: Gpt2Tokenizer) -> None:
    """Catches a tenth held out although another corpus validates, and bytes of the wrong one."""
    data = prepare(replace(CONFIG, val_corpus="held.txt"))
    assert texts_of(data.train, gpt2) == TEXTS
    assert gpt2.decode(data.val) == "".join(TEXTS[-2:]) and data.val_bytes == len("".join(TEXTS[-2:]).encode())
    write("other", TEXTS[:3])
    data = prepare(replace(CONFIG, val_corpus="other"))
    assert texts_of(data.val, gpt2) == TEXTS[:3] and data.val_bytes == sum(len(t.encode()) for t in TEXTS[:3])


def test_text_validated_on_tokens(gpt2: Gpt2Tokenizer) -> None:
    """Catches a tokenised validation corpus that only a tokenised training corpus finds."""
    data = prepare(DataConfig(corpus="held.txt", val_corpus="mine", tokenizer="gpt2"))
    assert texts_of(data.val, gpt2) == TEXTS and gpt2.decode(data.train) == "".join(TEXTS[-2:])
    with pytest.raises(ConfigError, match="tokens of GPT-2"):
        prepare(DataConfig(corpus="held.txt", val_corpus="mine"))


def test_other_tokens_are_refused() -> None:
    """Catches ids of one vocabulary read with another."""
    for config, tokenizer in ((DataConfig(corpus="mine"), None), (CONFIG, train_char("abc"))):
        with pytest.raises(ConfigError, match=r"--data\.tokenizer gpt2"):
            prepare(config, tokenizer)


def test_found_by_name_and_by_path(home: Path) -> None:
    """Catches a corpus that one way of naming it misses, text that hides behind tokens, and the reverse."""
    folder = home / "data" / "mine"
    assert tokens_folder("mine") == tokens_folder(str(folder)) == folder
    assert tokens_folder("held.txt") is None and tokens_folder("nowhere") is None and tokens_folder(None) is None
    with pytest.raises(CorpusMissing, match="holds tokens"):
        load_corpus("mine")
    (home / "mine").mkdir()
    assert tokens_folder("mine") == folder  # an empty folder hides nothing
    (home / "mine" / "a.txt").write_text("text")
    assert tokens_folder("mine") is None and load_corpus("mine").text == "text"


def test_an_unfinished_corpus_is_not_trained_on(home: Path) -> None:
    """Catches a run on the first half of a corpus."""
    folder = home / "data" / "mine"
    manifest = Manifest.load(folder)
    manifest.complete = False
    manifest.save(folder)
    with pytest.raises(ConfigError, match="unfinished"):
        prepare(CONFIG)


def test_another_text_has_another_hash() -> None:
    """Catches a critic that is taken for one trained on this corpus."""
    write("other", [*TEXTS[:-1], TEXTS[-1] + "!"])
    assert prepare(CONFIG).corpus_sha256 != prepare(replace(CONFIG, corpus="other")).corpus_sha256


@pytest.mark.parametrize("step", [1, 7, 520, 10_000])
def test_stretches_do_not_matter(home: Path, gpt2: Gpt2Tokenizer, step: int) -> None:
    """Catches a last stretch that is forgotten, and a document's start that is looked for in the first one alone."""
    tokens = gpt2.encode_documents(TEXTS)
    assert text_bytes(tokens, gpt2, step) == sum(len(text.encode()) for text in TEXTS)
    corpus = open_corpus(home / "data" / "mine")
    starts = set((np.flatnonzero(tokens == 50256) + 1).tolist())  # without 0, which leaves nothing to train on
    for share in (0.001, 0.1, 0.33, 0.8, 0.999):
        cut = split_tokens(corpus, share, step)
        wanted = int(round(len(tokens) * (1 - share), 6))
        after = [start for start in starts if wanted <= start < len(tokens)]
        assert cut == (min(after) if after else wanted)


def test_a_run_trains_on_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a stream that a part of a run cannot take, from start to report, and a resume that mistakes its hash."""
    monkeypatch.setattr(train_core, "matmul_peak", lambda device, dtype: 1e11)
    words = flags(
        data_corpus="mine",
        data_tokenizer="gpt2",
        eval_ladder=0,
        train_steps=2,
        train_objective="cross-entropy",
        eval_sample_tokens=2,
        run_name="a",
    )
    outcome = here(PRESET, *words)
    assert outcome.code == 0, outcome.err
    record = json.loads((home / "runs" / "a" / "config.json").read_text())
    assert record["corpus"]["sha256"] == open_corpus(home / "data" / "mine").sha256
    assert record["corpus"]["source"] == str(home / "data" / "mine")
    again = here("--resume", "runs/a", "--train.steps", "3")
    assert again.code == 0, again.err
