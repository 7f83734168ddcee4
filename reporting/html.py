"""The few pieces of HTML that tables are made of; whatever is not marked as markup is escaped."""

import html
import json
from collections.abc import Iterable
from typing import Any


class Html(str):
    """Text that already is markup."""


def markup(value: object) -> Html:
    """Markup of any value: Html as it stands, everything else in words and escaped."""
    return value if isinstance(value, Html) else Html(html.escape(words(value)))


def words(value: Any) -> str:
    """A JSON value as a reader would write it."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {words(item)}" for key, item in value.items()) or "—"
    if isinstance(value, list | tuple):
        return ", ".join(map(words, value)) or "—"
    return str(value)


def setting(value: object) -> Html:
    """The name or value of a setting, in code, with blank texts made visible."""
    blank = isinstance(value, str) and not value.strip()
    shown = json.dumps(value) if blank else "unset" if value is None else str(value)
    return Html(f"<code>{html.escape(shown)}</code>")


def chip(run: int, colours: int) -> Html:
    """The coloured square that stands for a run."""
    dashed = " dashed" if run >= colours else ""
    return Html(f'<span class="chip c{run % colours}{dashed}" aria-hidden="true"></span>')


def table(label: str, head: Iterable[object], rows: Iterable[Iterable[object]], kind: str = "") -> Html:
    """A table that scrolls sideways on a narrow screen; the first cell of each row is the row's heading.

    `head` may be empty. Headings that are Html, such as names of runs, stand out.
    """
    top = "".join(
        f'<th scope="col"{" class=run" if isinstance(cell, Html) else ""}>{markup(cell)}</th>' for cell in head
    )
    body = ""
    for first, *rest in rows:
        body += f'<tr><th scope="row">{markup(first)}</th>'
        body += "".join(f"<td{' class=best' if isinstance(c, Best) else ''}>{markup(c)}</td>" for c in rest)
        body += "</tr>"
    heading = f"<thead><tr>{top}</tr></thead>" if top else ""
    return Html(
        f'<div class="scroll" role="region" aria-label="{html.escape(label)}" tabindex="0">'
        f'<table class="{kind}">{heading}<tbody>{body}</tbody></table></div>'
    )


class Best(Html):
    """A cell that is the best of its column."""


def document(title: str, style: str, body: str, script: str) -> str:
    """A whole page that fetches nothing: `body` is markup, style and script stand in the page."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'; img-src data:">
<title>{markup(title)} · AvataRL</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""
