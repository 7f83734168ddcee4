"""The page: one self-contained HTML document out of the runs that were read."""

from collections.abc import Sequence, Sized
from pathlib import Path

from reporting import health, tables
from reporting.charts import COLOURS, POINTS_PER_PAGE, Curve, XAxis, chart, is_averaged, x_axes
from reporting.html import chip, document, markup
from reporting.metrics import SECTIONS, describe
from reporting.read import Run

ASSETS = Path(__file__).resolve().parent
SAMPLES_PER_PAGE = 60
"""Earlier samples that a page keeps, evenly spread over each run."""
LADDER_HINT = (
    "Dashed lines: n-gram statistics of the training text on the same validation text, by context in tokens "
    "(1 = bigram, 2 = trigram, …). The table says when they were passed."
)


def page(runs: Sequence[Run], first: str = "") -> str:
    """The whole document for one run or for several; `first` is markup that stands before everything else."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    style, script = ((ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    switches = range(len(runs) if len(runs) > 1 else 0)
    hide = "".join(f"body:has(#run-{i}:not(:checked)) svg .run-{i}{{display:none}}" for i in switches)
    axes = x_axes(runs)
    body = f"""{_header(runs, title)}
<main>
{first}
{tables.tiles(runs[0]) if len(runs) == 1 else tables.summary(runs) + tables.facts(runs)}
{_toolbar(runs, axes)}
{_charts(runs, axes)}
{_samples(runs)}
{_configuration(runs)}
</main>
<footer>Written by <code>python report.py</code> from what the run folders hold.</footer>"""
    return document(title, style + hide, body, script)


def _header(runs: Sequence[Run], title: str) -> str:
    parts = [f'<header><p class="kicker">AvataRL {"run" if len(runs) == 1 else "comparison"}</p>']
    parts.append(f"<h1>{markup(title)}</h1>")
    if len(runs) == 1 and (line := tables.lead(runs[0])):
        parts.append(f'<p class="lead">{markup(line)}</p>')
    parts += [f'<p class="notice warning" role="alert">{markup(text)}</p>' for text in tables.warnings(runs)]
    if notes := tables.notes(runs):
        parts.append(f'<div class="notice"><ul>{"".join(f"<li>{markup(n)}</li>" for n in notes)}</ul></div>')
    return "".join(parts) + "</header>"


def _toolbar(runs: Sequence[Run], axes: list[XAxis]) -> str:
    if not any(run.logged() for run in runs) or len(runs) == len(axes) == 1:
        return ""
    names = {"step": "steps", "tokens": "tokens", "seconds": "time"}
    choices = "".join(
        f'<label><input type="radio" name="x" id="x-{a.key}" value="{a.key}"{" checked" * (a.key == "step")}>'
        f"{names[a.key]}</label>"
        for a in axes
    )
    bar = f'<fieldset class="axes"><legend>Curves over</legend>{choices}</fieldset>'
    if len(runs) > 1:
        boxes = "".join(
            f'<label><input type="checkbox" id="run-{i}" checked>{chip(i, COLOURS)}{markup(run.name)}</label>'
            for i, run in enumerate(runs)
        )
        bar += f"<fieldset><legend>Runs</legend>{boxes}</fieldset>"
    return f'<form class="toolbar" autocomplete="off" aria-label="What the curves show">{bar}</form>'


def _sections(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Section title → keys that occur, known sections first, then a section for each group of other keys."""
    present = {key: None for run in runs for key in run.logged()}
    sections = {title: [key for key in keys if key in present] for title, keys in SECTIONS.items()}
    known = {key for keys in SECTIONS.values() for key in keys}
    for key in present:
        if key not in known:
            group = key.split("/")[0] if "/" in key else ""
            title = "Other" if group in ("", "train", "val") else group[:1].upper() + group[1:]
            sections.setdefault(title, []).append(key)
    return {title: keys for title, keys in sections.items() if keys}


def _charts(runs: Sequence[Run], axes: list[XAxis]) -> str:
    sections = _sections(runs)
    count = sum(len(keys) for keys in sections.values()) * len(runs)
    limit = max(24, min(400, POINTS_PER_PAGE // max(1, count)))
    ladders = tables.ladder_groups(runs)
    rungs = next(iter(ladders)) if len(ladders) == 1 else ()
    body = ""
    for title, keys in sections.items():
        wide, small, empty, averaged = "", "", [], False
        for key in keys:
            found = [Curve(i, run.name, run.points(key), run.lost(key)) for i, run in enumerate(runs)]
            curves = [curve for curve in found if curve.points]
            averaged |= any(is_averaged(describe(key), curve) for curve in curves)
            if not curves:
                empty.append(key)
            elif key in ("val/ce", "val/accuracy"):
                wide += chart(key, curves, axes, limit, rungs)
            else:
                small += chart(key, curves, axes, limit)
        body += f"<section><h2>{markup(title)}</h2>{_hint(title, ladders, averaged)}"
        body += f'<div class="charts wide">{wide}</div>' if wide else ""
        body += f'<div class="charts">{small}</div>' if small else ""
        body += f'<p class="hint">No finite value: {markup(", ".join(empty))}.</p>' if empty else ""
        body += tables.ladder(runs) if title == "Validation" else ""
        body += health.signs(runs, tables.run_heads(runs)) if title == "Health" else ""
        body += "</section>"
    return body or "<section><h2>Curves</h2><p>Nothing has been logged yet.</p></section>"


def _hint(title: str, ladders: Sized, averaged: bool) -> str:
    if averaged:
        return '<p class="hint">Single batches are faint; the strong line is their moving average.</p>'
    if title != "Validation" or not ladders:
        return ""
    apart = "The runs have different n-gram ladders, so the charts show none; the tables do."
    return f'<p class="hint">{LADDER_HINT if len(ladders) == 1 else apart}</p>'


def _samples(runs: Sequence[Run]) -> str:
    articles = ""
    for i, run in enumerate(runs):
        if not run.samples:
            continue
        *earlier, (step, text) = run.samples
        name = f"{chip(i, COLOURS)}{markup(run.name)}, " if len(runs) > 1 else ""
        articles += f"<article><h3>{name}step {step:,}</h3><pre>{markup(text)}</pre>"
        keep = max(3, SAMPLES_PER_PAGE // len(runs))
        kept = [earlier[j * len(earlier) // keep] for j in range(keep)] if len(earlier) > keep else earlier
        if kept:
            which = f"{len(kept)} of {len(earlier)}" if len(kept) < len(earlier) else f"{len(kept)}"
            told = "".join(f"<h4>step {s:,}</h4><pre>{markup(t)}</pre>" for s, t in reversed(kept))
            articles += f"<details><summary>Earlier samples ({which}), latest first</summary>{told}</details>"
        articles += "</article>"
    return f'<section><h2>Samples</h2><div class="samples">{articles}</div></section>' if articles else ""


def _configuration(runs: Sequence[Run]) -> str:
    what, facts = "Settings in which the runs differ.", ""
    if len(runs) == 1:
        what = "Differences from the defaults of config.py, which are the published settings."
        facts = f"<h3>What ran where</h3>{tables.facts(runs)}"
    settings = tables.configuration(runs)
    return f'<section><h2>Configuration</h2><p class="hint">{what}</p>{settings}{facts}</section>'
