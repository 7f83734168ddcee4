"""export.py: a folder that transformers loads, whole or not at all, never over something else."""

from unittest.mock import patch

import pytest
import torch

from config import ConfigError
from data.tokenizers import train_char
from export import main, new_folder
from tests.tiny_run import STEP, save_tiny_run

TOKENIZER = train_char("\n :EMORe")


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    save_tiny_run(folder, TOKENIZER)
    return folder


@pytest.mark.parametrize("arguments", ["{run} --to hf {out}", "{run} {out} --checkpoint " + STEP])
def test_exported_run_is_the_same_function(run, tmp_path, capsys, arguments):
    """Catches an export of something else than the checkpoint, and one that leaves temporary files."""
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "deep" / "out"
    main(arguments.format(run=run, out=out).split())
    gpt = save_tiny_run(tmp_path / "again", TOKENIZER)
    assert f"{gpt.parameter_count():,} parameters after 500 steps" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    tokens = torch.tensor([transformers.AutoTokenizer.from_pretrained(out).encode("ROMEO:")])
    with torch.no_grad():
        logits = transformers.AutoModelForCausalLM.from_pretrained(out)(tokens).logits
        torch.testing.assert_close(logits, gpt(tokens), atol=1e-4, rtol=0)


def test_nothing_is_overwritten(run, tmp_path):
    """Catches an export over a folder that holds something, over a file, or into one; empty is fine."""
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    file.write_text("mine")
    (full / "mine.txt").write_text("mine")
    for target in (full, file, file / "below"):
        with pytest.raises(ConfigError, match="choose another folder"):
            main([str(run), str(target)])
    assert file.read_text() == "mine" and [path.name for path in full.iterdir()] == ["mine.txt"]
    empty.mkdir()
    with new_folder(empty) as folder:
        (folder / "new").write_text("new")
    assert (empty / "new").read_text() == "new"


def test_model_that_is_no_gpt2_takes_its_code_along(tmp_path, capsys):
    """Catches a folder that transformers can't load, or a user who isn't told how."""
    transformers = pytest.importorskip("transformers")
    gpt = save_tiny_run(tmp_path / "run", TOKENIZER, position="rope", short_conv=3, ngram_embed=3, ngram_rows=16)
    main([str(tmp_path / "run"), str(tmp_path / "out")])
    assert "trust_remote_code=True" in capsys.readouterr().out
    with patch("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")), torch.no_grad():
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
        tokens = torch.tensor([tokenizer.encode("ROMEO:")])
        hf_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
        torch.testing.assert_close(hf_model(tokens).logits, gpt(tokens), atol=1e-4, rtol=0)


def test_failure_leaves_nothing(run, tmp_path, monkeypatch):
    """Catches a half-written export: an error or Ctrl-C while writing."""

    def half(model, tokenizer, folder):
        (folder / "half").write_text("half")
        raise ConfigError("no more")

    monkeypatch.setattr("export.save_hf", half)
    with pytest.raises(ConfigError, match="no more"):
        main([str(run), str(tmp_path / "out")])
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_unknown_format_is_refused(run, tmp_path, capsys):
    """Catches a format that is accepted and ignored."""
    with pytest.raises(SystemExit) as end:
        main([str(run), str(tmp_path / "out"), "--to", "onnx"])
    assert end.value.code == 2 and not (tmp_path / "out").exists()
