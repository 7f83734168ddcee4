"""What a hybrid run comes to: its arms compared on every validation window, as result.json and as reports.

All arms have seen the same tokens (but the one that was given more time), so their final weights are compared window
by window. The noise of that comparison is the validation text's, not the seeds': for a claim about surgery run
several seeds (`python -m experiments.surgery`).
"""

import itertools
import json
import statistics
import sys
from typing import Any

from files import write_atomic, write_json
from report import write_report
from reporting.surgery import markdown, verdict
from surgery.commits import compare
from surgery.companion import read_trials
from surgery.phases import GRPO, PRACTICE, SAME_TIME, latest_alone, same_time_wanted
from surgery.student import Shared, evaluations, finished, read_record, validation_losses


def conclude(shared: Shared) -> None:
    """Compare the arms on every validation window; write result.json, report.md and report.html; say the verdict."""
    folder = shared.folder
    arms = [*shared.hybrid.arms, *([SAME_TIME] if same_time_wanted(shared.hybrid) else [])]
    losses = {arm: validation_losses(shared, folder / arm) for arm in arms}
    result: dict[str, Any] = {"seed": shared.config.run.seed, "surgeon": shared.hybrid.surgeon}
    result |= {"phase_1": phase_1(shared), "phase_2": phase_2(shared), "arms": {}}
    for arm in arms:
        told = arm_result(shared, arm)
        if arm != "none" and "none" in losses:
            gain = compare(losses["none"], losses[arm])
            told |= {"gain": gain.gain, "gain_noise": gain.noise}
        result["arms"][arm] = told
    write_json(folder / "result.json", result)
    write_atomic(folder / "report.md", markdown(folder))
    print("\n" + verdict([result]))
    print(f"report: {folder / 'report.md'}")
    try:
        print(f"report: {write_report([folder], folder / 'report.html')}")
    except Exception as error:  # a page that cannot be drawn costs no run
        print(f"warning: no report.html ({type(error).__name__}: {error})", file=sys.stderr)


def phase_1(shared: Shared) -> dict[str, Any]:
    """How far the student came alone, and whether it stagnated."""
    folder = shared.folder / GRPO
    final, told = evaluations(folder)[-1], finished(folder)
    assert told is not None  # the phases after it have run
    return {
        "steps": told["steps"],
        "seconds": told["seconds"],
        "stagnated": bool(read_record(folder).get("stagnated")),
        "val_ce": final["val/ce"],
        "val_accuracy": final["val/accuracy"],
    }


def phase_2(shared: Shared) -> dict[str, Any] | None:
    """What the surgeon learned by itself: means over the first and the last quarter of its rounds."""
    folder = shared.folder / PRACTICE
    stood = latest_alone(folder)
    if stood is None:
        return None
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    quarter = max(1, len(lines) // 4)
    told: dict[str, Any] = {
        "rounds": len(lines),
        "evaluations": len(lines) * shared.hybrid.surgery.candidates,
        "seconds": stood[1],
    }
    for name in ("reward", "action_size", "q_value", "alpha"):
        key = f"surgery/{name}"
        if key in lines[0]:
            told[name] = [statistics.fmean(line[key] for line in some) for some in (lines[:quarter], lines[-quarter:])]
    rewards = [line["surgery/reward"] for line in lines[-quarter:]]
    told["reward_noise"] = statistics.stdev(rewards) / quarter**0.5 if quarter > 1 else None
    return told


def arm_result(shared: Shared, arm: str) -> dict[str, Any]:
    """One arm's end, and how much its evaluations jumped about in phase 3."""
    folder, begun = shared.folder / arm, read_record(shared.folder / GRPO)["until"]
    told, trials = finished(folder), read_trials(folder)
    assert told is not None
    phase = [line for line in evaluations(folder) if line["step"] >= begun]
    final = phase[-1]
    return {
        "steps": told["steps"],
        "tokens": told["tokens"],
        "seconds": told["seconds"],
        "val_ce": final["val/ce"],
        "val_accuracy": final["val/accuracy"],
        "val_ece": final["val/ece"],
        "trials": len(trials),
        "accepted": sum(trial["accepted"] for trial in trials),
        "accepted_gain": sum(trial["gain"] for trial in trials if trial["accepted"]),
        "unseen_gain": sum(trial["unseen_gain"] for trial in trials if trial["accepted"]),
        "ce_jumps": jumps([line["val/ce"] for line in phase]),
        "accuracy_jumps": jumps([line["val/accuracy"] for line in phase]),
    }


def jumps(values: list[float]) -> float | None:
    """Standard deviation of the differences between neighbours; None for fewer than two differences."""
    steps = [b - a for a, b in itertools.pairwise(values)]
    return statistics.stdev(steps) if len(steps) > 1 else None
