"""Look inside a run: at every token of a text, what student and critic proposed, and what the game paid for it.

    python explore.py runs/NAME                         a stretch of its validation text → runs/NAME/explore.html
    python explore.py runs/NAME --text "ROMEO: I am"    any text
    python explore.py runs/NAME --step 0                paid as in the first step of its schedules
    python explore.py runs/NAME --serve                 type texts in the browser (pip install gradio)

The page needs no network. Nothing of the text is left out of a counting critic's counts, so of training text it
knows what comes.
"""

import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from avatarl.build import frozen_critic
from avatarl.critics import Critic
from avatarl.loss import LossSettings
from avatarl.schedules import Schedules
from avatarl.trust import fit_trust
from cli import parse, run_main
from config import require
from data.prepare import Dataset
from evaluate import dataset_of
from exploring.app import serve
from exploring.game import Move, play
from exploring.page import data_of, page
from one_run import load_critics
from report import save_page
from sample import read_text
from training.hardware import Hardware, choose
from training.run_folder import LoadedRun, load_run


@dataclass(frozen=True)
class Settings:
    """Look inside a run, token by token."""

    run: tyro.conf.Positional[Path]
    """Folder of the run: runs/NAME."""
    text: Annotated[str | None, tyro.conf.arg(constructor=str, metavar="TEXT", help_behavior_hint="")] = None
    """Text to look at. By default a stretch of the run's validation text."""
    text_file: Path | None = None
    """UTF-8 file to look at instead."""
    at: float = 0.0
    """Where in the validation text the stretch begins, as a share of it."""
    tokens: int = 400
    """How many tokens of the text are looked at."""
    step: int | None = None
    """Step at which the schedules of the weights are read. Unset: the checkpoint's own."""
    alone: bool = False
    """Show the student alone, without its critic."""
    checkpoint: str = "best"
    """best (by validation loss), latest, or a name such as step-000500."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. auto takes a GPU when there is one."""
    out: Path | None = None
    """File to write. Unset: explore.html in the run's folder."""
    open: bool = False
    """Show the page in a browser."""
    serve: bool = False
    """Look at texts that are typed into a page in the browser."""

    def __post_init__(self) -> None:
        require(0 <= self.at < 1, "at", self.at, "use a share from 0 to below 1")
        require(self.tokens >= 2, "tokens", self.tokens, "use 2 or more: the first has nothing before it")
        require(self.step is None or self.step >= 0, "step", self.step, "use 0 or more")
        both = self.text is not None and self.text_file is not None
        require(not both, "text-file", self.text_file, "give this or --text, not both")


@dataclass(frozen=True)
class Table:
    """Everyone who plays: the student, its critic if one is asked, and the rules of a step."""

    run: LoadedRun
    hardware: Hardware
    rules: LossSettings
    critic: Critic | None = None

    def page(self, text: str, limit: int) -> tuple[str, list[Move]]:
        """The page about the first `limit` tokens of a text, and its moves. Raises ConfigError for a text too short."""
        ids = self.run.tokenizer.encode(text)[:limit]
        require(len(ids) >= 2, "text", text, "has fewer than two tokens; the first has nothing before it")
        with self.hardware.autocast():
            tokens = torch.as_tensor(ids.astype("int64"), device=self.hardware.device)
            moves = play(self.run.model, tokens, self.critic, self.rules)
        data = data_of(ids.tolist(), moves, lambda token: self.run.tokenizer.decode([token]))
        return page(f"{self.run.folder.name}, step {self.run.step:,}", self.facts(moves), data), moves

    def facts(self, moves: Sequence[Move]) -> dict[str, str]:
        """What stands above the text."""
        found = {"the student's loss here": f"{loss_of(moves, 1):.3f} nats"}
        if self.critic is None:
            return found | {"critic": "not asked"}
        s, c = self.rules, self.run.config
        kept = sum(bool(move.actions[0].reward) for move in moves) / len(moves)
        return found | {
            "the critic's": f"{loss_of(moves, 2):.3f} nats",
            "critic": c.critic.kind,
            "weights": f"w_r {float(s.reality_weight):.3g}, w_c {float(s.critic_weight):.3g}, ε {float(s.epsilon):.3g}",
            "rewards": f"{s.mean} mean, {s.sparsify.replace('_', ' ')}, {s.normalize}",
            "gold is paid": f"at {kept:.1%} of the tokens",
        }


def loss_of(moves: Sequence[Move], column: int) -> float:
    """The mean surprise at gold, nats, of the student (column 1 of an action) or the critic (2)."""
    p = torch.tensor([move.actions[0][column] for move in moves], dtype=torch.float64)
    return float(-p.clamp(min=1e-12).log().mean())


def table_of(run: LoadedRun, settings: Settings, dataset: Dataset | None, hardware: Hardware) -> Table:
    """The run at its table. Without a dataset, without a critic."""
    step = run.step if settings.step is None else settings.step
    method = run.config.method
    rules = Schedules(method, run.config.train.steps, hardware.device).settings(step)
    if dataset is None or run.config.train.objective != "avatarl":
        return Table(run, hardware, rules._replace(top_k=min(rules.top_k, run.model.vocab_size)))
    critic = critic_of(run, dataset, hardware)
    if method.critic_trust == "known":
        block = run.config.model.block_size
        trust = fit_trust(critic, dataset.train, run.model.vocab_size, block, hardware.device)
        rules = rules._replace(trust=trust)
    return Table(run, hardware, rules, critic)


def critic_of(run: LoadedRun, dataset: Dataset, hardware: Hardware) -> Critic:
    """The critic that judged the run. Raises ConfigError where it followed the student, or is gone."""
    c = run.config.critic
    fix = "the student's own past judged, which a checkpoint keeps for training alone; use --alone"
    require("self" not in c.members, "critic.kind", c.kind, fix)
    names = [Path(c.run)] if c.run else [run.folder.parent / "critics" / name for name in run.record.get("critics", [])]
    folders = names if "model" in c.members else []
    for folder in folders:
        there = (folder / "config.json").is_file()
        require(there, "critic", str(folder), "the run's critic is not there any more; restore it, or use --alone")
    frozen = load_critics(folders, dataset, hardware)
    size = run.model.vocab_size
    return frozen_critic(run.config, dataset.train, size, frozen, hardware.autocast, hardware.device, dataset.strings)


def text_of(settings: Settings, run: LoadedRun, dataset: Dataset | None) -> str:
    """The text to look at. Raises ConfigError where a file cannot be read."""
    if settings.text is not None:
        return settings.text
    if settings.text_file is not None:
        return read_text(settings.text_file, "text-file")
    assert dataset is not None
    start = min(int(settings.at * len(dataset.val)), len(dataset.val) - 2)
    return run.tokenizer.decode(dataset.val[start : start + settings.tokens].tolist())


def main(words: Sequence[str]) -> int:
    """Load, play, write the page; returns the exit code."""
    settings = parse(Settings, words, prog="explore.py", description=__doc__ or "")
    run = load_run(settings.run, settings.checkpoint)
    hardware = choose(replace(run.config.run, device=settings.device, compile="off"))
    run.model.to(hardware.device)
    given = settings.text is not None or settings.text_file is not None
    judged = run.config.train.objective == "avatarl" and not settings.alone
    dataset = dataset_of(run, None) if judged or not (given or settings.serve) else None
    table = table_of(run, settings, dataset if judged else None, hardware)
    text = "" if settings.serve and not given and dataset is None else text_of(settings, run, dataset)
    if settings.serve:
        serve(lambda typed: table.page(typed, settings.tokens)[0], text, run.folder.name)
        return 0
    document, moves = table.page(text, settings.tokens)
    out = settings.out or settings.run / "explore.html"
    save_page(out, document, "page")
    print("  ".join(f"{name}: {value}" for name, value in table.facts(moves).items()))
    print(f"page: {out}")
    if settings.open:
        webbrowser.open(out.resolve().as_uri())
    return 0


if __name__ == "__main__":
    run_main(main)
