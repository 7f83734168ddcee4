"""Write the model of a run in another format.

    python export.py runs/NAME --to hf OUT
    python export.py runs/NAME --to hf OUT --checkpoint step-000500

hf: a folder that transformers loads, `AutoModelForCausalLM.from_pretrained("OUT")` and the same for
`AutoTokenizer`: safetensors weights, configuration and tokenizer. What the protocol's presets and `avatarl-classic`
train is a GPT2LMHeadModel. GPT-2 has no rotary positions, RMSNorm, squared ReLU, QK-norm, short convolution or tables
of n-grams: a model with any of them, as the default preset's, takes its own code along, which transformers runs when
told `trust_remote_code=True`. It generates without a cache of keys and values, from prompts of one length.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from cli import parse, run_main
from config import ConfigError, require
from files import sync_folder
from hf_format import beyond_gpt2, save_hf
from training.run_folder import load_run


@dataclass(frozen=True)
class Settings:
    """Write the model of a run in another format."""

    run: tyro.conf.Positional[Path]
    """Folder of the run: runs/NAME."""
    out: tyro.conf.Positional[Path]
    """Folder to write; it must not exist yet, or be empty."""
    to: Literal["hf"] = "hf"
    """hf: Hugging Face transformers, as GPT-2 where that can express the model."""
    checkpoint: str = "best"
    """best (by validation loss), latest, or a name such as step-000500."""


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends and vanishes when it fails.

    Raises ConfigError when `target` is a file, holds anything or can't be made.
    """
    target = target.absolute()
    taken = any(target.iterdir()) if target.is_dir() else target.exists() or target.is_symlink()
    require(not taken, "out", str(target), "already there and never overwritten; choose another folder")
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"out = {str(target)!r}: can't be made ({error.strerror}); choose another folder") from None
    try:
        yield temporary
        sync_folder(temporary)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def main(arguments: Sequence[str]) -> None:
    """Parse, load, write. Raises ConfigError, RuntimeError or OSError, saying what to do."""
    settings = parse(Settings, arguments, prog="export.py", description=__doc__ or "")
    with new_folder(settings.out) as folder:
        run = load_run(settings.run, settings.checkpoint)
        save_hf(run.model, run.tokenizer, folder)
    size = run.model.parameter_count()
    print(f"wrote {settings.out}: {size:,} parameters after {run.step:,} steps, from {run.checkpoint}")
    if lacking := beyond_gpt2(run.model.config):
        print(
            f"GPT-2 has no {', '.join(lacking)} of this kind, so the folder holds the model's code too; load it with\n"
            f'AutoModelForCausalLM.from_pretrained("{settings.out}", trust_remote_code=True), the tokenizer likewise'
        )


if __name__ == "__main__":
    run_main(main)
