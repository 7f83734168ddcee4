"""Real articles all the way: from a file on this machine to shards, through an interruption, to a run that trains."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken

from data import openwebtext, shards
from data.shards import open_corpus
from data.tokenizers import Gpt2Tokenizer
from tests.tiny_train import Outcome, flags, here, lines


def test_wikitext_from_a_file_to_a_run(
    shared: Path, gpt2: Gpt2Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches what made-up sentences do not have: real punctuation, other scripts, empty lines, long documents."""
    source = shared / "data" / "wikitext-2" / "valid.txt"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AVATARL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    openwebtext.tokenizer_here.cache_clear()
    words = ["wiki", "--source", str(source), "--unit", "line", "--processes", "1", "--shard-characters", "200000"]

    def prepare(*more: str) -> Outcome:
        return here(*words, *more, main=openwebtext.main)

    with monkeypatch.context() as patch:
        join, joined = shards.join, 0

        def interrupted(*rest: Any) -> None:
            nonlocal joined
            join(*rest)
            joined += 1
            if joined == 2:
                raise KeyboardInterrupt

        patch.setattr(shards, "join", interrupted)
        assert prepare().code == 130
    outcome = prepare()
    assert outcome.code == 0 and "in 2 shards are there" in outcome.out, outcome.err
    said = outcome.out.splitlines()
    for begin in ("source  ", "tokens        about", "tokenising    about", "tokenised", "corpus", "sha256"):
        assert any(line.startswith(begin) for line in said), begin  # predicted first, counted last
    assert prepare("--verify").code == 0

    plain = tiktoken.get_encoding("gpt2")
    documents = [line for line in source.read_text(encoding="utf-8").split("\n") if line]
    expected = [token for text in documents for token in (*plain.encode_ordinary(text), 50256)]
    corpus = open_corpus(tmp_path / "data" / "wiki")
    assert corpus.manifest.documents == len(documents) > 2000 and len(corpus.manifest.shards) > 4
    assert np.array_equal(corpus.tokens, np.array(expected, dtype=np.uint16))

    settings = {"run_name": "run", "data_corpus": "wiki", "data_tokenizer": "gpt2", "eval_every": 0, "eval_ladder": 0}
    done = here("pretrain-char", *flags(**settings, train_steps=3, data_val_fraction=0.02, eval_prompt="The"))
    assert done.code == 0, done.err
    assert lines(tmp_path / "runs" / "run")[-1]["val/ce"] < np.log(50257) + 0.1
