"""How a setting is refused: one kind of error, which names the field, its value and the way out."""

import math
import typing
from typing import Literal


class ConfigError(ValueError):
    """A setting that cannot work. The message names the field, its value and what to do."""


def require(ok: bool, name: str, value: object, fix: str) -> None:
    """Raise ConfigError for field `name` unless `ok`; `fix` says what to do instead."""
    if not ok:
        raise ConfigError(f"{name} = {value!r}: {fix}")


def check_fields(group: str, settings: object) -> None:
    """Raise ConfigError for a choice that isn't offered or a number that isn't finite.

    The command line knows the choices; configs also come from code and from a run's config.json.
    """
    for name, hint in typing.get_type_hints(type(settings)).items():
        value, label = getattr(settings, name), f"{group}.{name}".replace("_", "-")
        if typing.get_origin(hint) is Literal:
            choices = typing.get_args(hint)
            require(value in choices, label, value, f"use {' or '.join(choices)}")
        if hint is float:
            require(math.isfinite(value), label, value, "use a finite number")


def parse_schedule(text: str, name: str) -> tuple[tuple[float, float], ...]:
    """Knots of a piecewise-linear schedule: "0:0.8,1:0.1" → ((0.0, 0.8), (1.0, 0.1)); "" → ().

    The first number of a knot is progress through the run, in [0, 1]; the second is the value there.
    Raises ConfigError for anything else, naming the field `name`.
    """
    knots = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        try:
            progress, value = (float(x) for x in part.split(":"))
        except ValueError:
            raise ConfigError(
                f"{name} = {text!r}: {part!r} is no knot; write progress:value pairs such as 0:0.8,1:0.1"
            ) from None
        knots.append((progress, value))
    at = [p for p, _ in knots]
    require(
        at == sorted(set(at)) and all(0 <= p <= 1 for p in at),
        name,
        text,
        "progress must rise strictly from knot to knot and stay within 0 and 1",
    )
    return tuple(knots)


JUDGES = ("model", "ngram", "mixed", "suffix", "self")


def parse_members(text: str, name: str) -> dict[str, float]:
    """Who judges with what weight: "mixed:0.5,self:0.5" → {"mixed": 0.5, "self": 0.5}.

    Raises ConfigError, naming the field `name`, for fewer than two members, one that is named twice or that does
    not exist, or a weight that is not above 0.
    """
    members: dict[str, float] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        kind, _, weight = part.partition(":")
        require(kind in JUDGES, name, text, f"{kind!r} is no critic; use {', '.join(JUDGES[:-1])} or {JUDGES[-1]}")
        require(kind not in members, name, text, f"{kind} is named twice")
        try:
            members[kind] = float(weight or "nan")
        except ValueError:
            members[kind] = math.nan
        require(0 < members[kind] < math.inf, name, text, f"{part!r} needs a weight above 0, such as {kind}:0.5")
    require(len(members) > 1, name, text, "an ensemble has two members or more, such as mixed:0.5,self:0.5")
    return members
