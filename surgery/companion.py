"""What happens between the student's steps in phase 3: a surgeon proposes, held-out windows decide.

`Surgeries` is the companion of a training job (train_core.Companion): every so many optimiser steps a surgeon
proposes candidates, the best by its judge is tried on held-out windows, and kept when it gains more than their noise.
Source: DESIGN section 9.
"""

import json
import time
from pathlib import Path
from typing import Any

from surgery.commits import HeldOut, commit
from surgery.settings import AcceptConfig
from surgery.surgeon import RandomSurgeon, Round, Surgeon
from train_core import Job, is_every
from training.hardware import Hardware

SURGEON = "surgeon"
"""Folder of the surgeon inside a checkpoint."""
LOG = "surgeries.jsonl"


class Surgeries:
    """Operates on the student between its optimiser steps, and writes down every attempt.

    Each line of surgeries.jsonl is one trial: step, action, the judge's reward, gain and noise in nats, whether it
    was committed; the weights of a committed one are in surgeries/step-….safetensors. What is kept was chosen for its
    gain, which is therefore too high: a committed edit's line also has its gain on `unseen` windows, which decide
    nothing.
    """

    def __init__(
        self,
        surgeon: Surgeon | RandomSurgeon,
        held_out: HeldOut,
        unseen: HeldOut,
        settings: AcceptConfig,
        hardware: Hardware,
    ) -> None:
        self.surgeon, self.held_out, self.unseen = surgeon, held_out, unseen
        self.settings, self.hardware = settings, hardware
        self.trials = self.commits = 0

    def count(self, folder: Path) -> None:
        """Take over what was tried before, from surgeries.jsonl of a run that is resumed."""
        told = read_trials(folder)
        self.trials, self.commits = len(told), sum(trial["accepted"] for trial in told)

    def after_step(self, job: Job) -> None:
        """Operate where it is due."""
        if is_every(self.settings.every, job.state.step):
            self.operate(job)

    def operate(self, job: Job) -> None:
        """One round of proposals, and a trial of the best."""
        start = time.perf_counter()
        task, step, student = self.surgeon.task, job.state.step, job.objective.student
        found = self.surgeon.round()
        (action,) = task.surgeries(found.actions[found.best : found.best + 1])  # (L, r)
        trial = self.held_out.trial(student, task.operator, action, step, self.hardware)
        seconds = time.perf_counter() - start  # the price of surgery; what follows is bookkeeping
        accepted, elsewhere = trial.accepted(self.settings.z), dict[str, float]()
        if accepted:
            known = self.unseen.trial(student, task.operator, action, step, self.hardware)
            elsewhere = {"unseen_gain": known.gain, "unseen_noise": known.noise}
            commit(student, task.operator, action, job.folder / "surgeries" / f"step-{step:06d}.safetensors")
        self.trials, self.commits = self.trials + 1, self.commits + accepted
        line = {
            "step": step,
            "action": action.tolist(),
            "reward": float(found.evaluation.rewards[found.best]),
            "gain": trial.gain,
            "noise": trial.noise,
            "accepted": accepted,
            **elsewhere,
        }
        with open(job.folder / LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        job.recorder.write(self._line(job, found, line, seconds))
        if accepted:
            told = f"gain {trial.gain:+.5f} ± {trial.noise:.5f} nats held out, {elsewhere['unseen_gain']:+.5f} unseen"
            job.recorder.say(f"step {step:>6}  edit kept: {told}")

    def _line(self, job: Job, found: Round, trial: dict[str, Any], seconds: float) -> dict[str, float]:
        return {
            "step": job.state.step,
            "tokens": job.state.step * job.tokens_per_step,
            "seconds": job.state.seconds,
            **found.metrics,
            "surgery/gain": trial["gain"],
            "surgery/gain_noise": trial["noise"],
            "surgery/accepted": self.commits,
            "surgery/seconds": seconds,
        }

    def save(self, folder: Path) -> None:
        """Let the surgeon travel in a checkpoint."""
        self.surgeon.save(folder / SURGEON)


def read_trials(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's surgeries.jsonl; none where there is no such file."""
    path = folder / LOG
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
