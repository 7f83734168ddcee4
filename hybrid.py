"""GRPO and a surgeon that edits attention, in three phases, beside the same run without one.

    python hybrid.py                              the small character model, one seed, all arms: minutes on 2 cores
    python hybrid.py --preset avatarl-char        the student of any preset of train.py
    python hybrid.py --surgeon td3 --phases.both-steps 900
    python hybrid.py --arms surgeon none          only these arms of phase 3; none, the control, is always one
    python hybrid.py --resume runs/hybrid         continue a run that was stopped
    python -m experiments.surgery --seeds 3       the study over seeds

Phase 1: the student alone, until it stagnates. Phase 2: the surgeon (SAC) alone on the frozen student. Phase 3: both,
where an edit is kept when it improves held-out text by more than its noise. Writes runs/hybrid: config.json, a run
folder for each phase and arm, report.md, report.html.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cli import parse, run_main
from config import Config, ConfigError, differences, require
from surgery.settings import HybridConfig, student_config

CHANGEABLE = ("run.device", "run.threads", "run.compile")
"""What --resume may change, besides log.…"""


@dataclass(frozen=True)
class Command:
    """One command line of hybrid.py."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    """Every setting of the student, as in train.py."""
    hybrid: Annotated[HybridConfig, tyro.conf.arg(name="")]
    """Phases, surgery, acceptance, the surgeon's agent."""
    preset: str = ""
    """The preset of train.py that the student's settings come from. Empty: a small character model under GRPO."""
    resume: Path | None = None
    """Continue the run in this folder."""


def value_of(words: Sequence[str], flag: str) -> str | None:
    """The value of a flag that is looked up before parsing, because it decides the defaults; None without it."""
    for i, word in enumerate(words):
        if word == flag:
            require(i + 1 < len(words), flag, "", "it needs a value")
            return words[i + 1]
        if word.startswith(flag + "="):
            return word.partition("=")[2]
    return None


def read_command(words: Sequence[str]) -> Command:
    """The parsed command. Raises ConfigError for an unknown preset or a value that cannot work."""
    name, resumed = value_of(words, "--preset") or "", value_of(words, "--resume")
    config, hybrid = student_config(name), HybridConfig()
    if resumed is not None:
        require(not name, "--preset", name, "a resumed run has its own settings; leave it out")
        from surgery.run import read_hybrid

        config, hybrid, _ = read_hybrid(Path(resumed))
    default = Command(config, hybrid, name)
    command = parse(Command, words, default=default, prog="hybrid.py", description=__doc__ or "")
    steps = command.config.train.steps
    fix = "use --phases.grpo-steps and --phases.both-steps"
    require(steps == config.train.steps, "train.steps", steps, fix)
    parallel = command.config.run.parallel
    require(parallel == "ddp", "run.parallel", parallel, "hybrid.py runs on one process, with nothing to cut; use ddp")
    if resumed is not None:
        check_unchanged(config, hybrid, command)
    return command


def check_unchanged(config: Config, hybrid: HybridConfig, command: Command) -> None:
    """Raise ConfigError where a resumed run was given settings that would make it another one."""
    for name, (old, new) in differences(config, command.config).items():
        allowed = name in CHANGEABLE or name.startswith("log.")
        fix = f"--resume cannot change it from {old!r}; start a new run instead"
        require(allowed, name.replace("_", "-"), new, fix)
    for field in dataclasses.fields(hybrid):
        old, new = getattr(hybrid, field.name), getattr(command.hybrid, field.name)
        require(old == new, field.name, new, "--resume cannot change it; start a new run instead")


def main(words: Sequence[str]) -> int:
    """Parse, run, report; returns the exit code."""
    command = read_command(words)

    from launch import prepare_process  # torch comes with it, and --help need not wait for that
    from surgery import run
    from training.distributed import world_from_environment

    world = world_from_environment()
    if world.size > 1:
        raise ConfigError(f"{world.size} processes: hybrid.py runs on one; start it without torchrun")
    hardware = prepare_process(command.config, world)
    if command.resume is None:
        code, _ = run.start(command.config, command.hybrid, command.preset or "hybrid", hardware)
    else:
        _, _, record = run.read_hybrid(command.resume)
        code, _ = run.resume(command.resume, command.config, command.hybrid, record, hardware)
    return code


if __name__ == "__main__":
    run_main(main, outlive=True)
