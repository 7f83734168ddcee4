"""A run's folder: never overwritten, complete in what it records, and readable only as what it is."""

import json
import signal
from pathlib import Path

import pytest

from config import Config, ConfigError, override
from data.tokenizers import train_char
from tests.tiny_run import save_tiny_run
from tests.tiny_train import PRESET, before_step, flags, here, same, trained
from training.checkpoint import BrokenCheckpoint
from training.run_folder import (
    append_sample,
    load_run,
    new_run_folder,
    read_config,
    trim_metrics,
    trim_samples,
)

TEXT = "abcdefgh \n"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A run folder with an untrained model."""
    save_tiny_run(tmp_path / "tiny", train_char(TEXT))
    return tmp_path / "tiny"


def rewrite(run: Path, **changes: object) -> None:
    """Change entries of config.json."""
    record = json.loads((run / "config.json").read_text()) | changes
    (run / "config.json").write_text(json.dumps(record))


def test_names_are_never_overwritten(tmp_path):
    """Catches a second run that writes into the first one's folder."""
    out = str(tmp_path / "deep" / "runs")
    names = [new_run_folder(out, "base").name for _ in range(3)]
    assert names == ["base", "base-2", "base-3"]


def test_two_runs_of_one_command(place):
    """Catches a name that is counted up in the folder but not in the record, or the reverse."""
    first = trained("base", train_steps=2)
    before = {p: p.read_bytes() for p in first.rglob("*") if p.is_file()}
    trained("base", train_steps=2)
    assert (place / "runs/base-2/result.json").is_file()
    assert before == {p: p.read_bytes() for p in first.rglob("*") if p.is_file()}


def test_a_folder_that_cannot_be_made(tmp_path):
    """Catches an OSError's traceback, and an endless search for a free name."""
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        with pytest.raises(ConfigError, match=r"run\.out-dir"):
            new_run_folder(str(out), "base")
    (tmp_path / "base").write_text("")
    with pytest.raises(ConfigError, match="a file is in the way"):
        new_run_folder(str(tmp_path), "base")


def test_what_config_json_records(place):
    """Catches a record from which the run could not be repeated: settings, text, versions, machine, command."""
    run = trained("run", train_steps=2, method_top_k=3)
    config, record = read_config(run)
    assert (config.method.top_k, config.train.steps, config.run.name) == (3, 2, "run")
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert record["preset"] == PRESET and "--method.top-k 3" in record["command"]
    assert record["corpus"]["name"] == "corpus.txt" and record["corpus"]["fallback"] is False
    assert len(record["corpus"]["sha256"]) == 64 and record["corpus"]["source"] == str(place / "corpus.txt")
    assert record["versions"].keys() >= {"python", "torch", "numpy"}
    assert len(record["git"].get("commit", "0" * 40)) == 40  # empty outside a repository
    assert record["hardware"]["device"] == "cpu" and record["hardware"]["threads"] == 1
    loaded = load_run(run)
    assert record["vocab_size"] == loaded.tokenizer.vocab_size
    assert record["parameters"] == loaded.model.parameter_count()
    assert loaded.step == 2 and not loaded.model.training


def test_load_run_takes_the_checkpoint_that_was_asked_for(place):
    """Catches `latest` and `best` that give the same weights, and a step that is not the weights' own."""
    run = trained("run", train_checkpoint_every=4)
    (run / "checkpoints/best").write_text("step-000004\n")
    assert load_run(run, "latest").step == 8 and load_run(run, "best").step == 4
    assert not same(load_run(run, "latest").model.state_dict(), load_run(run, "best").model.state_dict())
    named = load_run(run, "step-000008")
    assert named.step == 8 and named.checkpoint.name == "step-000008"


def test_folders_that_are_no_run(tmp_path, tiny):
    """Catches a traceback where a path was mistyped or a record was damaged."""
    with pytest.raises(ConfigError, match="no such run folder"):
        read_config(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"it has no config\.json"):
        read_config(tmp_path)
    config = json.loads((tiny / "config.json").read_text())["config"]
    config["model"]["n_wings"] = 2
    rewrite(tiny, config=config)
    with pytest.raises(ConfigError, match=r"config\.json: model\.n_wings.*no such setting in this version"):
        load_run(tiny)
    for text in ("{", "[]", "{}", '{"config": 3}'):
        (tiny / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"config\.json"):
            load_run(tiny)


def test_a_tokenizer_of_another_run(tiny):
    """Catches text that is decoded by the wrong alphabet: same size, and another size."""
    train_char(TEXT.replace("a", "z")).save(tiny)
    with pytest.raises(ConfigError, match=r"tokenizer\.json.*not the tokenizer that this run was trained with"):
        load_run(tiny)
    other = train_char(TEXT + "xyz")
    other.save(tiny)
    rewrite(tiny, tokenizer=other.fingerprint)
    with pytest.raises(ConfigError, match=r"13: the checkpoint's vocabulary has 10 tokens"):
        load_run(tiny)
    (tiny / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="can't be read"):
        load_run(tiny)


def test_weights_of_another_model(tiny):
    """Catches a state dict that is loaded in part, and torch's page of mismatches."""
    config = override(Config(), model={"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 12})
    rewrite(tiny, config=config.to_dict())
    with pytest.raises(BrokenCheckpoint, match="cannot be loaded") as caught:
        load_run(tiny)
    assert "\n" not in str(caught.value)


def test_metrics_are_trimmed_to_the_step(tmp_path):
    """Catches steps that stand twice after a resume, and a torn last line that spoils the file."""
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps({"step": s, "x": x}) + "\n" for s in (0, 1, 2, 3) for x in "ab")
    path.write_text(whole + '{"step": 4, "x"')
    trim_metrics(path, 9)
    assert path.read_text() == whole
    trim_metrics(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 0, 1, 1, 2, 2]
    trim_metrics(path, -1)
    assert path.read_text() == ""
    trim_metrics(tmp_path / "absent", 2)
    assert not (tmp_path / "absent").exists()


def test_samples_are_trimmed_to_the_step(tmp_path):
    """Catches samples that stand twice after a resume, and text of the model's that is taken for a heading."""
    path = tmp_path / "samples.txt"
    texts = {0: "one\n\ntwo", 5: "=== step by step\nto Rome, === step 3", 10: "end"}
    for step, text in texts.items():
        append_sample(path, step, text)
    whole = path.read_text()
    trim_samples(path, 10)
    assert path.read_text() == whole
    trim_samples(path, 5)
    assert path.read_text() == whole[: whole.index("=== step 10")]
    trim_samples(tmp_path / "absent", 5)


def test_a_stopped_run_can_be_read(place):
    """Catches a folder that only a finished run leaves in order."""
    with before_step(1, lambda job: signal.raise_signal(signal.SIGTERM)):
        here(PRESET, *flags(run_name="stopped", data_corpus="corpus.txt"))
    assert load_run(Path("runs/stopped")).step == 2
    assert (place / "runs/stopped/report.html").is_file()
