"""Continue a prompt with the model of a run.

    python sample.py runs/NAME --prompt "ROMEO:" --num 5
    python sample.py runs/NAME --prompt-file scene.txt --tokens 1000 --temperature 0.5 --stream
    echo "KING" | python sample.py runs/NAME --prompt -

Text goes to stdout, the line about the model to stderr. Sample i of a seed is always the same text, however
many are asked for and whether or not they are streamed.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cli import parse, run_main
from config import ConfigError, RunConfig, require
from generation import generate
from training.hardware import choose_device
from training.run_folder import LoadedRun, load_run

VERBATIM = tyro.conf.arg(constructor=str, metavar="TEXT|-", help_behavior_hint="")  # the text None is a text
ROWS = 16  # samples drawn together: a cache for each has to fit in memory


@dataclass(frozen=True)
class Settings:
    """Continue a prompt with the model of a run."""

    run: tyro.conf.Positional[Path]
    """Folder of the run: runs/NAME."""
    prompt: Annotated[str | None, VERBATIM] = None
    """Text to continue; - reads it from stdin. By default what the run's own samples continue."""
    prompt_file: Path | None = None
    """UTF-8 file whose text is the prompt, its last newline included."""
    num: int = 1
    """How many samples."""
    tokens: int = 300
    """New tokens per sample; a sample ends earlier at <|endoftext|>."""
    temperature: float = 0.8
    """Divides the logits: 0 always takes the likeliest token, 1 is the model's own distribution."""
    top_k: int | None = None
    """Draw from this many likeliest tokens only."""
    top_p: float | None = None
    """Draw from the smallest set of tokens with at least this probability."""
    seed: int = 1337
    """Seed of the draws."""
    checkpoint: str = "best"
    """best (by validation loss), latest, or a name such as step-000500."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. auto takes a GPU when there is one."""
    stream: bool = False
    """Print every token as it comes, one sample after the other."""


def read_prompt(settings: Settings) -> str | None:
    """The prompt from flag, file or stdin; None when none was given. Raises ConfigError when empty."""
    if settings.prompt_file is not None:
        fix = f"give this or prompt-file {settings.prompt_file}, not both"
        require(settings.prompt is None, "prompt", settings.prompt, fix)
        return read_text(settings.prompt_file, "prompt-file")
    if settings.prompt == "-":
        if sys.stdin is None or sys.stdin.closed:
            raise ConfigError('prompt -: stdin is closed; pipe a text into it, or give --prompt "some text"')
        return decoded(sys.stdin.buffer.read(), "prompt -: stdin")
    require(settings.prompt != "", "prompt", "", "is empty; give at least one character to continue")
    return settings.prompt


def read_text(path: Path, flag: str) -> str:
    """The text of a UTF-8 file that `flag` named. Raises ConfigError where it cannot be read or is empty."""
    source = f"{flag} {path}"
    try:
        return decoded(path.read_bytes(), source)
    except OSError as error:
        raise ConfigError(f"{source} can't be read ({error.strerror}); name a text file") from None


def decoded(data: bytes, source: str) -> str:
    """Bytes as UTF-8 text with plain newlines. Raises ConfigError, naming `source`, where it is none."""
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8 (byte {error.start}); convert it first") from None
    if not text:
        raise ConfigError(f"{source} is empty; give at least one character to continue")
    return text


def draw(
    run: LoadedRun,
    settings: Settings,
    ids: list[int],
    first: int,
    count: int = 1,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """New tokens of samples first to first + count − 1, each the same whatever else is drawn with it."""
    return generate(
        run.model,
        [ids] * count,
        settings.tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        seed=settings.seed,
        first_row=first,
        end_of_text=run.tokenizer.end_of_text,
        on_token=on_token,
    )


def heading(number: int, settings: Settings) -> str:
    """The line above a sample, where there are several."""
    return f"--- sample {number + 1} of {settings.num} ---\n" if settings.num > 1 else ""


def print_samples(run: LoadedRun, settings: Settings, ids: list[int]) -> None:
    """Draw all samples, a batch at a time, and print each with its prompt."""
    for first in range(0, settings.num, ROWS):
        rows = draw(run, settings, ids, first, min(ROWS, settings.num - first))
        for number, row in enumerate(rows, first):
            print(heading(number, settings) + run.tokenizer.decode(ids + row))


def stream_samples(run: LoadedRun, settings: Settings, ids: list[int]) -> None:
    """The same output, sample after sample, each token as it comes."""
    held: list[int] = []  # tokens that end inside a character

    def show(row: int, token: int) -> None:
        held.append(token)
        text = run.tokenizer.decode(held)
        if not text.endswith("\ufffd"):
            print(text, end="", flush=True)
            held.clear()

    for number in range(settings.num):
        print(heading(number, settings) + run.tokenizer.decode(ids), end="", flush=True)
        draw(run, settings, ids, number, on_token=show)
        print(run.tokenizer.decode(held))
        held.clear()


def main(arguments: Sequence[str]) -> None:
    """Parse, load, sample, print. Raises ConfigError, RuntimeError or OSError, saying what to do."""
    settings = parse(Settings, arguments, prog="sample.py", description=__doc__ or "")
    require(settings.num >= 1, "num", settings.num, "use a positive number of samples")
    prompt = read_prompt(settings)
    device = choose_device(RunConfig(device=settings.device).device)
    run = load_run(settings.run, settings.checkpoint, device)
    ids = run.tokenizer.encode(run.config.eval.prompt if prompt is None else prompt).tolist()
    print(
        f"{run.checkpoint}: {run.model.parameter_count():,} parameters after {run.step:,} steps, on {device}",
        file=sys.stderr,
    )
    show = stream_samples if settings.stream else print_samples
    show(run, settings, ids)


if __name__ == "__main__":
    run_main(main)
