"""The page about a text: what its script reads is whole, bounded, and no markup of the text's own."""

import json
import math
import re

import pytest

from config import ConfigError
from exploring.app import looked_at
from exploring.game import Action, Move
from exploring.page import ROWS, data_of, page

NASTY = {0: "<b>", 1: "</script>", 2: "\n", 3: "&amp;"}


def move(gold: int, count: int) -> Move:
    """Gold is the worst paid of all."""
    rest = [Action(token, 0.9 / count, 0.5, 0.1, 1.0 / (1 + token), 1.0, by="sc") for token in range(count)]
    return Move(gold, 3, 1.25, [Action(gold, 0.01, 0.02, 0.9, 0.0001, 0.0), *(a for a in rest if a.token != gold)])


def held(document: str) -> dict:
    """What the page's script parses."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', document, re.S)
    return json.loads(found)


def test_the_script_reads_what_was_played():
    """Catches a text that ends the script or becomes markup, and tokens without their words."""
    data = data_of([0, 1, 2], [move(1, 3), move(2, 3)], lambda token: NASTY[token])
    document = page("a <run>", {"loss": "1 < 2"}, data)
    assert held(document)["texts"] == {str(token): NASTY[token] for token in (0, 1, 2)}
    assert held(document)["first"] == 0 and [m[0] for m in held(document)["moves"]] == [1, 2]
    assert "<run>" not in document and "a &lt;run&gt;" in document and "1 &lt; 2" in document
    assert document.count("</script>") == 2


def test_the_rows_are_bounded_and_hold_gold():
    """Catches a page of a thousand actions a token, and one from which the badly paid gold is cut."""
    data = data_of([0, 99], [move(99, 100)], str)
    (played,) = data["moves"]
    rows = played[4]
    assert len(rows) == ROWS and played[3] == 100
    assert [row[0] for row in rows] == [*range(ROWS - 1), 99]


def test_who_plays_alone_has_no_critics_colours():
    """Catches a choice of colours by a critic that was not asked."""
    alone = Move(1, 1, 0.5, [Action(1, 0.7, by="s"), Action(2, 0.2, by="s")])
    assert "who knew better" not in page("run", {}, data_of([1, 1], [alone], str))
    assert "who knew better" in page("run", {}, data_of([1, 1], [move(1, 3)], str))


def test_a_typed_text_that_is_refused_is_answered():
    """Catches an app that dies of a character it does not know, or shows the page's quotes as its own."""

    def refuse(text: str) -> str:
        raise ConfigError(f"{text}: not among the characters")

    assert looked_at(refuse, "<é>") == "<p><strong>&lt;é&gt;: not among the characters</strong></p>"
    assert 'srcdoc="&lt;p class=&quot;x&quot;&gt;hi"' in looked_at(lambda text: f'<p class="x">{text}', "hi")


def test_numbers_that_are_none_are_refused():
    """Catches a page whose script dies on NaN, which is no JSON, with exit code 0."""
    broken = Move(1, 3, math.nan, [Action(1, math.nan, 0.02, 0.9, 0.0001, 0.0)])
    with pytest.raises(RuntimeError, match="not all numbers"):
        page("run", {}, data_of([0, 1], [broken], lambda token: NASTY[token]))
