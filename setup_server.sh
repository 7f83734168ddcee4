#!/usr/bin/env bash
# A fresh machine becomes ready: makes .venv in this checkout, installs what AvataRL needs, the right PyTorch for the
# GPUs and driver it finds first, gets the default corpus, trains five steps, and says how to launch on all GPUs.
# Run it as often as you like: what works is kept, what was left half-made is made again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'USAGE'
usage: bash setup_server.sh [--dev] [--wandb] [--modal] [--extras a,b] [--flash-attn] [--no-smoke]

Makes .venv beside this script, installs what AvataRL needs, at the versions of constraints.txt, and tries it out
in a run of five steps, on all GPUs that it finds.

  --dev         also what tests and linters need; then: .venv/bin/python -m pytest
  --wandb       also Weights & Biases
  --modal       also Modal's client, for train_modal.py
  --extras a,b  also these extras of pyproject.toml
  --flash-attn  also flash-attn, which nothing needs; takes an NVIDIA GPU, and nvcc where no wheel fits
  --no-smoke    without the run of five steps
  --help        this text

What an earlier call added stays. To start over, delete .venv.
USAGE
}

readonly VENV=.venv
readonly PYTHON=$VENV/bin/python
readonly STATE=$VENV/setup-state # "unfinished", or the fingerprint of the inputs and the extras that are installed
readonly SMOKE=$VENV/setup-smoke # the fingerprint with which the run of five steps has worked
readonly INDEX=https://download.pytorch.org/whl # builds of PyTorch other than the default one, by kind
readonly CUDA_DEFAULT=13 # major version of CUDA that the default build is made for
readonly CUDA_OLDER='cu126 cu128 cu129' # builds for the one before; any driver of that major version runs them all
readonly DRIVER_ADVICE='Ubuntu: sudo ubuntu-drivers install, Debian: sudo apt install nvidia-driver, then reboot'
readonly PCI=${PCI_DEVICES:-/sys/bus/pci/devices}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf '==> %s\n' "$*"; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Sets `extras` (words), `flash_attn` and `smoke`.
parse_options() {
    extras='' flash_attn=no smoke=yes
    while (($#)); do
        case $1 in
            --dev) extras+=' dev' ;;
            --wandb) extras+=' wandb' ;;
            --modal) extras+=' modal' ;;
            --extras)
                add_extras "${2-}"
                shift
                ;;
            --extras=*) add_extras "${1#*=}" ;;
            --flash-attn) flash_attn=yes ;;
            --no-smoke) smoke=no ;;
            -h | --help)
                usage
                exit 0
                ;;
            *) refuse "unknown option $1" ;;
        esac
        shift
    done
}

refuse() {
    printf 'error: %s\n\n' "$1" >&2
    usage >&2
    exit 2
}

# Adds the extras of a comma-separated list to `extras`. That of flash-attn has an option of its own.
add_extras() {
    local name known
    known=$(sed -n '/^\[project.optional/,/^\[tool/s/^\([a-z0-9-]*\) *= *\[.*/\1/p' pyproject.toml | grep -vx gpu)
    [[ $1 ]] || refuse "--extras wants names, such as --extras wandb,hf; there are ${known//$'\n'/, }"
    for name in ${1//,/ }; do
        grep -qx -- "$name" <<<"$known" || refuse "--extras $name: there are ${known//$'\n'/, }"
        extras+=" $name"
    done
}

# Adds to `extras` what earlier calls installed, and gives every set one spelling.
add_earlier_extras() {
    local earlier=''
    if [[ -f $STATE ]]; then read -r _ earlier <"$STATE" || true; fi
    # shellcheck disable=SC2086 # both are lists of words
    extras=$(printf '%s\n' $extras $earlier | sort -u | xargs)
}

# Sets `backend` (cuda: PyTorch's CUDA build belongs here; cpu: the far smaller CPU build does) and `driver_cuda`, the
# newest CUDA that the driver runs, empty where nvidia-smi does not tell.
detect_gpus() {
    local report='' driver=unknown vendor
    backend=cpu driver_cuda=''
    if [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]; then
        backend=cuda
        report=$(nvidia-smi 2>/dev/null) || true
        if [[ $report =~ Driver\ Version:\ *([0-9.]+) || $report =~ KMD\ Version:\ *([0-9.]+) ]]; then
            driver=${BASH_REMATCH[1]}
        fi
        if [[ $report =~ CUDA(\ UMD)?\ Version:\ *([0-9]+\.[0-9]+) ]]; then driver_cuda=${BASH_REMATCH[2]}; fi
        say "$(nvidia-smi -L | grep -c '^GPU') NVIDIA GPU(s), driver $driver, CUDA up to ${driver_cuda:-unknown}"
        if [[ $driver_cuda && ${driver_cuda%%.*} -lt $((CUDA_DEFAULT - 1)) ]]; then
            say "too old for this PyTorch: update the driver ($DRIVER_ADVICE)"
            say "and run this script again; going on for the CPU"
            backend=cpu driver_cuda=''
        fi
        return
    fi
    for vendor in "$PCI"/*/vendor; do
        if [[ -r $vendor && $(<"$vendor") == 0x10de && $(<"${vendor%vendor}class") == 0x03* ]]; then
            say "an NVIDIA GPU, but no driver that works: install it ($DRIVER_ADVICE)"
            say "and run this script again; going on for the CPU"
            return
        fi
    done
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

pip_install() { "$PYTHON" -m pip install --no-compile "$@"; }

# Compiles what was installed, on all cores, where pip would use one. Packages' own tests are left as they are.
compile_packages() {
    "$PYTHON" -m compileall -qq -j 0 -x '/tests?/' "$VENV/lib" || true # templates among them are no Python
}

# A failure that we see leaves a .venv to build on; only a set-up that was killed leaves it unfinished.
give_up() {
    rm -f "$STATE"
    fail "$@"
}

torch_version() {
    "$PYTHON" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || echo none
}

# Whether a torch of the tested release is there, imports and, beside a GPU, is built for one that the driver runs.
torch_fits() {
    local installed
    installed=$(torch_version)
    [[ ${installed%%+*} == "$torch" ]] && "$PYTHON" -c "
import torch
major = int((torch.version.cuda or '0').split('.')[0])
assert '$backend' == 'cpu' or major or torch.version.hip
assert '$backend' == 'cpu' or major <= int('${driver_cuda%%.*}' or major)" 2>/dev/null
}

# Installs torch alone: what it needs comes with the other packages, at the versions of constraints.txt.
install_torch() {
    local alone=(--no-deps --force-reinstall "torch==$torch")
    if torch_fits; then
        say "keeping PyTorch $(torch_version)"
        return
    elif [[ $backend == cuda ]]; then
        install_cuda_torch "${alone[@]}"
    elif say "installing PyTorch $torch for the CPU" && pip_install -q --no-index "${alone[@]}" 2>/dev/null; then
        say "took it from a local wheel"
    else
        say "from PyTorch's index of CPU builds"
        if ! pip_install --retries 1 --timeout 30 --index-url "$INDEX/cpu" "${alone[@]}"; then
            say "not to be had there: taking the default build, on Linux one of several GB"
            pip_install "${alone[@]}" || give_up "PyTorch could not be installed: see above"
        fi
    fi
    say "PyTorch is now $(torch_version)"
}

# Installs PyTorch for the CUDA that the driver runs, with these words of pip: the default build, or an older one.
install_cuda_torch() {
    local build
    if [[ $driver_cuda && ${driver_cuda%%.*} -lt $CUDA_DEFAULT ]]; then
        for build in $CUDA_OLDER; do
            say "installing PyTorch $torch for CUDA: $build, as the driver is not one for CUDA $CUDA_DEFAULT"
            if pip_install --retries 1 --timeout 30 --index-url "$INDEX/$build" "$@"; then return; fi
        done
        say "none to be had for this driver: taking the default build, which may want a newer one ($DRIVER_ADVICE)"
    fi
    say "installing PyTorch $torch for CUDA"
    pip_install "$@" || give_up "PyTorch could not be installed: see above"
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
check_and_report() { "$PYTHON" -m training.check_setup "$backend"; }

# ---- a first run

# Sets `launcher`, what train.py is started with, and `processes`: all GPUs, or as many as share the default batch.
find_launcher() {
    local counts='1 0'
    if [[ $backend == cuda ]]; then
        counts=$("$PYTHON" -c "
import torch
from config import preset

gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
batch = preset('avatarl-char-gpu').train.batch_size
print(max((n for n in range(1, gpus + 1) if batch % n == 0), default=1), gpus)") || fail "torch does not work: see above"
    fi
    processes=${counts% *} launcher=("$PYTHON")
    if ((processes > 1)); then launcher=("$VENV/bin/torchrun" --standalone "--nproc_per_node=$processes"); fi
    if ((processes < ${counts#* })); then
        say "$processes of ${counts#* } GPUs: the default batch does not divide among all; another --train.batch-size may"
    fi
}

# The default corpus, fetched where it is missing. Without it there is the text that is embedded in Python.
get_data() {
    "$PYTHON" -c "
from data.corpora import load_corpus

corpus = load_corpus(None)
print(f'==> data: {corpus.name}, {len(corpus.text):,} characters ({corpus.source})')" || fail "no corpus: see above"
}

# Trains a tiny model for five steps in all processes; a success is noted as $1.
run_smoke() {
    local folder log=$VENV/setup-smoke.log limit=()
    folder=$(mktemp -d)
    if command -v timeout >/dev/null; then limit=(timeout 900); fi # GPUs that cannot reach one another wait for ever
    say "trying it out: a run of five steps"
    if ${limit[@]+"${limit[@]}"} "${launcher[@]}" train.py avatarl-char --model.n-layer 1 --model.n-head 2 --model.n-embd 32 \
        --critic.kind ngram --critic.ngram-context 2 --train.steps 5 --train.batch-size $((4 * processes)) \
        --train.checkpoint-every 0 --optim.warmup-steps 1 --eval.every 0 --eval.ladder 0 --eval.sample-tokens 0 \
        --data.val-fraction 0.01 --run.out-dir "$folder" >"$log" 2>&1; then
        rm -rf "$folder"
        grep -E '^(hardware|step) ' "$log" | sed 's/^/    /'
        echo "$1" >"$SMOKE"
    else
        rm -rf "$folder"
        tail -n 20 "$log" >&2
        fail "the set-up is complete, but training does not work: see above and $log"
    fi
}

install() {
    echo unfinished >"$STATE"
    install_torch
    install_packages
    compile_packages
    say "checking"
}

main() {
    parse_options "$@"
    add_earlier_extras
    detect_gpus
    torch=$(sed -n 's/^torch==//p' constraints.txt)
    local done_state
    done_state="$({ cat pyproject.toml constraints.txt && echo "$backend${driver_cuda%%.*}"; } | cksum | tr ' ' -)${extras:+ $extras}"

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
    find_launcher
    local tried
    tried="${done_state%% *} $(torch_version) ${launcher[*]}"
    if [[ $smoke == yes && $(cat "$SMOKE" 2>/dev/null) != "$tried" ]]; then
        get_data
        run_smoke "$tried"
    fi
    say "next: ${launcher[*]} train.py"
    if [[ " $extras " == *' dev '* ]]; then say "or the tests: $PYTHON -m pytest"; fi
}

main "$@"
