"""The health of runs in words and colours: a mark with its word, and a table of the signs (DESIGN section 8).

The marks differ in shape, colour and word, so that each of the three is enough.
"""

import math
from collections.abc import Sequence

from bootstrap.thresholds import SIGNS, STATES, STATUS, State
from reporting.html import Html, markup, table
from reporting.numbers import number
from reporting.read import Run

SHAPES: dict[State, str] = {"ok": "●", "warn": "▲", "bad": "■"}


def mark(state: State) -> Html:
    """A state as a coloured shape and its word."""
    return Html(f'<span class="state {state}"><span aria-hidden="true">{SHAPES[state]}</span> {state}</span>')


def state_of(value: float) -> Html:
    """The mark of a logged `health/status`; a dash for what is none."""
    known = math.isfinite(value) and 0 <= value < len(STATES)
    return mark(STATES[int(value)]) if known else markup("—")


def worst(run: Run) -> str:
    """The worst state of a run and where it first was in it, in words; "" where all was well."""
    points = run.points(STATUS)
    found = max((p.value for p in points), default=0.0)
    if not 0 < found < len(STATES):
        return ""
    return f"{STATES[int(found)]} first at step {next(p.step for p in points if p.value == found):,.0f}"


def signs(runs: Sequence[Run], heads: Sequence[Html]) -> str:
    """A table of the signs that were measured: last value and its mark, a column for each run; "" without any."""
    rows = []
    for key, sign in SIGNS.items():
        if any(run.points(key) for run in runs):
            side = "≥" if sign.worse == "above" else "≤"
            named = sign.name[:1].upper() + sign.name[1:]
            rows.append([named, f"{side} {sign.warn:g}", f"{side} {sign.bad:g}", *(last(run, key) for run in runs)])
    over = heads if len(runs) > 1 else ["Last"]
    return table("Signs of health", ["Sign", "Warns at", "Bad at", *over], rows) if rows else ""


def last(run: Run, key: str) -> Html:
    """The last value of a sign, and the mark of that value alone."""
    points = run.points(key)
    if not points:
        return markup("—")
    value = points[-1].value
    return Html(f"{markup(number(value))} {mark(SIGNS[key].state(value))}")
