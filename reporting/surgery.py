"""What surgery did, in words and tables: the verdict over one or several hybrid runs, and report.md of one.

A hybrid run (hybrid.py) is a folder of run folders, its arms, with a result.json that compares them. A gain is the
cross-entropy of the arm without surgery minus that of another, so that positive is better; over seeds the differences
are paired. Source: DESIGN section 9.
"""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reporting.html import markup
from reporting.html import table as html_table
from reporting.numbers import compact, duration, percent

Result = dict[str, Any]
ARMS = {
    "surgeon": "surgeon",
    "none": "nobody, same tokens",
    "none-same-time": "nobody, same wall time",
    "random": "random edits",
}
"""Folder of each arm, and what it is called."""
PARTS = ("grpo", "practice", *ARMS)
STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""97.5 % quantiles of Student's t for 1 to 10 degrees of freedom; the last is on the safe side beyond."""


class Comparison(NamedTuple):
    """The surgeon's arm against another: mean gain in nats, its standard error, and the 95 % interval's half width."""

    against: str
    gain: float
    noise: float
    half: float

    @property
    def word(self) -> str:
        """improvement, none or harm, as the interval says."""
        if self.gain > self.half:
            return "improvement"
        return "harm" if self.gain < -self.half else "none"


def is_hybrid(folder: Path) -> bool:
    """Whether a folder is a run of hybrid.py."""
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and "hybrid" in record and "arm" not in record


def parts_of(folder: Path) -> list[Path]:
    """The run folders of a hybrid run that phase 3 has made, or those of the phases before where it has not begun."""
    there = [folder / name for name in PARTS if (folder / name / "metrics.jsonl").is_file()]
    return [part for part in there if part.name in ARMS] or there


def read_result(folder: Path) -> Result | None:
    """A hybrid run's result.json; None where it is not complete or not readable."""
    try:
        found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if _is_result(found) else None


MEASURED = {"steps", "seconds", "val_ce", "val_accuracy", "val_ece", "ce_jumps"}
"""What result.json says of every arm."""


def _is_result(found: Any) -> bool:
    arms = found.get("arms") if isinstance(found, dict) else None
    if not isinstance(arms, dict) or "phase_1" not in found:
        return False
    return all(isinstance(arm, dict) and arm.keys() >= MEASURED for arm in arms.values())


def compared(results: Sequence[Result], against: str) -> Comparison | None:
    """The surgeon's arm against another over the results that have both; None where there is none.

    With one seed the noise is that of the validation text, with more that of the seeds.
    """
    pairs = [(r["arms"]["surgeon"], r["arms"][against]) for r in results if {"surgeon", against} <= r["arms"].keys()]
    if not pairs:
        return None
    gains = [lead(operated, other) for operated, other in pairs]
    if len(gains) == 1:
        noises = [arm.get("gain_noise", 0.0) for arm in pairs[0]]
        noise = max(noises) if against == "none" else math.hypot(*noises)
        return Comparison(against, gains[0], noise, 2 * noise)
    noise = statistics.stdev(gains) / math.sqrt(len(gains))
    quantile = STUDENT_T[min(len(gains) - 1, len(STUDENT_T)) - 1]
    return Comparison(against, statistics.fmean(gains), noise, quantile * noise)


def lead(operated: dict[str, Any], other: dict[str, Any]) -> float:
    """By how many nats one arm is better than another of its run: over the same windows, where both were compared."""
    if "gain" in operated:  # over nobody, whose own is 0
        return operated["gain"] - other.get("gain", 0.0)
    return other["val_ce"] - operated["val_ce"]


def verdict(results: Sequence[Result]) -> str:
    """What surgery did to the student, in a few sentences."""
    found = [c for arm in ("none", "none-same-time", "random") if (c := compared(results, arm)) is not None]
    if not found or found[0].against != "none":
        return "No verdict: it takes the arm with the surgeon and the one with nobody."
    seeds = len(results)
    said = {
        "improvement": "Improvement: surgery lowers the validation cross-entropy",
        "none": "None: surgery makes no difference beyond the noise",
        "harm": "Harm: surgery raises the validation cross-entropy",
    }[found[0].word]
    text = f"{said}: gain {told(found[0])} against nobody operating on the same number of tokens."
    for other in found[1:]:
        text += f" Against {ARMS[other.against]}: {told(other)} ({other.word})."
        if other.against == "none-same-time" and other.word == "harm":
            text += " Further steps are the better use of the time."
        if other.against == "random" and other.word != "improvement" and found[0].word == "improvement":
            text += " Chance under the same rule does as well: what helps is the selection, not what was learned."
    moving = sum(not r["phase_1"]["stagnated"] for r in results)
    if moving:
        where = "" if seeds == 1 else f" with {moving} of {seeds} seeds"
        text += f" Phase 1 had not stagnated{where}: what surgery does on a plateau stays open."
    if seeds == 1:
        text += " One seed: the noise (two standard errors) is the validation text's alone, not that of other seeds."
    else:
        text += f" {seeds} seeds, paired; ± is the 95 % interval by Student's t."
    return text


def told(found: Comparison) -> str:
    """A gain with its interval; above 0 is better."""
    return f"{found.gain:+.4f} ± {found.half:.4f} nats"


def markdown(folder: Path) -> str:
    """report.md of a finished hybrid run. Raises ValueError for one that is not."""
    result = read_result(folder)
    if result is None:
        raise ValueError(f"{folder} has no result yet")
    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    corpus, commit = record["corpus"]["name"], str(record.get("git", {}).get("commit", "unknown"))[:12]
    settings = record["hybrid"]
    lines = [
        f"# Surgery: {folder.name}",
        "",
        f"**{verdict([result])}**",
        "",
        f"`{record['command']}` on {record['hardware']['processor']}, torch {record['versions']['torch']}, commit "
        f"{commit}; corpus {corpus}, {compact(record['parameters'])} parameters, seed {result['seed']}.",
        "",
        *table([result]),
        "",
        "Gain: cross-entropy of nobody (same tokens) minus this arm's, over the same validation windows, ± one "
        "standard error; above 0 is better. Jumps: standard deviation of the differences between neighbouring "
        "evaluations of phase 3.",
        "",
        f"- {told_phase_1(result['phase_1'], settings['phases'])}",
        *([f"- {told_phase_2(result['phase_2'])}"] if result["phase_2"] else []),
        f"- {told_phase_3(result, settings)}",
    ]
    return "\n".join(lines) + "\n"


def table(results: Sequence[Result]) -> list[str]:
    """The arms side by side, in Markdown: of one run, or the means over several ± the standard deviation."""
    rows = [
        "| phase 3 with | steps | time | val CE, nats | gain, nats | accuracy | ECE | CE jumps | edits kept |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, title in ARMS.items():
        arms = [r["arms"][name] for r in results if name in r["arms"]]
        if not arms:
            continue
        cells = [
            f"{statistics.fmean(a['steps'] for a in arms):,.0f}",
            duration(statistics.fmean(a["seconds"] for a in arms)),
            spread([a["val_ce"] for a in arms], 4),
            gain_cell(arms),
            percent(statistics.fmean(a["val_accuracy"] for a in arms), 2),
            spread([a["val_ece"] for a in arms], 4),
            spread([a["ce_jumps"] for a in arms if a["ce_jumps"] is not None], 4),
            "" if name.startswith("none") else kept_cell(arms),
        ]
        rows.append(f"| {title} | {' | '.join(cells)} |")
    return rows


def kept_cell(arms: Sequence[dict[str, Any]]) -> str:
    """How many edits were kept of those that were tried."""
    return f"{sum(a['accepted'] for a in arms)} of {sum(a['trials'] for a in arms)}"


def gain_cell(arms: Sequence[dict[str, Any]]) -> str:
    """The gain over nobody: of one run ± its standard error, of several their mean ± the standard deviation."""
    gains = [a["gain"] for a in arms if "gain" in a]
    if len(gains) == 1:
        noise = next(a["gain_noise"] for a in arms if "gain" in a)
        return f"{gains[0]:+.4f} ± {noise:.4f}"
    return spread(gains, 4, "+")


def spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Mean ± standard deviation; one value as it is; none as a dash."""
    if not values:
        return "—"
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def section(folders: Sequence[Path]) -> str:
    """Verdict and arms of several hybrid runs as markup; "" where none is complete."""
    results = [result for folder in folders if (result := read_result(folder)) is not None]
    if not results:
        return ""
    head, _, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in table(results))
    over = "" if len(results) == 1 else f" over {len(results)} seeds, means ± standard deviations"
    arms = html_table("Arms of phase 3", head, rows)
    return f"<section><h2>Surgery{over}</h2><p>{markup(verdict(results))}</p>{arms}</section>"


def told_phase_1(found: dict[str, Any], phases: dict[str, Any]) -> str:
    """Phase 1 in words."""
    window, tolerance = phases["plateau_window"], phases["plateau_tolerance"]
    how = (
        f"stagnated: the last {window} evaluations are less than {tolerance:g} nats better than the {window} before, "
        "mean against mean"
        if found["stagnated"]
        else "still learned when its length was over"
    )
    return (
        f"Phase 1, the student alone: {found['steps']:,} steps, validation cross-entropy {found['val_ce']:.4f}, "
        f"accuracy {percent(found['val_accuracy'], 2)}; it {how}."
    )


def told_phase_2(found: dict[str, Any]) -> str:
    """Phase 2 in words: first quarter → last quarter."""
    names = {"reward": "reward", "action_size": "size of an action", "q_value": "Q", "alpha": "entropy weight"}
    parts = [f"{title} {found[key][0]:+.4f} → {found[key][1]:+.4f}" for key, title in names.items() if key in found]
    noise = f" (last reward ± {found['reward_noise']:.4f})" if found["reward_noise"] is not None else ""
    return (
        f"Phase 2, the surgeon alone on the frozen student: {found['evaluations']:,} surgeries in "
        f"{duration(found['seconds'])}; first quarter → last quarter: {', '.join(parts)}{noise}."
    )


def told_phase_3(result: Result, settings: dict[str, Any]) -> str:
    """Phase 3 in words."""
    accept, begun = settings["accept"], result["phase_1"]
    said = [
        f"Phase 3, both: every {accept['every']} steps the best of {settings['surgery']['candidates']} proposals was "
        f"tried on {accept['windows']} held-out windows, and kept above {accept['z']:g} standard errors."
    ]
    for name in ("surgeon", "random"):
        if arm := result["arms"].get(name):
            said.append(
                f"{ARMS[name].capitalize()}: {arm['accepted']} of {arm['trials']} kept, together worth "
                f"{arm['accepted_gain']:+.4f} nats on the windows that chose them, "
                f"{arm['unseen_gain']:+.4f} on as many of the validation text, which decides nothing."
            )
    if arm := result["arms"].get("none"):
        said.append(
            f"Without surgery the student's cross-entropy went from {begun['val_ce']:.4f} to {arm['val_ce']:.4f} in "
            f"the same {arm['steps'] - begun['steps']:,} steps: that is how flat the plateau is."
        )
    if arm := result["arms"].get("surgeon"):
        said.append(
            f"Accuracy went from {percent(begun['val_accuracy'], 2)} at the end of phase 1 to "
            f"{percent(arm['val_accuracy'], 2)} with the surgeon."
        )
    return " ".join(said)
