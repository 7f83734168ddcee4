#!/usr/bin/env bash
# A fresh machine becomes ready: makes .venv in this checkout and installs what AvataRL needs, the right PyTorch
# first. Run it as often as you like: what works is kept, what was left half-made is made again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'USAGE'
usage: bash setup_server.sh [--dev] [--wandb] [--flash-attn]

Makes .venv beside this script and installs what AvataRL needs, at the versions of constraints.txt.

  --dev         also what tests and linters need; then: .venv/bin/python -m pytest
  --wandb       also Weights & Biases
  --flash-attn  also flash-attn, which nothing needs; takes an NVIDIA GPU, and nvcc where no wheel fits
  --help        this text

What an earlier call added stays. To start over, delete .venv.
USAGE
}

readonly VENV=.venv
readonly PYTHON=$VENV/bin/python
readonly STATE=$VENV/setup-state # "unfinished", or the fingerprint of the inputs and the extras that are installed
readonly CPU_INDEX=https://download.pytorch.org/whl/cpu
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf '==> %s\n' "$*"; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Sets `extras` (sorted words) and `flash_attn`.
parse_options() {
    local option
    extras='' flash_attn=no
    for option in "$@"; do
        case $option in
            --dev) extras+=' dev' ;;
            --wandb) extras+=' wandb' ;;
            --flash-attn) flash_attn=yes ;;
            -h | --help)
                usage
                exit 0
                ;;
            *)
                printf 'error: unknown option %s\n\n' "$option" >&2
                usage >&2
                exit 2
                ;;
        esac
    done
}

# Adds to `extras` what earlier calls installed, and gives every set one spelling.
add_earlier_extras() {
    local earlier=''
    if [[ -f $STATE ]]; then read -r _ earlier <"$STATE" || true; fi
    # shellcheck disable=SC2086 # both are lists of words
    extras=$(printf '%s\n' $extras $earlier | sort -u | xargs)
}

# cuda: PyTorch's CUDA build belongs here; cpu: the far smaller CPU build does.
detect_backend() {
    if [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]; then echo cuda; else echo cpu; fi
}

# ---- .venv

# Sets `base` to a Python >= 3.11 that can make virtual environments.
find_python() {
    local candidate version seen='' bare=''
    for candidate in python3.13 python3.12 python3.11 python3 python; do
        # Only running it tells: a version manager's shim exists for versions that are not selected, too.
        version=$("$candidate" -c 'import platform; print(platform.python_version())' 2>/dev/null) || continue
        seen+=" $candidate ($version)"
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || continue
        if "$candidate" -c 'import ensurepip, venv; ensurepip.version()' 2>/dev/null; then
            base=$candidate
            say "using $candidate ($version)"
            return
        fi
        bare=${bare:-${version%.*}}
    done
    [[ -z $bare ]] || fail "Python $bare is here, but without its venv and ensurepip, which Debian and Ubuntu ship apart.
       Run  sudo apt install python$bare-venv  and then this script again."
    fail "AvataRL needs Python 3.11 or newer; found:${seen:- none}. Install one, then run this script again:
       Debian 12+, Ubuntu 24.04+   sudo apt install python3 python3-venv
       Fedora                      sudo dnf install python3
       macOS                       brew install python@3.13"
}

make_venv() {
    find_python
    say "making $VENV"
    if [[ -e $VENV ]]; then find -H "$VENV" -mindepth 1 -delete; fi
    mkdir -p "$VENV"
    echo unfinished >"$STATE"
    "$base" -m venv "$VENV" || fail "$base could not make $VENV: see its message above"
}

# Keeps a .venv that works; makes one where there is none that does.
ensure_venv() {
    if [[ ! -e $VENV ]]; then
        make_venv
    elif [[ $(cat "$STATE" 2>/dev/null) == unfinished ]]; then
        say "an earlier set-up was cut off: starting over"
        make_venv
    elif ! "$PYTHON" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        say "$VENV has no Python 3.11 or newer with pip that works: starting over"
        make_venv
    fi
}

# ---- packages

pip_install() { "$PYTHON" -m pip install "$@"; }

# A failure that we see leaves a .venv to build on; only a set-up that was killed leaves it unfinished.
give_up() {
    rm -f "$STATE"
    fail "$@"
}

torch_version() {
    "$PYTHON" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || echo none
}

# Whether a torch of the tested release is there, imports and, beside a GPU, is built for one.
torch_fits() {
    local installed
    installed=$(torch_version)
    [[ ${installed%%+*} == "$torch" ]] && "$PYTHON" -c "
import torch
assert '$backend' == 'cpu' or torch.version.cuda or torch.version.hip" 2>/dev/null
}

# Installs torch alone: what it needs comes with the other packages, at the versions of constraints.txt.
install_torch() {
    local alone=(--no-deps --force-reinstall "torch==$torch")
    if torch_fits; then
        say "keeping PyTorch $(torch_version)"
        return
    elif [[ $backend == cuda ]]; then
        say "installing PyTorch $torch for CUDA"
        pip_install "${alone[@]}" || give_up "PyTorch could not be installed: see above"
    elif say "installing PyTorch $torch for the CPU" && pip_install -q --no-index "${alone[@]}" 2>/dev/null; then
        say "took it from a local wheel"
    else
        say "from PyTorch's index of CPU builds"
        if ! pip_install --retries 1 --timeout 30 --index-url "$CPU_INDEX" "${alone[@]}"; then
            say "not to be had there: taking the default build, on Linux one of several GB"
            pip_install "${alone[@]}" || give_up "PyTorch could not be installed: see above"
        fi
    fi
    say "PyTorch is now $(torch_version)"
}

# The requirements that pyproject.toml names, for everyone and for the given extras, one a line.
requirements() {
    "$PYTHON" - "$@" <<'PY'
import sys, tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
print(*project["dependencies"], sep="\n")
for extra in sys.argv[1:]:
    print(*project["optional-dependencies"][extra], sep="\n")
PY
}

# Installs everything else; whatever a package asks for, this torch stays.
install_packages() {
    local before quiet=-q
    before=$(torch_version)
    if [[ $backend == cuda ]]; then quiet=--progress-bar=on; fi # gigabytes of CUDA libraries deserve their progress bars
    say "installing packages${extras:+, with the extras $extras}"
    # shellcheck disable=SC2086 # a list of words
    requirements $extras >"$VENV/setup-requirements.txt"
    { cat constraints.txt && echo "torch==$before"; } >"$VENV/setup-constraints.txt"
    pip_install "$quiet" -r "$VENV/setup-requirements.txt" -c "$VENV/setup-constraints.txt" ||
        give_up "the packages could not be installed: see above"
    require_torch "$before"
}

require_torch() {
    [[ $(torch_version) == "$1" ]] ||
        fail "a package replaced PyTorch $1 by $(torch_version). Delete $VENV, run this script again, and report it"
}

# Tries. Without it, attention is PyTorch's own scaled_dot_product_attention.
install_flash_attn() {
    local before
    before=$(torch_version)
    if [[ $backend == cpu ]]; then
        say "flash-attn needs an NVIDIA GPU, and none was found: left out; attention is PyTorch's SDPA"
    elif "$PYTHON" -c 'import flash_attn' 2>/dev/null; then
        say "keeping flash-attn"
    elif say "installing flash-attn (where no wheel fits it is compiled, which can take an hour)" &&
        pip_install -q -c "$VENV/setup-constraints.txt" einops ninja packaging psutil setuptools wheel &&
        pip_install --no-build-isolation --no-deps flash-attn &&
        "$PYTHON" -c 'import flash_attn'; then
        say "flash-attn works"
    else
        "$PYTHON" -m pip uninstall -q -y flash-attn 2>/dev/null || true # one that cannot be imported is in the way
        say "flash-attn could not be installed: left out; attention is PyTorch's SDPA, and all works"
    fi
    require_torch "$before"
}

# ---- the check and the report

# Says what this machine has, or fails with what is missing or cannot be imported.
check_and_report() {
    "$PYTHON" - "$backend" <<'PY'
import importlib, os, platform, re, shutil, sys, tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
broken = []
for requirement in Path(".venv/setup-requirements.txt").read_text().splitlines():
    name = re.match(r"[\w.-]+", requirement)[0]
    try:
        version(name)
        if requirement in project["dependencies"]:
            importlib.import_module(name)
    except PackageNotFoundError:
        broken.append(f"{name} is missing")
    except Exception as error:
        broken.append(f"{name} cannot be imported ({error})")
if broken:
    sys.exit("==> " + "; ".join(broken))

import torch

if torch.cuda.is_available():
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    gpu = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    bf16 = torch.cuda.get_device_capability() >= (8, 0)
else:
    gpu = "none: runs use the CPU"
    if sys.argv[1] == "cuda":
        build = f"is for CUDA {torch.version.cuda}" if torch.version.cuda else "has no CUDA"
        release = torch.__version__.split("+")[0]
        gpu = f"out of reach: this PyTorch {build}. Update the driver, or install a build of {release} that suits it"
        gpu += " into .venv (pytorch.org says how; this script keeps it). Until then runs use the CPU"
    cpu = Path("/proc/cpuinfo")
    bf16 = cpu.exists() and re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", cpu.read_text())
compilers = filter(None, map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "clang++")))
print(f"    Python        {platform.python_version()}")
print(f"    PyTorch       {torch.__version__}")
print(f"    GPU           {gpu}")
print(f"    C++ compiler  {next(compilers, None) or 'none: nothing is compiled, runs are eager'}")
print(f"    bfloat16      {'in hardware' if bf16 else 'not in hardware: float32'}")
PY
}

install() {
    echo unfinished >"$STATE"
    install_torch
    install_packages
    say "checking"
}

main() {
    parse_options "$@"
    add_earlier_extras
    backend=$(detect_backend)
    torch=$(sed -n 's/^torch==//p' constraints.txt)
    local done_state
    done_state="$({ cat pyproject.toml constraints.txt && echo "$backend"; } | cksum | tr ' ' -)${extras:+ $extras}"

    if [[ $(cat "$STATE" 2>/dev/null) == "$done_state" && -x $PYTHON ]] && check_and_report; then
        say "everything is in place already"
    else
        ensure_venv
        install
        if ! check_and_report; then
            say "starting over"
            make_venv
            install
            check_and_report || give_up "the set-up is complete, but does not work: see above"
        fi
        echo "$done_state" >"$STATE"
        say "$VENV is ready"
    fi
    if [[ $flash_attn == yes ]]; then install_flash_attn; fi
    say "next: $PYTHON train.py"
    if [[ " $extras " == *' dev '* ]]; then say "or the tests: $PYTHON -m pytest"; fi
}

main "$@"
