"""setup_server.sh and .ci/run, as far as they can be tried without installing anything, and the pins."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [ROOT / "setup_server.sh", ROOT / ".ci" / "run"]
UNPINNED = {"modal", "flash-attn"}  # constraints.txt says why


def run(*command: str | Path, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def project_name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    """A syntax error in a branch that no machine of ours takes."""
    done = run("bash", "-n", script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script):
    """An unquoted path, a lost exit code, a variable that is never set."""
    beside_python = Path(sys.executable).with_name("shellcheck")
    shellcheck = beside_python if beside_python.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: bash setup_server.sh --dev")
    done = run(shellcheck, script)
    assert done.returncode == 0, done.stdout


def test_help_prints_every_option():
    """An option that was added and never documented; a --help that starts installing."""
    done = run("bash", SCRIPTS[0], "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage:")
    options = set(re.findall(r"^ +(?:-h \| )?(--[a-z-]+)\)", SCRIPTS[0].read_text(), re.MULTILINE))
    assert options >= {"--dev", "--wandb", "--flash-attn", "--help"}
    assert all(f"  {option} " in done.stdout for option in options)


def test_unknown_option_is_refused():
    """A mistyped --dev that installs without the tests' packages and says nothing."""
    done = run("bash", SCRIPTS[0], "--devel")
    assert done.returncode == 2
    assert "unknown option --devel" in done.stderr and "usage:" in done.stderr


@pytest.mark.parametrize(
    "answer, advice",
    [
        ('case "$*" in *ensurepip*) exit 1 ;; *platform*) echo 3.12.4 ;; esac', "install python3.12-venv"),
        ('case "$*" in *platform*) echo 3.9.18 ;; *) exit 1 ;; esac', "needs Python 3.11 or newer"),
        ("exit 127", "found: none"),
    ],
    ids=["without venv", "too old", "none"],
)
def test_unfit_python_is_explained(tmp_path, answer, advice):
    """Debian's Python without venv: a traceback of ensurepip, and half a .venv left behind."""
    checkout, programs = tmp_path / "checkout", tmp_path / "bin"
    checkout.mkdir()
    programs.mkdir()
    for name in ("setup_server.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, checkout)
    for name in ("python3.13", "python3.12", "python3.11", "python3", "python"):
        (programs / name).write_text(f"#!/bin/sh\n{answer}\n")
        (programs / name).chmod(0o755)
    done = run("bash", checkout / "setup_server.sh", env={"PATH": f"{programs}:/usr/bin:/bin"})
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and advice in done.stderr
    assert not (checkout / ".venv").exists()


def test_constraints_pin_what_pyproject_names():
    """A dependency that was added without saying which version was tested."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    named = {project_name(requirement) for group in groups for requirement in group}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert named - pins.keys() == UNPINNED


def test_torch_pin_fits_every_build():
    """A pin to 2.13.0+cpu, the build of the machine that wrote the file: no GPU user could install it."""
    (pin,) = re.findall(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert re.fullmatch(r"\d+\.\d+\.\d+", pin)
