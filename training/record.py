"""Where a run's numbers go: metrics.jsonl always, Weights & Biases when asked, the bar and the screen.

Losing the network, or wandb itself, never costs a run its record.
"""

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from config import Config, ConfigError


def require_wandb(config: Config) -> None:
    """Raise ConfigError when wandb is asked for and not installed."""
    if config.log.wandb != "disabled" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"log.wandb = {config.log.wandb!r}: wandb is not installed; run `.venv/bin/pip install wandb`"
        )


def start_wandb(config: Config, folder: Path, record: Mapping[str, Any], *, resume: bool) -> Any:
    """A wandb run for this folder, or None when disabled or out of reach (with a warning)."""
    if config.log.wandb == "disabled":
        return None
    try:
        import wandb

        return wandb.init(
            project=config.log.wandb_project,
            name=folder.name,
            id=record["id"],
            dir=str(folder),
            mode=config.log.wandb,
            config=dict(record),
            resume="allow" if resume else None,
        )
    except Exception as error:  # wandb raises many kinds; none may stop the training
        print(f"warning: wandb is out of reach ({error}); metrics.jsonl goes on", file=sys.stderr)
        return None


class Recorder:
    """Writes lines of metrics, moves the bar and says what a person should see. Silent on other ranks."""

    def __init__(self, folder: Path, *, first: bool, steps: int, start: int, wandb: Any = None) -> None:
        self.folder, self.first, self._wandb = folder, first, wandb
        self._shown: dict[str, str] = {}
        self._file = open(folder / "metrics.jsonl", "a", encoding="utf-8") if first else None  # noqa: SIM115
        # tqdm disables itself where nobody watches (disable=None: not a terminal).
        self._bar = tqdm(total=steps, initial=start, unit="step", disable=None if first else True, dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._file:
            self._file.close()
        self._tell(lambda wandb: wandb.finish(exit_code=0 if kind is None else 1))

    def write(self, line: Mapping[str, float]) -> None:
        """Append one line of metrics. A value that is not finite is written as a string: JSON has no NaN."""
        if self._file is None:
            return
        clean = {k: v if math.isfinite(v) else str(v) for k, v in line.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        self._tell(lambda wandb: wandb.log(dict(line), step=int(line["step"])))

    def _tell(self, what: Callable[[Any], object]) -> None:
        """Tell wandb, unless it is off or has failed once."""
        if self._wandb is None:
            return
        try:
            what(self._wandb)
        except Exception as error:  # wandb raises many kinds; none may stop the training
            self._wandb = None
            self.warn(f"wandb failed ({error}); metrics.jsonl goes on")

    def advance(self, **shown: str) -> None:
        """Move the bar by one step and update what stands behind it."""
        if self._bar.disable:
            return
        if shown:
            self._shown.update(shown)
            self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.first:
            tqdm.write(text)
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        """Print a warning above the bar, on the error stream."""
        if self.first:
            tqdm.write(f"warning: {text}", file=sys.stderr)
