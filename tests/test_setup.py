"""setup_server.sh and .ci/run, as far as they can be tried without installing anything, and the pins."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [ROOT / "setup_server.sh", ROOT / ".ci" / "run"]
UNPINNED = {"flash-attn"}  # constraints.txt says why


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
    assert options >= {"--dev", "--wandb", "--modal", "--extras", "--flash-attn", "--no-smoke", "--help"}
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


# ---- a machine that only pretends: its Python notes what it is asked to install, and says what torch it then has

FAKE_PYTHON = """
import json, os, sys  # and nothing else: it is started hundreds of times

words = sys.argv[1:]
with open(os.environ["FAKE_STATE"]) as file:
    facts = json.load(file)


def note(*line):
    facts["log"].append(list(line))
    with open(os.environ["FAKE_STATE"], "w") as file:
        json.dump(facts, file)


def end(condition):
    sys.exit(0 if condition else 1)


torch, code = facts["torch"], words[1] if words[:1] == ["-c"] else ""
if words[:2] == ["-m", "venv"]:
    os.makedirs(words[2] + "/bin")
    for name in ("python", "torchrun"):
        os.symlink(os.environ["FAKE_PROGRAM"], words[2] + "/bin/" + name)
elif words[:3] == ["-m", "pip", "install"]:
    index = words[words.index("--index-url") + 1].rpartition("/")[2] if "--index-url" in words else "default"
    wanted = [w.partition("==")[2] for w in words if w.startswith("torch==")]
    note("pip", words[3])
    note("install", index, *[w for w in words if "==" in w or w == "flash-attn"])
    if "--no-index" in words or index in facts["missing"] or "flash-attn" in words:
        sys.exit(1)
    if wanted:
        facts["torch"] = wanted[0] + {"cpu": "+cpu", "default": "+cu130"}.get(index, "+" + index)
        note("has", facts["torch"])
elif words[:2] == ["-m", "compileall"]:
    note("compiled", words[-1])
elif words[:2] == ["-m", "training.check_setup"]:
    end(torch != "none")
elif words[:1] == ["-"]:
    sys.argv = words
    exec(sys.stdin.read())
elif 'version("torch")' in code:
    print(torch)
elif "python_version" in code:
    print("3.11.9")
elif "major <=" in code:
    major = int(torch.partition("+cu")[2][:2] or 0) if "+cu" in torch else 0
    asked = code.split("int('")[1].split("'")[0]
    end("'cpu' == 'cpu'" in code or (major and major <= int(asked or major)))
elif "device_count" in code:
    count = facts["gpus"] if "+cu" in torch else 0
    print(max([n for n in range(1, count + 1) if 64 % n == 0], default=1), count)
elif "load_corpus" in code:
    note("data")
elif "flash_attn" in code:
    sys.exit(1)
elif "train.py" in words:
    note("smoke", os.path.basename(sys.argv[0]), *words)
    print("step 5", *words)
    sys.exit(facts.get("smoke", 0))
"""


class Machine:
    """A checkout on a machine with these GPUs, driver and torch builds; `state` holds what its Python was asked."""

    def __init__(self, folder: Path, *, gpus: int = 0, smi: str = "", missing: tuple[str, ...] = (), **facts) -> None:
        self.checkout, self.programs, self.state = folder / "checkout", folder / "bin", folder / "state.json"
        self.checkout.mkdir()
        self.programs.mkdir()
        (folder / "pci").mkdir()
        for name in ("setup_server.sh", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.checkout)
        start = {"log": [], "torch": "none", "gpus": gpus, "missing": missing} | facts
        self.state.write_text(json.dumps(start))
        for name in ("python3.13", "python3.12", "python3.11", "python3", "python"):
            self.program(name, f"#!{sys.executable} -IS\n{FAKE_PYTHON}")
        if smi:
            listing = "".join(f"GPU {i}: NVIDIA H100\\n" for i in range(gpus))
            self.program("nvidia-smi", f"#!/bin/sh\n[ \"$1\" = -L ] && printf '{listing}' || echo '{smi}'\n")
        self.environment = {
            "PATH": f"{self.programs}:/usr/bin:/bin",
            "FAKE_STATE": str(self.state),
            "FAKE_PROGRAM": str(self.programs / "python"),
            "PCI_DEVICES": str(folder / "pci"),
        }

    def program(self, name: str, text: str) -> None:
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def setup(self, *options: str, code: int = 0) -> str:
        """Run the script; what it said. The log then holds what was asked in this call only."""
        self.change(log=[])
        done = run("bash", self.checkout / "setup_server.sh", *options, env=self.environment)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def change(self, **facts) -> None:
        self.state.write_text(json.dumps(json.loads(self.state.read_text()) | facts))

    def log(self, kind: str) -> list[list[str]]:
        return [line[1:] for line in json.loads(self.state.read_text())["log"] if line[0] == kind]


OLD_SMI = "| NVIDIA-SMI 550.54.15   Driver Version: 550.54.15   CUDA Version: 12.4 |"
NEW_SMI = "| NVIDIA-SMI 590.44.01   KMD Version: 590.44.01   CUDA UMD Version: 13.1 |"
ANCIENT_SMI = "| NVIDIA-SMI 470.82   Driver Version: 470.82   CUDA Version: 11.4 |"


def test_a_cpu_machine_gets_the_small_build_and_tries_it(tmp_path):
    """Gigabytes of CUDA on a laptop; a set-up that is called ready and cannot train."""
    machine = Machine(tmp_path)
    said = machine.setup()
    assert machine.log("has") == [["2.13.0+cpu"]]
    ((program, script, *words),) = machine.log("smoke")
    assert (program, script) == ("python", "train.py") and words[words.index("--train.steps") + 1] == "5"
    assert machine.log("data") == [[]] and "next: .venv/bin/python train.py" in said


def test_packages_are_compiled_on_all_cores(tmp_path):
    """Catches a minute of one core inside pip, and packages that every process compiles anew."""
    machine = Machine(tmp_path)
    machine.setup()
    kinds = [line[0] for line in json.loads(machine.state.read_text())["log"]]
    assert kinds[-3:] == ["compiled", "data", "smoke"] and machine.log("compiled") == [[".venv/lib"]]
    assert len(machine.log("pip")) > 1 and all(first == ["--no-compile"] for first in machine.log("pip"))


def test_a_second_call_does_nothing(tmp_path):
    """Everything installed and tried again at every call, and GPUs kept busy by it."""
    machine = Machine(tmp_path, gpus=2, smi=NEW_SMI)
    machine.setup()
    said = machine.setup()
    assert "in place already" in said and json.loads(machine.state.read_text())["log"] == []


def test_a_current_driver_gets_the_default_build_on_all_gpus(tmp_path):
    """The CPU build beside eight GPUs, and a launch line for one of them."""
    machine = Machine(tmp_path, gpus=8, smi=NEW_SMI)
    said = machine.setup()
    assert "8 NVIDIA GPU(s), driver 590.44.01, CUDA up to 13.1" in said
    assert machine.log("has") == [["2.13.0+cu130"]]
    assert "next: .venv/bin/torchrun --standalone --nproc_per_node=8 train.py" in said
    ((program, *words),) = machine.log("smoke")
    assert program == "torchrun" and words[words.index("--train.batch-size") + 1] == "32"


def test_an_older_driver_gets_a_build_that_it_runs(tmp_path):
    """A build for CUDA 13 on a driver for 12: torch then sees no GPU."""
    machine = Machine(tmp_path, gpus=1, smi=OLD_SMI)
    assert "driver 550.54.15, CUDA up to 12.4" in machine.setup()
    assert machine.log("has") == [["2.13.0+cu126"]]
    other = tmp_path / "other"
    other.mkdir()
    machine = Machine(other, gpus=1, smi=OLD_SMI, missing=("cu126",))
    machine.setup()
    assert machine.log("has") == [["2.13.0+cu128"]]
    machine.change(torch="2.13.0+cu130")
    (machine.checkout / ".venv" / "setup-state").unlink()
    machine.setup()
    assert machine.log("has") == [["2.13.0+cu128"]]


def test_without_an_older_build_the_default_one_is_taken_and_said(tmp_path):
    """A set-up that ends, or one that installs gigabytes again at every call, where no build suits the driver."""
    machine = Machine(tmp_path, gpus=1, smi=OLD_SMI, missing=("cu126", "cu128", "cu129"))
    said = machine.setup()
    assert "may want a newer one" in said and machine.log("has") == [["2.13.0+cu130"]]
    machine.setup()
    assert machine.log("install") == []


def test_a_driver_that_is_too_old_or_missing_is_named(tmp_path):
    """A GPU box that silently trains on its CPU."""
    machine = Machine(tmp_path, gpus=1, smi=ANCIENT_SMI)
    said = machine.setup()
    assert "too old for this PyTorch" in said and machine.log("has") == [["2.13.0+cpu"]]
    other = tmp_path / "other"
    other.mkdir()
    machine = Machine(other)
    card = other / "pci" / "0000:17:00.0"
    card.mkdir()
    (card / "vendor").write_text("0x10de\n")
    (card / "class").write_text("0x030200\n")
    assert "an NVIDIA GPU, but no driver that works: install it" in machine.setup()


def test_gpus_that_do_not_share_the_batch_are_left_out_aloud(tmp_path):
    """A launch line that ends in an error about the batch size."""
    said = Machine(tmp_path, gpus=3, smi=NEW_SMI).setup()
    assert "2 of 3 GPUs" in said and "--nproc_per_node=2" in said


def test_flash_attn_that_fails_leaves_a_set_up_that_works(tmp_path):
    """A compiler's failure that takes the whole set-up with it."""
    machine = Machine(tmp_path, gpus=1, smi=NEW_SMI)
    said = machine.setup("--flash-attn")
    assert "flash-attn could not be installed: left out; attention is PyTorch's SDPA, and all works" in said
    assert ["default", "flash-attn"] in machine.log("install") and "next: .venv/bin/python train.py" in said
    assert len(machine.log("smoke")) == 1


def test_a_smoke_run_that_fails_is_shown_and_tried_again(tmp_path):
    """A machine that cannot train and is called ready, and one that is never tried again after a repair."""
    machine = Machine(tmp_path, smoke=1)
    said = machine.setup(code=1)
    assert "training does not work" in said and "step 5" in said
    machine.change(smoke=0)
    assert "in place already" in machine.setup()
    assert len(machine.log("smoke")) == 1
    other = tmp_path / "other"
    other.mkdir()
    machine = Machine(other, smoke=1)
    machine.setup("--no-smoke")
    assert machine.log("smoke") == [] == machine.log("data")


def test_extras_add_up(tmp_path):
    """An extra that is read and not installed, and one that a later call takes away."""
    machine = Machine(tmp_path)
    machine.setup("--extras", "wandb,hf")
    wanted = (machine.checkout / ".venv" / "setup-requirements.txt").read_text().split()
    assert {"wandb", "transformers", "numpy"} <= set(wanted) and "modal" not in wanted
    machine.setup("--modal")
    wanted = (machine.checkout / ".venv" / "setup-requirements.txt").read_text().split()
    assert {"wandb", "transformers", "modal"} <= set(wanted)
    assert "torch==2.13.0+cpu" in (machine.checkout / ".venv" / "setup-constraints.txt").read_text()


@pytest.mark.parametrize("words", [("--extras", "wandb,none"), ("--extras",), ("--extras=gpu",)])
def test_unknown_extras_are_refused(tmp_path, words):
    """A mistyped extra that is found out after gigabytes of torch."""
    machine = Machine(tmp_path)
    said = machine.setup(*words, code=2)
    assert "there are wandb, hf, modal" in said and not (machine.checkout / ".venv").exists()


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
