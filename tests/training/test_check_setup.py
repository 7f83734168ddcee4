"""The check at the end of setup_server.sh: what is missing is named, what is there is said."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny_train import ROOT, environment
from training import check_setup
from training.check_setup import gpus, lacking, main


def test_what_is_missing_or_broken_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches a set-up that is called ready without a package, or with one whose library does not load."""
    assert lacking(["numpy", "torch>=2.9"], imported=["numpy", "torch>=2.9"]) == []
    assert lacking(["no-such-package==1.0"], imported=[]) == ["no-such-package is missing"]
    for name in ("halfdone-1.0.dist-info", "halfdone"):
        (tmp_path / name).mkdir()
    (tmp_path / "halfdone-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: halfdone\nVersion: 1\n")
    (tmp_path / "halfdone" / "__init__.py").write_text("raise OSError('libhalf.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    said = ["halfdone cannot be imported (libhalf.so: cannot open shared object file)"]
    assert lacking(["halfdone>=1"], imported=["halfdone>=1"]) == said
    assert lacking(["halfdone>=1"], imported=[]) == []  # an extra is imported where it is used


def test_the_exit_code_tells_the_script(tmp_path, monkeypatch, capsys):
    """Catches a failed check that setup_server.sh takes for a set-up that works."""
    monkeypatch.setattr(check_setup, "REQUIREMENTS", tmp_path / "requirements.txt")
    (tmp_path / "requirements.txt").write_text("numpy\nno-such-package\n")
    assert main(["cpu"]) == 1 and "==> no-such-package is missing" in capsys.readouterr().err
    (tmp_path / "requirements.txt").write_text("numpy\n")
    assert main(["cpu"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line[:18].strip() for line in said] == ["Python", "PyTorch", "GPU", "C++ compiler", "bfloat16"]
    assert torch.__version__ in said[1]


def test_gpus_that_torch_cannot_reach_are_told_apart_from_none(monkeypatch):
    """Catches a GPU box with an old driver that is told it has no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpus(wanted=False)[0] == "none: runs use the CPU"
    assert gpus(wanted=True)[0].startswith("out of reach: this PyTorch ")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "A" if i < 2 else "B")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert gpus(wanted=True) == ("2 x A, 1 x B", False)


def test_it_needs_no_package_to_begin(tmp_path: Path):
    """Catches a check of a half-made .venv that ends in an ImportError of its own."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import training.check_setup"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
