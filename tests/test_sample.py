"""sample.py: prompts from everywhere, the same samples however they are asked for, errors in one line."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sample
from config import Config, ConfigError
from data.tokenizers import train_bpe, train_char
from tests.tiny_run import STEP, save_tiny_run

ROOT = Path(__file__).resolve().parent.parent
TEXT = "KING HENRY:\nAy, marry, 'tis so — naïve 😀!\n"
FEW = ["--tokens", "30", "--device", "cpu"]


@pytest.fixture(scope="module", params=["char", "bpe"])
def run(request, tmp_path_factory) -> str:
    """A run folder with an untrained model: wild output, which is the hardest to print."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    save_tiny_run(folder, train_char(TEXT) if request.param == "char" else train_bpe(TEXT, 270))
    return str(folder)


@pytest.fixture(scope="module")
def char_run(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("plain") / "run"
    save_tiny_run(folder, train_char(TEXT))
    return str(folder)


def output(capsys, *arguments: str) -> str:
    capsys.readouterr()
    sample.main([*arguments, *FEW])
    return capsys.readouterr().out


def feed(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_prompt_from_flag_file_and_stdin(run, capsys, monkeypatch, tmp_path):
    """Catches a source that is not read, or changed on the way: the three give one text, prompt first."""
    prompt = "KING: naïve 😀\n"
    if "char" in run:
        prompt = prompt.replace("ï", "a")
    by_flag = output(capsys, run, "--prompt", prompt)
    assert by_flag.startswith(prompt) and len(by_flag) > len(prompt) + 10
    (tmp_path / "prompt.txt").write_bytes(("\ufeff" + prompt.replace("\n", "\r\n")).encode())
    assert output(capsys, run, "--prompt-file", str(tmp_path / "prompt.txt")) == by_flag
    feed(monkeypatch, prompt.encode())
    assert output(capsys, run, "--prompt", "-") == by_flag


def test_default_prompt_is_the_runs_own(char_run, capsys):
    """Catches a default of some other project, with characters this vocabulary may lack."""
    assert output(capsys, char_run) == output(capsys, char_run, "--prompt", Config().eval.prompt)


def test_streaming_changes_nothing(run, capsys):
    """Catches tokens lost, doubled or broken inside a character when they are printed one by one."""
    arguments = [run, "--prompt", "KING", "--num", "3"]
    whole = output(capsys, *arguments)
    assert whole.count("--- sample ") == 3 and "--- sample 3 of 3 ---\nKING" in whole
    assert output(capsys, *arguments, "--stream") == whole


def test_streaming_prints_before_it_ends(char_run, monkeypatch):
    """Catches a stream that waits for the whole sample."""
    lengths: list[int] = []
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(screen, "flush", lambda: lengths.append(len(screen.getvalue())))
    sample.main([char_run, "--prompt", "KING", "--stream", *FEW])
    assert lengths == list(range(4, 35))


def test_sample_number_decides(char_run, capsys, monkeypatch):
    """Catches samples that are alike, or that change with the number asked for or the batch they fall in."""
    many = output(capsys, char_run, "--prompt", "A", "--num", "5").split("--- sample ")
    assert len({text.split("\n", 1)[1] for text in many[1:]}) == 5
    monkeypatch.setattr(sample, "ROWS", 2)
    assert output(capsys, char_run, "--prompt", "A", "--num", "5").split("--- sample ") == many
    assert output(capsys, char_run, "--prompt", "A") == many[1].split("\n", 1)[1]
    assert output(capsys, char_run, "--prompt", "A", "--seed", "8") != output(capsys, char_run, "--prompt", "A")


def test_settings_reach_the_draws(char_run, capsys):
    """Catches a flag that is parsed and dropped."""
    greedy = output(capsys, char_run, "--prompt", "A", "--temperature", "0")
    assert output(capsys, char_run, "--prompt", "A", "--top-k", "1") == greedy
    assert output(capsys, char_run, "--prompt", "A", "--top-p", "1e-9") == greedy
    assert output(capsys, char_run, "--prompt", "A", "--temperature", "3") != greedy
    assert output(capsys, char_run, "--prompt", "A", "--temperature", "0", "--checkpoint", STEP) == greedy


def test_end_of_text_ends_a_sample(tmp_path, capsys):
    """Catches a stop token that is printed, or passed over."""
    import torch
    from safetensors.torch import load_file, save_file

    save_tiny_run(tmp_path / "run", train_bpe(TEXT, 270))
    weights = tmp_path / "run" / "checkpoints" / STEP / "model.safetensors"
    state = load_file(weights)
    state["norm_f.weight"] = torch.zeros(16)
    state["norm_f.bias"] = state["wte.weight"][0] * 1000  # every position predicts token 0
    save_file(state, weights)
    assert output(capsys, str(tmp_path / "run"), "--prompt", "KING") == "KING\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompt", "KING €"], "character '€' at position 5"),
        (["--prompt", ""], "prompt = ''"),
        (["--prompt", "A", "--prompt-file", "x"], "not both"),
        (["--prompt-file", "no-such-file"], "no-such-file can't be read"),
        (["--prompt-file", "."], "can't be read"),
        (["--prompt", "A", "--num", "0"], "num = 0"),
        (["--prompt", "A", "--tokens", "-1"], "tokens = -1"),
        (["--prompt", "A", "--temperature", "-1"], "temperature = -1"),
        (["--prompt", "A", "--top-p", "2"], "top-p = 2"),
        (["--prompt", "A", "--checkpoint", "step-9"], "step-9"),
        (["--prompt", "A", "--device", "tpu"], "device = 'tpu'"),
    ],
    ids=str,
)
def test_bad_requests_are_named(char_run, arguments, says):
    """Catches a bad value that goes through, or fails without its name."""
    with pytest.raises(ConfigError, match=says):
        sample.main([char_run, *arguments])


def test_bad_prompts_in_files_and_pipes(char_run, monkeypatch, tmp_path):
    """Catches a traceback, or an empty sample, for a prompt that is empty, closed or no text."""
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "latin").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ConfigError, match="empty is empty"):
        sample.main([char_run, "--prompt-file", str(tmp_path / "empty")])
    with pytest.raises(ConfigError, match=r"latin is not UTF-8 \(byte 2\)"):
        sample.main([char_run, "--prompt-file", str(tmp_path / "latin")])
    feed(monkeypatch, b"")
    with pytest.raises(ConfigError, match="stdin is empty"):
        sample.main([char_run, "--prompt", "-"])
    monkeypatch.setattr(sys, "stdin", None)  # what Python makes of `<&-`
    with pytest.raises(ConfigError, match="stdin is closed"):
        sample.main([char_run, "--prompt", "-"])


def test_no_run_there(tmp_path):
    """Catches a traceback for a folder that is missing or is no run."""
    with pytest.raises(ConfigError, match="no such run"):
        sample.main([str(tmp_path / "nothing"), "--prompt", "A"])
    with pytest.raises(ConfigError, match="not a run folder"):
        sample.main([str(tmp_path), "--prompt", "A"])


def test_error_as_the_user_sees_it(char_run):
    """Catches a traceback or a wrong exit code at the command line: one line on stderr, exit code 2."""
    done = subprocess.run(
        [sys.executable, "sample.py", char_run, "--prompt", "€"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: character '€'") and done.stderr.count("\n") == 1
