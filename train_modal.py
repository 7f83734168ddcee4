"""Train on Modal's GPUs: `torchrun … train.py` in a container there, with data, caches and runs on Volumes.

    modal run train_modal.py --preset avatarl-250m --gpus 8 [--nodes 2] [--detach]
    modal run train_modal.py --preset avatarl-char-gpu --train.steps 500 --run.name try    any setting of train.py
    modal run train_modal.py … --dry-run              what would start there and what it takes; needs no account
    modal run train_modal.py --resume NAME            continue a run that stopped; --train.steps N continues further
    modal run train_modal.py --pull NAME              bring the run's folder back, as runs/NAME
    modal run train_modal.py --prepare openwebtext    put a corpus onto the Volume, without a GPU

Flags with a dot are train.py's. Settings are checked here, before anything is rented. An attempt that is preempted,
fails or has used its hours ends non-zero, after a checkpoint where there was time for one; Modal then starts the
next attempt, which resumes. `python train_modal.py …` does the same as `modal run train_modal.py …`.
"""

import secrets
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cli import parse, report, run_main
from config import Config, ConfigError, critic_preset, preset, require
from on_modal.app import PYTHON, Resources, find_secrets, in_one_line, make_app, packages, require_modal
from on_modal.container import PLACES, ROOT, VOLUMES, Job, preparing, torchrun, training_words
from on_modal.runs import claim_name, pull, require_run
from training.micro_batches import micro_batches

Gpu = Literal["H100", "H200", "B200", "A100-40GB", "A100-80GB", "L40S", "A10", "L4", "T4"]
MOST = {"A10": 4}  # GPUs of a container; 8 of any other kind
CLUSTERED = ("H100", "H200", "B200")  # kinds that Modal connects from container to container


@dataclass(frozen=True)
class Command:
    """One command line of train_modal.py; flags with a dot, such as --train.steps, go to train.py."""

    preset: str = "avatarl-char-gpu"
    """What to train: a preset of train.py."""
    gpus: int = 1
    """GPUs of a node, 1 to 8."""
    nodes: int = 1
    """Containers that train together, each with 8 GPUs."""
    gpu: Gpu = "H100"
    """Kind of GPU."""
    hours: float = 23.0
    """Hours after which an attempt saves and ends, for the next one to resume; Modal allows none beyond a day."""
    retries: int = 10
    """How many further attempts Modal makes after failures and ended hours; preemptions do not count."""
    detach: bool = False
    """Keep training when this terminal goes."""
    dry_run: bool = False
    """Print what would be started there and what the run takes, and stop. Needs no account."""
    resume: str = ""
    """Continue this run on the Volume, on these GPUs. It must not be running."""
    pull: str = ""
    """Copy this run from the Volume into --to, and stop."""
    prepare: str = ""
    """Run `python -m data.prepare` for this corpus on the Volume, without a GPU, and stop."""
    to: Path = Path("runs")
    """Where --pull puts the folder."""
    wandb_secret: str = "wandb-secret"
    """Modal secret with WANDB_API_KEY; passed on where it exists."""

    def __post_init__(self) -> None:
        most, fix = MOST.get(self.gpu, 8), "--nodes adds nodes"
        require(1 <= self.gpus <= most, "gpus", self.gpus, f"a node has 1 to {most} {self.gpu}; {fix}")
        require(self.nodes >= 1, "nodes", self.nodes, "use at least 1")
        fix = f"several nodes take all 8 GPUs of each: --gpus 8, and --gpu {' or '.join(CLUSTERED)}"
        require(self.nodes == 1 or (self.gpus == 8 and self.gpu in CLUSTERED), "nodes", self.nodes, fix)
        require(0 < self.hours <= 23, "hours", self.hours, "use more than 0 and at most 23: Modal ends all after 24")
        require(0 <= self.retries <= 10, "retries", self.retries, "Modal makes 0 to 10")
        for flag, name in (("resume", self.resume), ("pull", self.pull)):
            plain = name == Path(name).name and not name.startswith(".")
            require(name == "" or plain, flag, name, "give the name of a run, without a path")
        modes = {flag: value for flag in ("resume", "pull", "prepare") if (value := getattr(self, flag))}
        require(len(modes) < 2, " and ".join(modes), list(modes.values()), "one at a time")

    @property
    def resources(self) -> Resources:
        """What this command takes on Modal."""
        gpus, nodes = (0, 1) if self.prepare else (self.gpus, self.nodes)
        return Resources(self.gpu, gpus, nodes, self.hours, self.retries)


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that are ours, and those of train.py: flags whose name has a dot, with what follows them."""
    ours: list[str] = []
    theirs: list[str] = []
    current = ours
    for word in words:
        if word.startswith("--"):
            current = theirs if "." in word.partition("=")[0] else ours
        current.append(word)
    return ours, theirs


def read_command(words: Sequence[str]) -> tuple[Command, list[str]]:
    """The parsed command and train.py's words, checked as far as that is possible before anything is rented.

    Raises ConfigError for settings that cannot work.
    """
    ours, theirs = split_words(words)
    command = parse(Command, ours, prog="modal run train_modal.py", description=(__doc__ or "").strip())
    if command.pull or command.prepare:
        flag = "pull" if command.pull else "prepare"
        require(not theirs, flag, getattr(command, flag), f"{theirs[:1]} means nothing here; leave it out")
    elif not command.resume:
        check_training(command, training_config(command, theirs))
    return command, theirs


def training_config(command: Command, theirs: Sequence[str]) -> Config:
    """The settings of a new run. Raises ConfigError as train.py does."""
    from train import read_command as read_training

    return read_training([command.preset, *theirs])[1].config


def check_training(command: Command, config: Config) -> None:
    """Raise ConfigError for a run that would fail over there."""
    out_dir, device = config.run.out_dir, config.run.device
    require(out_dir == Config().run.out_dir, "run.out-dir", out_dir, "leave it out: runs stand on a Volume")
    require(device in ("auto", "cuda"), "run.device", device, "leave it out: there are GPUs")
    for flag, path in (("corpus", config.data.corpus), ("val-corpus", config.data.val_corpus)):
        upload = f"`modal volume put {VOLUMES['data']} {path} NAME/input.txt`"
        require(
            not path or Path(path).name == path, f"data.{flag}", path, f"not a path there; {upload}, then name NAME"
        )
    parallel, fix = config.run.parallel, "each node would save its share where no other sees it; use --run.parallel ddp"
    require(command.nodes == 1 or parallel == "ddp", "run.parallel", parallel, fix)
    gpus = command.gpus * command.nodes
    micro_batches(config.train, gpus)  # raises where they cannot share a step
    if config.train.objective == "avatarl" and "model" in config.critic.members and not config.critic.run:
        name = critic_preset(config)
        then = f"then this with --critic.run {PLACES['runs']}/{name}"
        fix = f"each node would train a critic that the others cannot read; first --preset {name} on one node, {then}"
        require(command.nodes == 1, "nodes", command.nodes, fix)
        batch = preset(name).train.batch_size
        fix = f"its critic's batch of {batch} does not divide among them; first --preset {name} on fewer, {then}"
        require(batch % gpus == 0, "gpus", gpus, fix)


# ---- on Modal


def make_job(command: Command, theirs: Sequence[str], folder: str) -> Job:
    """What the containers are told: the same at every attempt."""
    words = tuple(theirs) if command.resume else (command.preset, *theirs)
    seconds = command.hours * 3600
    return Job(secrets.token_hex(4), folder, words, bool(command.resume), command.gpus, command.nodes, seconds)


def wanted_name(command: Command, theirs: Sequence[str]) -> str:
    """The name of the run: the resumed one's, --run.name, or the preset."""
    return command.resume or training_config(command, theirs).run.name or command.preset


def launch(command: Command, theirs: Sequence[str], function: Any) -> int:
    """Start the function of a running app, and wait for its end; returns the exit code."""
    if command.prepare:
        return int(function.spawn(command.prepare).get())
    if command.resume:
        require_run(command.resume, "resume")
    folder = command.resume or claim_name(wanted_name(command, theirs))
    call = function.spawn(make_job(command, theirs, folder))  # outlives this process in a detached app
    print(f"run        {folder} on {command.nodes} x {command.resources.gpu_request}, call {call.object_id}")
    print(f"pull       modal run train_modal.py --pull {folder}", flush=True)
    again = f"{folder} is incomplete; continue with: modal run train_modal.py --resume {folder}"
    try:
        code = int(call.get())
    except Exception as error:  # what the last attempt raised
        raise RuntimeError(f"{again} ({error})") from None
    if code:
        print(again, file=sys.stderr)
    return code


# ---- command lines


def plan(command: Command, theirs: Sequence[str]) -> list[str]:
    """What Modal would be asked for, in lines."""
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = dict(line.split("==") for line in constraints.splitlines() if "==" in line and not line.startswith("#"))
    if command.prepare:
        gpus, words = "none", preparing(command.prepare)
    else:
        gpus = f"{command.nodes} x {command.resources.gpu_request}"
        job = make_job(command, theirs, wanted_name(command, theirs))
        words = torchrun(job, 0, "ADDRESS-OF-NODE-0", training_words(job))
    words = ["python" if word == sys.executable else word.removeprefix(f"{ROOT}/") for word in words]
    return [
        f"image      Debian, Python {PYTHON}, torch {pins['torch']} for CUDA, {len(packages())} pinned packages",
        f"GPUs       {gpus}",
        *(f"volume     {VOLUMES[name]} at {place}" for name, place in PLACES.items()),
        f"secret     {command.wandb_secret}, where it exists",
        f"attempts   1 and up to {command.retries} more; each saves and ends itself after {command.hours:g} hours",
        f"command    {shlex.join(words)}",
    ]


def dry_run(command: Command, theirs: Sequence[str]) -> int:
    """Print the plan, and train.py's forecast of a new run; returns an exit code."""
    print("\n".join(["a plan; nothing was started", *plan(command, theirs)]), flush=True)
    if command.prepare or command.resume:
        return 0
    from train import main as train_main

    return train_main([command.preset, *theirs, "--dry-run"])


def without_app(command: Command, theirs: Sequence[str]) -> int | None:
    """Do what takes no container and return the exit code; None where one is wanted."""
    if command.dry_run:
        return dry_run(command, theirs)
    if command.pull:
        with in_one_line():
            pull(command.pull, command.to)
        return 0
    return None


def main(words: Sequence[str]) -> int:
    """Parse, check, and run on Modal; returns the exit code."""
    command, theirs = read_command(words)
    code = without_app(command, theirs)
    if code is not None:
        return code
    with in_one_line():
        app, function = make_app(command.resources, find_secrets(command.wandb_secret))
        with require_modal().enable_output(), app.run(detach=command.detach):
            return launch(command, theirs, function)


def app_for(words: Sequence[str]) -> Any:
    """The app that `modal run train_modal.py WORDS` is to start; exits for what takes none, and for errors.

    Modal takes the app, connects, builds the image, and only then calls the local entrypoint: whatever has to
    happen before that happens here.
    """
    apps = []

    def build() -> int | None:
        command, theirs = read_command(words)
        code = without_app(command, theirs)
        if code is None:
            if command.detach:
                detach_modal_run()
            found = find_secrets(command.wandb_secret)
            start = partial(launch, command, theirs)
            apps.append(make_app(command.resources, found, lambda function: code_of(partial(start, function)))[0])
        return code

    code = code_of(build)
    if not apps:
        sys.exit(code)
    return apps[0]


def code_of(action: Callable[[], int | None]) -> int | None:
    """What `action` returns, or the exit code for what it raises, as cli.run_main has it: Modal would draw a box."""
    try:
        with in_one_line():
            return action()
    except ConfigError as error:
        return report(error, 2)
    except (RuntimeError, OSError) as error:
        return report(error, 1)


def detach_modal_run() -> None:
    """Make the `modal run` around us one with Modal's own --detach, which has to stand before the file's name.

    Raises ConfigError where that is not possible.
    """
    import click

    context = click.get_current_context(silent=True)
    while context is not None and "detach" not in context.params:
        context = context.parent
    if context is None:
        raise ConfigError("detach: this version of Modal wants it first: modal run --detach train_modal.py …")
    context.params["detach"] = True


def __getattr__(name: str) -> Any:
    """The app when Modal's command line asks for it: importing this file makes nothing and needs no Modal."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    at = [i for i, word in enumerate(sys.argv) if word.partition("::")[0].endswith("train_modal.py")]
    app = app_for(sys.argv[at[0] + 1 :]) if at else make_app(Command().resources)[0]
    globals()["app"] = app
    return app


def __dir__() -> list[str]:
    """The names through which Modal's command line looks for the app."""
    return sorted({*globals(), "app"})


if __name__ == "__main__":
    run_main(main)
