"""Runs that are over in a moment: a generated corpus, tiny settings, and what a run left behind."""

import contextlib
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor

import cli
import train
import train_core

ROOT = Path(__file__).resolve().parent.parent
SAYING = "the king and queen of winter went to sea with a crown, nor did they ever come home again"
# What two runs of the same settings may differ in.
CLOCKS = {"seconds", "train/tokens_per_second", "train/utilisation", "train/peak_memory_gb"}

PRESET = "protocol-avatarl"  # DESIGN section 3's, which no tuning of the default preset changes
TINY: dict[str, Any] = {
    "run.device": "cpu",
    "run.dtype": "float32",
    "run.compile": "off",
    "run.threads": 1,
    "model.n-layer": 1,
    "model.n-head": 2,
    "model.n-embd": 16,
    "model.block-size": 16,
    "critic.kind": "ngram",
    "critic.ngram-context": 2,
    "method.top-k": 4,
    "train.steps": 8,
    "train.batch-size": 4,
    "train.checkpoint-every": 0,
    "optim.warmup-steps": 2,
    "eval.every": 4,
    "eval.ladder": 2,
    "eval.sample-tokens": 5,
    "log.every": 1,
}


def write_corpus(path: Path, words: int = 700, seed: int = 0) -> Path:
    """A text of lines of a few words each, some 5 characters a word, the same for the same seed."""
    draw, vocabulary = random.Random(seed), SAYING.split()
    text = "".join(draw.choice(vocabulary) + (" " if draw.random() < 0.85 else "\n") for _ in range(words))
    path.write_text(text, encoding="utf-8")
    return path


def flags(**settings: Any) -> list[str]:
    """TINY with changes, as flags: train_steps=4 is --train.steps 4, model_bias=True is --model.bias."""
    changed = {name.replace("_", ".", 1).replace("_", "-"): value for name, value in settings.items()}
    words = []
    for name, value in (TINY | changed).items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The `error:` lines."""
        return [line for line in self.err.splitlines() if line.startswith("error:")]


def here(*words: str, main: Any = train.main) -> Outcome:
    """A script's main in this process, ended as its command line would be."""
    out, err = io.StringIO(), io.StringIO()
    old = sys.argv
    sys.argv = ["train.py", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.run_main(main)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.argv = old
    return Outcome(code, out.getvalue(), err.getvalue())


def trained(name: str, preset: str = PRESET, **settings: Any) -> Path:
    """A finished run of that name on corpus.txt, below runs/ of the working directory; see `flags`."""
    outcome = here(preset, *flags(run_name=name, data_corpus="corpus.txt", **settings))
    assert outcome.code == 0, outcome.err
    return Path("runs") / name


@contextlib.contextmanager
def before_step(step: int, action: Callable[[train_core.Job], None]) -> Iterator[None]:
    """Within the block a training loop does `action` right before it learns from the batch of `step` (0-based)."""
    learn = train_core.learn

    def watched(job: train_core.Job, *rest: Any, **options: Any) -> Any:
        if job.state.step == step:
            action(job)
        return learn(job, *rest, **options)

    with mock.patch.object(train_core, "learn", watched):
        yield


def crash(job: train_core.Job) -> None:
    """Die as from a full disk or a lost machine: nothing is saved."""
    raise RuntimeError("the lights went out")


def elsewhere(
    *words: Any, cwd: Path, script: str = "train.py", launcher: Sequence[str] = (), timeout: float = 60
) -> Outcome:
    """A script in a process of its own, or in those of a launcher such as `-m torch.distributed.run`."""
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / script), *map(str, words)],
        cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


def environment() -> dict[str, str]:
    """This process's environment, for tiny runs in others: one thread each."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def lines(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what the clock decides."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in found]


def weights(run: Path, step: int = TINY["train.steps"]) -> dict[str, Tensor]:
    """The student's weights after `step` steps."""
    stored = load_file(run / "checkpoints" / f"step-{step:06d}" / "model.safetensors")
    return {name: tensor.clone() for name, tensor in stored.items()}  # load_file maps the file, which may change


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def files_below(folder: Path) -> set[str]:
    """Everything that lies there, hidden or not."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
