"""What a study's rows say, in Markdown: means and spreads over seeds, differences to a baseline seed by seed."""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.arms import Outcome
from experiments.study import Row, StudySettings, commit_name, with_baselines

Cell = Callable[[Row, Row | None], str]
"""What a column says of a row, beside the baseline of its group."""
Column = tuple[str, Cell]


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean ± standard deviation over seeds; the value alone where there is one seed."""
    if not all(map(math.isfinite, values)):
        return f"diverged in {sum(not math.isfinite(v) for v in values)} of {len(values)}"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def values_of(row: Row, key: str, at: str = "final") -> list[float]:
    """A metric of every seed at its "final" or "best" evaluation; NaN for a run that diverged."""
    return [math.nan if o.diverged else float(getattr(o, at)[key]) for o in row.outcomes]


def gaps(row: Row, base: Row, key: str = "val/ce", at: str = "final") -> list[float]:
    """The row minus its baseline, seed by seed. Raises ValueError when they have other seeds."""
    if [o.arm.seed for o in row.outcomes] != [o.arm.seed for o in base.outcomes]:
        raise ValueError(f"{row.entry.label} and {base.entry.label} were not trained with the same seeds")
    return [a - b for a, b in zip(values_of(row, key, at), values_of(base, key, at), strict=True)]


def gap_text(found: Sequence[float]) -> str:
    """Differences in words: mean ± standard deviation, and in how many seeds they are below zero."""
    if not all(map(math.isfinite, found)):
        return "—"
    mean = f"{statistics.mean(found):+.4f}"
    return f"{mean} ± {statistics.stdev(found):.4f}, lower in {below(found)}" if len(found) > 1 else mean


def below(found: Sequence[float]) -> str:
    """ "2 of 3 seeds"."""
    return f"{sum(g < 0 for g in found)} of {len(found)} seeds"


def label(row: Row, base: Row | None) -> str:
    """What the row is."""
    return row.entry.label


def choice(row: Row, base: Row | None) -> str:
    """What the tuning chose: "rate x0.5, dropout 0.2"."""
    relative = {"rate", "decay"}
    return ", ".join(f"{k} {'x' if k in relative else ''}{v:g}" for k, v in row.choice.items()) or "—"


def tried(row: Row, base: Row | None) -> str:
    """What the tuning saw: cross-entropies of seed 1, knob by knob."""
    said = []
    for knob, losses in row.tried.items():
        values = ", ".join(f"{v:g}: {ce:.4f}" for v, ce in sorted(losses.items()))
        said.append(f"{knob} {values}")
    return "; ".join(said) or "—"


def metric(title: str, key: str, at: str = "final", digits: int = 4) -> Column:
    """A metric over the seeds."""
    return title, lambda row, base: spread(values_of(row, key, at), digits)


def difference(at: str = "final", title: str = "− baseline, by seed") -> Column:
    """Cross-entropy against the baseline of the group."""

    def cell(row: Row, base: Row | None) -> str:
        return "baseline" if row is base else "—" if base is None else gap_text(gaps(row, base, at=at))

    return title, cell


def seconds(row: Row, base: Row | None) -> str:
    """Training time, evaluations excluded."""
    return spread([o.final["seconds"] for o in row.outcomes], 0)


LABEL: Column = ("entry", label)
CHOICE: Column = ("chosen", choice)
SECONDS: Column = ("training, s", seconds)
TRIED: Column = ("CE by what was tried (seed 1)", tried)


def columns(tuned: bool) -> list[Column]:
    """The columns of most studies."""
    numbers = [metric("val CE, nats", "val/ce"), difference(), metric("accuracy", "val/accuracy")]
    numbers += [metric("ECE", "val/ece"), SECONDS]
    return [LABEL, CHOICE, *numbers, TRIED] if tuned else [LABEL, *numbers]


def markdown(rows: Sequence[Row], shown: Sequence[Column]) -> list[str]:
    """The rows as a table, one for each group under its name."""
    lines: list[str] = []
    pairs = with_baselines(rows)
    for group in dict.fromkeys(row.entry.group for row in rows):
        lines += [f"## {group}", ""] if group else []
        lines += ["| " + " | ".join(title for title, _ in shown) + " |", "|---" * len(shown) + "|"]
        for row, base in pairs:
            if row.entry.group == group:
                lines.append("| " + " | ".join(cell(row, base) for _, cell in shown) + " |")
        lines.append("")
    return lines


def machine(made: Mapping[str, Any]) -> str:
    """Where and at which commit: "…, 2 cores, torch 2.9, commit 0123…, 2026-01-31"."""
    return (
        f"{made['processor']}, {made['cores']} cores, torch {made['versions']['torch']}, "
        f"commit {commit_name(made['git'])}, {made['started']}"
    )


def heading(title: str, made: Mapping[str, Any], how: StudySettings, rows: Sequence[Row], note: str = "") -> list[str]:
    """Title, command, machine and conditions of a study."""
    seeds = f"Seeds 1 to {how.seeds}; mean ± standard deviation over seeds" if how.seeds > 1 else "One seed"
    tuned, text = any(row.choice for row in rows), validated_on(how)
    whom = "The baseline alone is tuned" if how.tune_only_baselines else "Rows are tuned alike"
    search = f" {whom}, by seed 1, over grids that grow to enclose the best or up to a limit."
    return [
        f"# {title}",
        "",
        f"`{made['command']}` on {machine(made)}. {seeds}; validated on {text}. {how.jobs} "
        f"run{'s' * (how.jobs > 1)} at a time with {how.threads} thread{'s' * (how.threads > 1)} each; training time "
        f"leaves evaluations out and is a rough guide where runs share a machine.{with_other_threads(how, rows)}"
        f"{search if tuned else ''}",
        *(["", note] if note else []),
        "",
    ]


def with_other_threads(how: StudySettings, rows: Sequence[Row]) -> str:
    """Which rows' runs were found, trained by an earlier call that gave them other threads: their time says less."""
    found: dict[int, list[str]] = {}
    for row in rows:
        configs = [o.folder / "config.json" for o in row.outcomes]
        used = {json.loads(path.read_text())["config"]["run"]["threads"] for path in configs if path.is_file()}
        for threads in sorted(used - {how.threads}):
            found.setdefault(threads, []).append(row.entry.label)
    return "".join(
        f" Trained by an earlier call, with run.threads {n}: {'; '.join(names)}." for n, names in found.items()
    )


def validated_on(how: StudySettings) -> str:
    """What the losses of a study are of."""
    corpus, val = (how.further.get(key) for key in ("data.corpus", "data.val-corpus"))
    return f"all of {val}" if val else f"the whole held-out split of {corpus or 'tinyshakespeare'}"


def page(
    title: str,
    made: Mapping[str, Any],
    how: StudySettings,
    rows: Sequence[Row],
    *,
    shown: Sequence[Column] | None = None,
    note: str = "",
    after: Sequence[str] = (),
) -> str:
    """A study's table.md."""
    shown = shown or columns(any(row.choice for row in rows))
    return "\n".join([*heading(title, made, how, rows, note), *markdown(rows, shown), *after]).rstrip("\n") + "\n"


def verdicts(rows: Sequence[Row], names: Sequence[str] = ()) -> list[str]:
    """Per group, the rows of these labels (or all) minus their baseline, in sentences."""
    said = []
    for row, base in with_baselines(rows):
        if base is None or row is base or (names and row.entry.label not in names):
            continue
        found = gaps(row, base)
        ece = [statistics.mean(values_of(r, "val/ece")) for r in (row, base)]
        where = f"{row.entry.group}: " if row.entry.group else ""
        comparable = ece[1] > 0 and math.isfinite(ece[0])
        ratio = f"at {ece[0] / ece[1]:.2f} times the calibration error" if comparable else "calibration aside"
        sign = "+" if statistics.mean(found) > 0 else ""
        apart = f"{row.entry.label} − {base.entry.label} = {sign}{spread(found)} nats, lower in {below(found)}"
        shares = caught_up(row, base)
        early = "" if max(shares) >= 1 else f" The baseline's end is reached by {shown(shares)} of its tokens."
        said.append(f"- {where}{apart}, {ratio}.{early}")
    return said


def caught_up(row: Row, base: Row) -> list[float]:
    """For every seed, the share of the baseline's tokens by which an evaluation is down at its last loss; inf: none is.

    The row's rate is then still on its way down, so that a run of that length alone would get there sooner.
    """
    found = []
    for mine, theirs in zip(row.outcomes, base.outcomes, strict=True):
        down = [e["tokens"] for e in mine.evaluations if e["val/ce"] <= theirs.final["val/ce"]]
        found.append(min(down, default=math.inf) / theirs.final["tokens"])
    return found


def shown(shares: Sequence[float]) -> str:
    """Shares, one for every seed, as per cent: "38, 38 and 50 %"."""
    *first, last = (f"{100 * share:.0f}" for share in shares)
    return f"{', '.join(first)} and {last} %" if first else f"{last} %"


def along(row: Row, base: Row) -> list[str]:
    """The curves of a row and its baseline evaluation by evaluation, with the differences seed by seed."""
    lines = [f"| step | {base.entry.label} | {row.entry.label} | difference, by seed |", "|---|---|---|---|"]
    for (step, mine), (_, theirs) in zip(curve(row), curve(base), strict=True):
        apart = ", ".join(f"{a - b:+.4f}" for a, b in zip(mine, theirs, strict=True))
        lines.append(f"| {step} | {statistics.mean(theirs):.4f} | {statistics.mean(mine):.4f} | {apart} |")
    return lines


def curve(row: Row, axis: str = "step") -> list[tuple[float, list[float]]]:
    """(step or tokens, cross-entropy of every seed) at the evaluations that all seeds reached."""
    shared = min(len(o.evaluations) for o in row.outcomes)
    return [
        (row.outcomes[0].evaluations[i][axis], [float(o.evaluations[i]["val/ce"]) for o in row.outcomes])
        for i in range(shared)
    ]


def ce_at(outcome: Outcome, second: float) -> float | None:
    """A run's validation CE after so many seconds of training, between evaluations by a straight line; None later."""
    before = None
    for e in outcome.evaluations:
        now, ce = float(e["seconds"]), float(e["val/ce"])
        if now >= second:
            if before is None or now == before[0]:
                return ce
            share = (second - before[0]) / (now - before[0])
            return before[1] + share * (ce - before[1])
        before = now, ce
    return None


def on_the_clock(rows: Sequence[Row]) -> list[str]:
    """Every row of the equal-token runs read at its baseline's last second, with what such a reading is worth."""
    lines = ["| group | entry | CE at the baseline's last second |", "|---|---|---|"]
    for row, base in with_baselines(rows):
        if base is None:
            continue
        ends = [o.final["seconds"] for o in base.outcomes]
        found = [ce_at(o, end) for o, end in zip(row.outcomes, ends, strict=True)]
        reached = [ce for ce in found if ce is not None]
        said = spread(reached) if len(reached) == len(found) else "ended before"
        lines.append(f"| {row.entry.group} | {row.entry.label} | {said} |")
    caveat = "A curve whose rate still decays is not comparable before its end: read the rows above, not these."
    return [*lines, "", caveat]
