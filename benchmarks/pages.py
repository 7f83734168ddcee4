"""What a benchmark leaves: raw numbers of each part as JSON, and one page that is made from them.

    OUT/cpu/step.json     every timing, with command, commit, versions and hardware
    OUT/cpu/growth.svg    how the cost grows
    OUT/cpu.md            the page; gpu/ and gpu.md for a GPU

A part that is run again replaces its own section of the page and leaves the others.
"""

import functools
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import GPU_PARTS, PARTS, growth
from benchmarks.figure import axes, figure, shown
from benchmarks.table import Table, markdown, ratio_text, spread
from benchmarks.timing import Conditions, settle
from files import write_atomic, write_json
from training.hardware import describe, git_state, versions

FORMAT = 1


@functools.cache
def checkout() -> dict[str, Any]:
    """The commit at the start: what a part writes into results/ is no change of the code."""
    return git_state()


def circumstances(conditions: Conditions, command: str) -> dict[str, Any]:
    """What every number needs beside it: the command, the code, the machine."""
    hardware, _ = settle(conditions)
    return {
        "format": FORMAT,
        "command": command,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seed": conditions.seed,
        "rounds": conditions.rounds,
        "seconds": conditions.seconds,
        "git": checkout(),
        "versions": versions() | {"system": platform.platform()},
        "hardware": describe(hardware),
    }


def place(out: Path, device: torch.device) -> Path:
    """The folder of this device's numbers, made where it is missing."""
    folder = out / ("gpu" if device.type == "cuda" else device.type)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_part(folder: Path, part: str, record: dict[str, Any], tables: Sequence[Table]) -> None:
    """Write OUT/…/part.json with the tables there are so far, and the page anew."""
    write_json(folder / f"{part}.json", record | {"part": part, "tables": [asdict(t) for t in tables]})
    if axes(tables):
        write_atomic(folder / f"{part}.svg", figure(tables))
    write_atomic(folder.with_suffix(".md"), page(folder))


def read_part(path: Path) -> tuple[dict[str, Any], list[Table]]:
    """A part's record and its tables."""
    record = json.loads(path.read_text(encoding="utf-8"))
    return record, [Table.from_dict(t) for t in record["tables"]]


def page(folder: Path) -> str:
    """Everything that was measured on this device, as Markdown."""
    order = dict.fromkeys((*PARTS, *GPU_PARTS))
    parts = [read_part(folder / f"{name}.json") for name in order if (folder / f"{name}.json").is_file()]
    lines = [f"# What things cost on a {folder.name.upper()}", ""]
    lines += [
        "Written by `bench.py` from the raw numbers beside it. Arms of a table took turns, round by round and each "
        "round in another order; a ratio is the median of the rounds' ratios. Peak memory is what a call adds at its "
        "worst moment to what is held between calls, unless a table says otherwise.",
        "",
    ]
    for record, tables in parts:
        lines += section(record, tables)
    return "\n".join(lines)


def section(record: dict[str, Any], tables: Sequence[Table]) -> list[str]:
    """One part: where and how it was measured, and its tables; points of one axis are put together."""
    hardware, git = record["hardware"], record["git"]
    machine = hardware.get("gpu") or f"{hardware['processor']}, {hardware['threads']} threads"
    commit = git.get("commit", "unknown")[:12] + (" with changes" if git.get("dirty") else "")
    lines = [
        f"## {record['part']}",
        "",
        f"`{record['command']}` on {machine}, torch {record['versions'].get('torch')}, commit {commit}, "
        f"seed {record['seed']}, {record['started'][:10]}.",
        "",
    ]
    points = axes(tables)
    for table in tables:
        if table.facts.get("axis") not in points:
            lines.append(markdown(table))
    for axis, along in points.items():
        lines.append(growth_table(axis, along))
    if points:
        folder = "gpu" if hardware["device"].startswith("cuda") else "cpu"
        lines += [f"![How the cost grows]({folder}/{record['part']}.svg)", ""]
    return lines


def growth_table(axis: str, points: Sequence[Table]) -> str:
    """The points of one axis, one in a row."""
    lines = [
        f"### Over {axis}: {points[0].facts['of']}",
        "",
        f"| {axis} | {growth.ENTROPY}, ms | {growth.OURS}, ms | ratio | memory, MB | rounds |",
        "|---|---|---|---|---|---|",
    ]
    for t in points:
        times = [spread([1e3 * s for s in t.row(name).seconds]) for name in (growth.ENTROPY, growth.OURS)]
        memory = [t.row(name).bytes for name in (growth.ENTROPY, growth.OURS)]
        both = " and ".join("—" if m is None else f"{m / 1e6:,.1f}" for m in memory)
        ratio = ratio_text(t.ratios(growth.OURS, growth.ENTROPY))
        cells = [shown(axis, t.facts["value"]), *times, ratio, both, str(len(t.rows[0].seconds))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def failures(tables: Sequence[Table]) -> list[str]:
    """What went wrong in these tables, a line each."""
    found = [f"{t.title}: {t.failed}" for t in tables if t.failed]
    return found + [f"{t.title}, {r.name}: {r.failed}" for t in tables for r in t.rows if r.failed]
