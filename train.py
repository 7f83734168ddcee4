"""Train a language model from random weights by AvataRL.

    python train.py                                   the default preset for this hardware, end to end
    python train.py PRESET --group.field VALUE        any preset, any override
    python train.py PRESET --dry-run                  what it costs, before anything starts
    python train.py --resume runs/NAME                continue a run
    python train.py cache-critic PRESET …             only ask its critic about every training window, onto the disk
    torchrun --nproc_per_node=8 --max-restarts=3 train.py PRESET      on many processes; a dead one costs no run

A run writes runs/NAME: config.json, metrics.jsonl, samples.txt, checkpoints/, report.html.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cli import parse, run_main
from config import PRESETS, Config, ConfigError, override, preset, require

CACHE_CRITIC = "cache-critic"


@dataclass(frozen=True)
class Command:
    """One command line of train.py."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    """Every setting of the run."""
    dry_run: bool = False
    """Print what the run takes, measured here within seconds and modelled for 1 to 64 H100s, and stop."""
    price: float | None = None
    """--dry-run: dollars of an H100 for an hour. Unset: the list price that it names."""
    resume: Path | None = None
    """Continue the run in this folder from its newest checkpoint."""


def default_preset() -> str:
    """The preset that suits this hardware."""
    import torch

    return "avatarl-char-gpu" if torch.cuda.is_available() else "avatarl-char"


def usage() -> str:
    """The description above the flags of --help: launch lines and presets."""
    width = max(map(len, PRESETS))
    presets = "\n".join(f"  {name:{width}}  {what}" for name, (what, _, _) in PRESETS.items())
    return f"{(__doc__ or '').strip()}\n\nPresets:\n{presets}"


def resume_folder(words: Sequence[str]) -> Path | None:
    """The folder behind --resume, looked up before parsing because its config supplies the defaults."""
    for i, word in enumerate(words):
        if word == "--resume":
            if i + 1 == len(words):
                raise ConfigError("--resume: name a run folder, such as runs/avatarl-char")
            return Path(words[i + 1])
        if word.startswith("--resume="):
            return Path(word.partition("=")[2])
    return None


def read_command(words: Sequence[str]) -> tuple[str, Command]:
    """The preset's name and the parsed command. Raises ConfigError for an unknown preset or a bad value."""
    name, rest = default_preset(), words
    if words and not words[0].startswith("-"):
        name, rest = words[0], words[1:]
    config = preset(name)
    folder = resume_folder(rest)
    if folder is not None:
        if rest is not words:
            raise ConfigError(f"{name} --resume: a resumed run has its own settings; leave the preset out")
        from training.run_folder import read_config

        config, record = read_config(folder)
        name = record.get("preset", name)
    return name, parse(Command, rest, default=Command(config), prog="train.py", description=usage())


def training_command(words: Sequence[str]) -> str:
    """The command that trains from the cache that `cache-critic` and these words made."""
    kept = [word for word in words if word != "--critic.cache"]
    return shlex.join(["python", "train.py", *kept, "--critic.cache"])


def main(words: Sequence[str]) -> int:
    """Parse, start the process group, train, clean up; returns the exit code."""
    cache_only = list(words[:1]) == [CACHE_CRITIC]
    words = words[1:] if cache_only else words
    name, command = read_command(words)
    require(command.price is None or 0 < command.price < 1e6, "price", command.price, "use dollars, such as 2.5")
    if cache_only and command.resume is not None:
        raise ConfigError(f"{CACHE_CRITIC} --resume: a run finds its cache, or makes it again, when it is resumed")

    import launch  # torch comes with it, and --help need not wait for that
    from training.distributed import process_group, world_from_environment

    config, world = command.config, world_from_environment()
    hardware = launch.prepare_process(config, world)
    if command.dry_run:
        from forecasting.report import forecast

        config = override(config, critic={"cache": True}) if cache_only else config
        # On every process: they share the machine as in the run.
        lines = forecast(config, hardware, world, command.price)
        if world.first:
            print("\n".join([f"{name}: a forecast; nothing was read or written", *lines]))
        return 0
    with process_group(world, hardware.device):
        if command.resume is not None:
            code, _ = launch.resume(command.resume, config, world, hardware)
        elif cache_only:
            code, _ = launch.cache_critic(config, world, hardware)
            if code == 0 and world.first:
                print(f"train from it: {training_command(words)}")
        else:
            code, _ = launch.begin(config, name, world, hardware)
    return code


if __name__ == "__main__":
    run_main(main, outlive=True)
