"""A self-contained HTML page on which one clicks through a text, token by token, and sees the game that was played."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from exploring.game import Action, Move
from reporting.html import document, markup

ASSETS = Path(__file__).resolve().parent
ROWS = 40
"""Actions of a decision that the page keeps: the likeliest by whatever ranks them, and gold."""


def ranked(move: Move) -> list[Action]:
    """Its actions, the best paid first, or the student's likeliest where nobody pays; at most ROWS, gold among them."""
    gold = move.actions[0]
    order = sorted(move.actions, key=lambda a: (-(a.consensus or 0.0), -a.student))
    kept = order[:ROWS]
    return kept if gold in kept else [*kept[:-1], gold]


def data_of(ids: Sequence[int], moves: Sequence[Move], text_of: Callable[[int], str]) -> dict[str, Any]:
    """What the page's script reads: the tokens' texts, the first token, and a list for each move."""
    kept = [ranked(move) for move in moves]
    rows = [[[a.token, *map(short, a[1:6]), a.by] for a in actions] for actions in kept]
    played = [
        [move.gold, move.rank, short(move.entropy), len(move.actions), row]
        for move, row in zip(moves, rows, strict=True)
    ]
    used = {int(ids[0]), *(a.token for actions in kept for a in actions)}
    return {"first": int(ids[0]), "texts": {token: text_of(token) for token in sorted(used)}, "moves": played}


def short(value: float | None) -> float | None:
    """Four digits are more than the eye takes in, and a quarter of the bytes."""
    return None if value is None else float(f"{value:.4g}")


def page(title: str, facts: Mapping[str, str], data: Mapping[str, Any]) -> str:
    """The whole document; facts stand above the text."""
    style, script = ((ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    listed = "".join(f"<div><dt>{markup(name)}</dt><dd>{markup(value)}</dd></div>" for name, value in facts.items())
    try:
        held = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    except ValueError:
        raise RuntimeError("the model's probabilities are not all numbers; name an earlier --checkpoint") from None
    critic = any(row[2] is not None for *_, rows in data["moves"] for row in rows)
    modes = {"student": "what surprised the student"}
    modes |= {"critic": "what surprised the critic", "both": "who knew better"} if critic else {}
    choices = "".join(
        f'<label><input type="radio" name="mode" value="{mode}"{" checked" * (mode == "student")}>{words}</label>'
        for mode, words in modes.items()
    )
    body = f"""<header><p class="kicker">AvataRL, token by token</p><h1>{markup(title)}</h1><dl>{listed}</dl></header>
<form autocomplete="off"><fieldset><legend>Coloured by</legend>{choices}</fieldset>
<p class="hint">Click a token, or use the arrow keys.</p></form>
<main>
<div id="text" role="listbox" aria-label="The text" tabindex="0"></div>
<aside id="move" aria-live="polite"></aside>
</main>
<noscript>This page needs JavaScript to show its data.</noscript>
<script type="application/json" id="data">{held}</script>"""
    return document(title, style, body, script)
