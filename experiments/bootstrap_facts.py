"""What the bootstrapping runs are there to show, and whether they do: every fact looks at finished runs.

    python -m experiments.bootstrapping          trains the runs, and writes down what FACTS makes of them

A fact names the entries that it needs and says, of their runs with one seed, whether it holds and by which numbers.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.arms import Outcome, lines
from experiments.study import Row

IN_TIME = 200
"""Steps within which the health monitor has to call a collapse bad."""
REWARDS = ("bootstrap/reward_mean", "train/reward")
"""Their plain mean over all actions, and what the policy expects of them."""
BAD = 2
"""`health/status` of what is bad."""


def rungs(outcome: Outcome) -> dict[int, dict[str, float]]:
    """The ladder beside a run: {context: {"ce", "accuracy"}}; empty where it has none."""
    path = outcome.folder / "ladder.json"
    return {int(rung["context"]): rung for rung in json.loads(path.read_text())} if path.is_file() else {}


def passed(outcome: Outcome, context: int) -> float | None:
    """Training seconds at the first evaluation that beats a rung in accuracy and cross-entropy; None: never."""
    rung = rungs(outcome).get(context)
    if rung is None:
        return None
    for e in outcome.evaluations:
        if e["val/accuracy"] >= rung["accuracy"] and e["val/ce"] <= rung["ce"]:
            return float(e["seconds"])
    return None


def noticed(outcome: Outcome) -> int | None:
    """The first step at which the health monitor calls the run bad; None: never."""
    found = [line["step"] for line in lines(outcome.folder, "health/status") if line["health/status"] >= BAD]
    return found[0] if found else None


def curve(folder: Path, key: str) -> list[tuple[float, float]]:
    """(tokens, value) of every line of a run that holds `key`."""
    return [(float(line["tokens"]), float(line[key])) for line in lines(folder, key)]


def quarters(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The mean of a curve over the second quarter of its run, and over the last. NaN where nothing was measured."""
    end = points[-1][0]
    parts = [[v for x, v in points if low * end < x <= high * end] for low, high in ((0.25, 0.5), (0.75, 1.0))]
    second, last = (statistics.fmean(part) if part else float("nan") for part in parts)
    return second, last


Seen = tuple[bool, str]


class Fact(NamedTuple):
    """A claim about the runs of some entries."""

    claim: str
    entries: tuple[str, ...]
    look: Callable[..., Seen]
    """Whether it holds for these entries' runs with one seed, and the numbers that say so."""


def collapses(run: Outcome) -> Seen:
    """Below the bigram in accuracy, and above the untrained policy in cross-entropy."""
    end, bigram, first = run.final, rungs(run)[1]["accuracy"], run.evaluations[0]["val/ce"]
    said = f"accuracy {end['val/accuracy']:.1%} (bigram {bigram:.1%}), cross-entropy {end['val/ce']:.2f} nats from "
    said += f"{first:.2f}, calibration error {end['val/ece']:.2f}"
    return end["val/accuracy"] < bigram and end["val/ce"] > first, said


def caught(run: Outcome) -> Seen:
    """Called bad in time."""
    step = noticed(run)
    return step is not None and step <= IN_TIME, "never called bad" if step is None else f"bad at step {step}"


def climbs(run: Outcome) -> Seen:
    """Past the bigram, and never called bad."""
    end = run.final
    said = f"accuracy {end['val/accuracy']:.1%}, cross-entropy {end['val/ce']:.2f} nats, {caught(run)[1]}"
    return passed(run, 1) is not None and noticed(run) is None, said


def peaks(run: Outcome) -> Seen:
    """Best as a model of text long before the end, which is worse by more than a tenth of a nat."""
    best, end = run.best, run.final
    said = f"cross-entropy {best['val/ce']:.2f} nats at step {best['step']}, {end['val/ce']:.2f} at step "
    said += f"{end['step']}; accuracy {best['val/accuracy']:.1%}, then {end['val/accuracy']:.1%}"
    return best["step"] > 0 and end["val/ce"] > best["val/ce"] + 0.1, said


def stalls(run: Outcome) -> Seen:
    """From the second quarter to the last the expected reward grows by a tenth, and accuracy by less than a point."""
    reward, accuracy = (quarters(curve(run.folder, key)) for key in ("train/reward", "val/accuracy"))
    said = f"expected reward {reward[0]:.2f}, then {reward[1]:.2f}; accuracy {accuracy[0]:.1%}, then {accuracy[1]:.1%}"
    return reward[1] > 1.1 * reward[0] and accuracy[1] < accuracy[0] + 0.01, said


def says_nothing(run: Outcome) -> Seen:
    """The plain mean of the rewards moves by less than a twentieth of what the expected reward moves by."""
    plain, expected = ([v for _, v in curve(run.folder, key)] for key in REWARDS)
    first, last = run.evaluations[0]["val/accuracy"], run.final["val/accuracy"]
    said = f"plain mean {min(plain):.4f} to {max(plain):.4f}; expected reward {min(expected):.3f} to "
    said += f"{max(expected):.3f}; accuracy {first:.1%} to {last:.1%}"
    return max(plain) - min(plain) < 0.05 * (max(expected) - min(expected)), said


def earlier(run: Outcome, other: Outcome) -> Seen:
    """Ahead in accuracy at the first evaluation after a quarter of the run."""
    at = next(e["tokens"] for e in run.evaluations if e["tokens"] >= run.final["tokens"] / 4)
    mine, theirs = (
        next(e["val/accuracy"] for e in o.evaluations if e["tokens"] >= at or e is o.final) for o in (run, other)
    )
    return mine > theirs, f"accuracy {mine:.1%} against {theirs:.1%} after {at:,.0f} tokens"


def sickens(run: Outcome, other: Outcome) -> Seen:
    """The other ends with more than twice the calibration error, and is called bad."""
    mine, theirs = run.final["val/ece"], other.final["val/ece"]
    said = f"calibration error {mine:.2f} against {theirs:.2f}, {caught(other)[1]}"
    return theirs > 2 * mine and noticed(other) is not None, said


def graduates(run: Outcome) -> Seen:
    """The last stage is reached, and the bigram passed."""
    begun: dict[int, int] = {}
    for line in lines(run.folder, "bootstrap/stage"):
        begun.setdefault(int(line["bootstrap/stage"]), line["step"])
    said = "stages seen from step " + ", ".join(str(step) for step in begun.values())
    return max(begun) == 4 and passed(run, 1) is not None, f"{said}; accuracy {run.final['val/accuracy']:.1%}"


def wins(run: Outcome, other: Outcome) -> Seen:
    """More decisions won against its past than lost, in the last quarter."""
    rate = quarters(curve(run.folder, "bootstrap/win_rate"))[1]
    mine, theirs = run.final["val/ce"], other.final["val/ce"]
    return rate > 0.5, f"{rate:.1%} won; cross-entropy {mine:.3f} nats, without an opponent {theirs:.3f}"


def ends_lower(run: Outcome, other: Outcome) -> Seen:
    """Lower cross-entropy at the end."""
    mine, theirs = run.final["val/ce"], other.final["val/ce"]
    return mine < theirs, f"{mine:.3f} nats against {theirs:.3f}"


def in_seconds(run: Outcome) -> Seen:
    """The bigram within 15 s of training, the trigram within 45 s, the 4-gram within 300 s."""
    found = [passed(run, context) for context in (1, 2, 3)]
    said = ", ".join("never" if s is None else f"{s:.1f} s" for s in found)
    return all(s is not None and s <= most for s, most in zip(found, (15, 45, 300), strict=True)), said


def above_all(run: Outcome) -> Seen:
    """Better than every rung of the ladder in both numbers."""
    end, ladder = run.final, rungs(run).values()
    most, least = max(rung["accuracy"] for rung in ladder), min(rung["ce"] for rung in ladder)
    said = f"accuracy {end['val/accuracy']:.1%} ({most:.1%}), cross-entropy {end['val/ce']:.3f} nats ({least:.3f}), "
    said += f"after {end['seconds']:.0f} s"
    return end["val/accuracy"] > most and end["val/ce"] < least, said


FACTS = (
    Fact("gold alone, by the exact gradient, collapses", ("exhaustive",), collapses),
    Fact(f"the health monitor calls it bad within {IN_TIME} steps", ("exhaustive",), caught),
    Fact("the same rewards do not collapse with weights free of π", ("exhaustive, weights free of π",), climbs),
    Fact("the plain mean of the rewards says nothing of growth", ("exhaustive, weights free of π",), says_nothing),
    Fact("imitation of bigrams peaks and then falls", ("bigrams alone, exact gradient",), peaks),
    Fact("scaled confidence raises the reward, not accuracy", ("confidence",), stalls),
    Fact("guidance shows samples where rewards are", ("sampled", "sampled, no guidance"), earlier),
    Fact("KL keeps samples from collapse", ("sampled", "sampled, weak KL"), sickens),
    Fact("the curriculum goes through all five stages", ("curriculum",), graduates),
    Fact("self-play beats its own past", ("selfplay", "self-play, no opponent"), wins),
    Fact("gold and n-grams pass bigram, trigram, 4-gram in time", ("best",), in_seconds),
    Fact("given longer, they end above every order of the ladder", ("best, three times as long",), above_all),
    Fact("rewards for every character beat gold alone", ("best", "best, gold alone"), ends_lower),
)
"""In the order of docs/bootstrapping.md."""


def told(rows: Sequence[Row]) -> list[str]:
    """A table of the facts whose entries are among the rows, with the numbers of every seed."""
    by_label = {row.entry.label: row.outcomes for row in rows}
    said = ["## What the runs show", "", "| claim | by the runs | holds in | figures, seed by seed |"]
    said.append("|---|---|---|---|")
    for fact in FACTS:
        if all(label in by_label for label in fact.entries):
            seen = [fact.look(*runs) for runs in zip(*(by_label[label] for label in fact.entries), strict=True)]
            held = f"{sum(holds for holds, _ in seen)} of {len(seen)}"
            said.append(
                f"| {fact.claim} | {'; '.join(fact.entries)} | {held} | {'; '.join(words for _, words in seen)} |"
            )
    return said
