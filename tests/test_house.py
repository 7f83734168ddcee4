"""The house rules: nothing runs at import, rooms import only rooms below them, every file says what it is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_train import ROOT, environment, files_below

# Bottom to top (DESIGN section 1); a room imports rooms of the same line or of those above it here.
ROOMS = (
    {"files", "presets", "presets_bootstrap", "checks"},
    {"config_bootstrap", "config_method", "config_model"},
    {"config"},
    {"cli"},
    {"data", "kernels"},
    {"model"},
    {"generation", "modeling_avatarl"},
    {"hf_format"},
    {"avatarl"},
    {"bootstrap"},
    {"training"},
    {"train_core"},
    {"forecasting", "reporting", "sample", "evaluate", "export"},
    {"exploring"},
    {"report"},
    {"one_run"},
    {"critic_runs", "explore"},
    {"launch"},
    {"surgery"},
    {"train", "hybrid", "experiments", "benchmarks", "bench"},
    {"on_modal", "train_modal"},
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
OPTIONAL = {"wandb", "transformers", "tiktoken", "tokenizers", "matplotlib", "flash_attn", "modal", "requests"}
OPTIONAL |= {"pydivsufsort", "datasets", "gigatoken", "stable_baselines3", "gymnasium", "gradio"}
EXPORTED = "modeling_avatarl"  # its classes descend from transformers', so that importing it is using them
OPTIONAL |= {EXPORTED}


def sources() -> list[Path]:
    """Every module of the project, without its tests."""
    rooms = [p for room in LEVEL for p in (ROOT / f"{room}.py", *(ROOT / room).glob("*.py"))]
    return sorted(p for p in rooms if p.is_file())


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> list[str]:
    """First parts of the names that a piece of code imports."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return [name.split(".")[0] for name in names]


def test_every_room_has_its_place():
    """Catches a new file at the top level that no rule covers."""
    found = {p.stem for p in ROOT.glob("*.py")} | {p.parent.name for p in ROOT.glob("*/*.py")}
    assert found - set(LEVEL) - {"tests"} == set()


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_only_rooms_below(path):
    """Catches the first step towards an import cycle, wherever in a file it is taken."""
    above = [n for n in imported(ast.parse(path.read_text())) if LEVEL.get(n, -1) > LEVEL[room_of(path)]]
    assert above == []


@pytest.mark.parametrize("path", [p for p in sources() if p.stem != EXPORTED], ids=lambda p: str(p.relative_to(ROOT)))
def test_optional_libraries_wait_until_they_are_used(path):
    """Catches an import at the top of a file that makes an extra a requirement."""
    top = ast.parse(path.read_text())
    top.body = [node for node in top.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert OPTIONAL & set(imported(top)) == set()


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_open_with_what_they_are(path):
    """Catches a file that grew past reading, and one that starts without a word."""
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "a file opens with a docstring"
    assert text.count("\n") < 400


def test_imports_do_nothing(tmp_path):
    """Catches work at import: a file, a line of output, a thread, a process group, a changed setting of torch."""
    paths = [p for p in sources() if p.stem != EXPORTED]
    modules = sorted({".".join(p.relative_to(ROOT).with_suffix("").parts) for p in paths})
    modules = [name.removesuffix(".__init__") for name in modules]
    script = (
        "import sys, threading, importlib, random, numpy, torch\n"
        "before = torch.get_num_threads(), torch.initial_seed(), torch.is_grad_enabled(), len(sys.argv)\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "assert before == (torch.get_num_threads(), torch.initial_seed(), torch.is_grad_enabled(), len(sys.argv))\n"
        "assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "loaded = {'wandb', 'transformers', 'matplotlib', 'tiktoken', 'modal', 'flash_attn'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", script],
        cwd=tmp_path, env=environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""
    assert files_below(tmp_path) == set()
