"""Whether .venv has what pyproject.toml asks for, and what this machine then trains with. setup_server.sh runs it:

    .venv/bin/python -m training.check_setup cuda      a GPU was found; `cpu` where there is none

Ends with code 1 and a line that names what is missing or cannot be imported. Until that is known it uses nothing but
the standard library, so it reads no command line through cli.py.
"""

import importlib
import os
import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / ".venv" / "setup-requirements.txt"  # what setup_server.sh asked pip for, one a line


def lacking(requirements: Sequence[str], imported: Sequence[str]) -> list[str]:
    """What is wrong with each requirement that is not installed or, if it is also among `imported`, not importable."""
    broken = []
    for requirement in requirements:
        found = re.match(r"[\w.-]+", requirement)
        name = found[0] if found else requirement
        try:
            version(name)
            if requirement in imported:
                importlib.import_module(name)
        except PackageNotFoundError:
            broken.append(f"{name} is missing")
        except Exception as error:  # whatever a package raises at import
            broken.append(f"{name} cannot be imported ({error})")
    return broken


def gpus(wanted: bool) -> tuple[str, bool]:
    """The GPUs that PyTorch reaches, in words, and whether they multiply bfloat16; `wanted`: some were found here."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        counted = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        return counted, torch.cuda.get_device_capability() >= (8, 0)
    cpu = Path("/proc/cpuinfo")
    bf16 = cpu.exists() and re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", cpu.read_text()) is not None
    if not wanted:
        return "none: runs use the CPU", bf16
    build = f"is for CUDA {torch.version.cuda}" if torch.version.cuda else "has no CUDA"
    release = torch.__version__.split("+")[0]
    said = f"out of reach: this PyTorch {build}. Update the driver, or install a build of {release} that suits it into "
    return said + ".venv (pytorch.org says how; setup_server.sh keeps it). Until then runs use the CPU", bf16


def report(wanted: bool) -> str:
    """What this machine has, in lines."""
    import torch

    gpu, bf16 = gpus(wanted)
    compilers = filter(None, map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "clang++")))
    facts = {
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "GPU": gpu,
        "C++ compiler": next(compilers, None) or "none: nothing is compiled, runs are eager",
        "bfloat16": "in hardware" if bf16 else "not in hardware: float32",
    }
    return "\n".join(f"    {name:13} {fact}" for name, fact in facts.items())


def main(words: Sequence[str]) -> int:
    """Check, then say what there is; returns the exit code."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    broken = lacking(REQUIREMENTS.read_text(encoding="utf-8").splitlines(), project["dependencies"])
    if broken:
        print("==> " + "; ".join(broken), file=sys.stderr)
        return 1
    print(report(wanted=list(words) == ["cuda"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
