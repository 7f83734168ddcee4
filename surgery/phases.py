"""The three phases of a hybrid run, each of which goes on where it stands (DESIGN section 9).

Phase 1 trains the student by itself until it stagnates. Phase 2 lets the surgeon practise on the frozen student. Phase
3 forks phase 1 into arms that differ in who operates: the surgeon, nobody, or chance. Every function returns an exit
code: 0, or 128 + the signal that stopped it.
"""

import json
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from files import sync_folder, write_json
from model import GPT
from surgery.commits import HeldOut
from surgery.companion import SURGEON, Surgeries
from surgery.env import SurgeryTask
from surgery.settings import HybridConfig, PhaseConfig
from surgery.student import Shared, close, evaluations, finished, fork, frozen_student, newest, opened, read_record
from surgery.surgeon import RandomSurgeon, Surgeon
from train_core import Job, fit, is_every
from training.distributed import World
from training.plan import announce
from training.record import Recorder, start_wandb
from training.run_folder import trim_metrics
from training.signals import StopRequest, stop_on_signals

GRPO, PRACTICE, SAME_TIME = "grpo", "practice", "none-same-time"
ROUNDS_BETWEEN_SAVES = 10


def stagnated(losses: Sequence[float], phases: PhaseConfig) -> bool:
    """Whether the last `plateau_window` validation losses are, in the mean, hardly below as many before them.

    Means, not the best so far: at a constant rate neighbouring losses jump by about a hundredth of a nat, and one
    lucky evaluation followed by a few ordinary ones would pass for a plateau.
    """
    window = phases.plateau_window
    before, latest = losses[-2 * window : -window], losses[-window:]
    return len(before) == window and statistics.fmean(latest) > statistics.fmean(before) - phases.plateau_tolerance


def has_stagnated(folder: Path, phases: PhaseConfig) -> bool:
    """Whether the run in `folder` has, by its evaluations so far."""
    return stagnated([line["val/ce"] for line in evaluations(folder)], phases)


def grpo_alone(shared: Shared) -> int:
    """Phase 1: the student by itself, until it stagnates or its length is over."""
    folder, phases, every = shared.folder / GRPO, shared.hybrid.phases, shared.config.eval.every
    if finished(folder):
        return 0
    print("phase 1    the student alone", flush=True)
    with opened(shared, folder, phases.grpo_steps) as job:
        announce(shared.config, shared.record, shared.dataset, job.objective, shared.hardware, World(), folder)
        stagnant = has_stagnated(folder, phases)  # where it ended right after seeing that
        while job.state.step < phases.grpo_steps and not stagnant:
            ahead = (job.state.step // every + 1) * every if every else phases.grpo_steps
            job.until = min(ahead, phases.grpo_steps)
            if code := fit(job):
                return code
            stagnant = has_stagnated(folder, phases)
        close(job, stagnated=stagnant)
    how = "it stagnates" if stagnant else "its length is over, and it still learns"
    print(f"phase 1    ends at step {job.state.step}: {how}", flush=True)
    return 0


def task_of(shared: Shared, student: GPT) -> SurgeryTask:
    """Surgery on a student as this run's settings say; prompts come from the text that it trains on."""
    settings = shared.hybrid.surgery
    return SurgeryTask(student, shared.judge, shared.dataset.train, settings, shared.hardware.autocast)


def surgeon_of(shared: Shared, student: GPT) -> Surgeon:
    """An untrained surgeon."""
    hybrid, seed = shared.hybrid, shared.config.run.seed
    candidates = hybrid.surgery.candidates
    return Surgeon(hybrid.surgeon, task_of(shared, student), hybrid.agent, candidates=candidates, seed=seed)


def practise(shared: Shared) -> int:
    """Phase 2: the surgeon by itself on the frozen student."""
    folder, rounds = shared.folder / PRACTICE, shared.hybrid.phases.surgeon_rounds
    stood = latest_alone(folder)
    surgeon = surgeon_of(shared, frozen_student(shared, shared.folder / GRPO))
    if stood is not None:
        surgeon.load(stood[0])
    if stood is not None and surgeon.rounds >= rounds:
        return 0
    folder.mkdir(exist_ok=True)
    record = shared.record | {"id": f"{shared.record['id']}-2", "arm": PRACTICE, "until": rounds}
    write_json(folder / "config.json", record)
    trim_metrics(folder / "metrics.jsonl", surgeon.rounds if stood else -1)
    print("phase 2    the surgeon alone", flush=True)
    wandb = start_wandb(shared.config, folder, record, resume=stood is not None)
    with (
        Recorder(folder, first=True, steps=rounds, start=surgeon.rounds, wandb=wandb) as recorder,
        stop_on_signals() as stop,
    ):
        surgeon_alone(surgeon, rounds, folder, recorder, stop, stood[1] if stood else 0.0)
    return stop.exit_code if surgeon.rounds < rounds else 0


def both(shared: Shared, arm: str) -> int:
    """Phase 3: the student goes on, and the arm's surgeon operates."""
    folder, grpo = shared.folder / arm, shared.folder / GRPO
    if finished(folder):
        return 0
    until = read_record(grpo)["until"] + shared.hybrid.phases.both_steps
    fork(grpo, folder, arm=arm, until=until)
    print(f"phase 3    {arm}", flush=True)
    with opened(shared, folder, until) as job:
        if arm != "none":
            job.companion = surgeries(shared, arm, job)
        code = fit(job)
        if code == 0:
            close(job)
    return code


def surgeries(shared: Shared, arm: str, job: Job) -> Surgeries:
    """Whoever operates in an arm, as its newest checkpoint or phase 2 left them."""
    hybrid, config, student = shared.hybrid, shared.config, job.objective.student
    seed = config.run.seed
    surgeon: Surgeon | RandomSurgeon
    if arm == "surgeon":
        surgeon = surgeon_of(shared, student)
    else:
        surgeon = RandomSurgeon(task_of(shared, student), candidates=hybrid.surgery.candidates, seed=seed)
        surgeon.rounds = hybrid.phases.surgeon_rounds  # the scenes that the surgeon sees
    stored = newest(job.folder)
    practised = latest_alone(shared.folder / PRACTICE)
    if stored is not None and (stored / SURGEON).is_dir():
        surgeon.load(stored / SURGEON)
    elif arm == "surgeon" and practised is not None:
        surgeon.load(practised[0])
    block, windows = config.model.block_size, hybrid.accept.windows
    held_out = HeldOut(shared.held_out, block, windows=windows, seed=seed)
    unseen = HeldOut(shared.dataset.val, block, windows=min(windows, (len(shared.dataset.val) - 1) // block), seed=seed)
    found = Surgeries(surgeon, held_out, unseen, hybrid.accept, shared.hardware)
    found.count(job.folder)
    return found


def same_time_wanted(hybrid: HybridConfig) -> bool:
    """Whether somebody operates whose wall time the arm without surgery can be given."""
    return hybrid.same_time and {"surgeon", "none"} <= set(hybrid.arms)


def as_long_as_surgery(shared: Shared) -> int:
    """The arm with nobody, for the wall time that the surgeon's arm took, its practice included."""
    folder, none = shared.folder / SAME_TIME, shared.folder / "none"
    if finished(folder):
        return 0
    begun, plain = (finished(shared.folder / part) for part in (GRPO, "none"))
    assert begun and plain  # the parts before this one
    per_step = (plain["seconds"] - begun["seconds"]) / (plain["steps"] - begun["steps"])
    more = round(surgery_seconds(shared) / per_step)
    fork(none, folder, arm=SAME_TIME, until=plain["steps"] + more)
    until = read_record(folder)["until"]  # as decided when it was forked
    print(f"phase 3    {SAME_TIME}: {until - plain['steps']:,} more steps", flush=True)
    with opened(shared, folder, until) as job:
        code = fit(job)
        if code == 0:
            close(job)
    return code


def surgery_seconds(shared: Shared) -> float:
    """What practice and the operations of the surgeon's arm took: their own clock, not the difference of two arms."""
    practised = latest_alone(shared.folder / PRACTICE)
    lines = (shared.folder / "surgeon" / "metrics.jsonl").read_text().splitlines()
    operating = sum(json.loads(line).get("surgery/seconds", 0.0) for line in lines)
    return operating + (practised[1] if practised else 0.0)


def surgeon_alone(
    surgeon: Surgeon, rounds: int, folder: Path, recorder: Recorder, stop: StopRequest, seconds: float
) -> float:
    """Phase 2: let the surgeon practise up to `rounds` on the model as it is, unless stopped; returns seconds.

    `seconds` were spent before. The model does not change: candidates run as corrections beside its weights.
    """
    while surgeon.rounds < rounds and stop.signal is None:
        start = time.perf_counter()
        found = surgeon.round()
        seconds += time.perf_counter() - start
        recorder.write({"step": surgeon.rounds, "seconds": seconds, **found.metrics})
        recorder.advance(reward=f"{found.metrics['surgery/reward']:+.4f}")
        if surgeon.rounds == rounds or is_every(ROUNDS_BETWEEN_SAVES, surgeon.rounds) or stop.signal is not None:
            save_alone(surgeon, folder, seconds)
    return seconds


def save_alone(surgeon: Surgeon, folder: Path, seconds: float) -> None:
    """Write the surgeon of phase 2 below `folder`, whole or not at all, in place of older ones."""
    target = folder / f"round-{surgeon.rounds:06d}"
    temporary = folder / f".{target.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    surgeon.save(temporary)
    write_json(temporary / "seconds.json", seconds)
    sync_folder(temporary)
    temporary.rename(target)
    for older in folder.glob("round-*"):
        if older.name < target.name:
            shutil.rmtree(older)


def latest_alone(folder: Path) -> tuple[Path, float] | None:
    """The newest surgeon of phase 2 below `folder` and its seconds; None where there is none."""
    found = sorted(folder.glob("round-*"))
    return (found[-1], float(json.loads((found[-1] / "seconds.json").read_text()))) if found else None
