"""What 1 to 1,024 H100s should make of the large presets, by forecasting/cluster.py: predicted, never measured.

    python -m experiments.scaling_model
    python -m experiments.scaling_model --presets avatarl-250m --price 2.5

Two ways to use more GPUs: a fixed batch that they share, which keeps the run what it is, and a batch that grows with
them, which does not. Each is predicted without overlap of exchange and backward pass, and with a perfect one. Writes
results/scaling-model/table.md, part of which stands in docs/scaling.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from cli import parse, run_main
from config import preset, require
from experiments.arms import ROOT
from files import write_atomic
from forecasting.cluster import H100, Cluster, efficiency, grown, shared, step, tokens_per_second
from forecasting.h100 import DOLLARS_PER_GPU_HOUR, dollars
from forecasting.workload import Workload, count
from training.plan import duration, human

WEB = ("avatarl-30m", "avatarl-70m", "avatarl-150m", "avatarl-250m")


@dataclass(frozen=True)
class Settings:
    """Presets on clusters of several sizes."""

    presets: tuple[str, ...] = WEB
    """Whose steps are predicted."""
    gpus: tuple[int, ...] = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
    """How many GPUs; beyond 8 whole nodes of 8."""
    price: float = DOLLARS_PER_GPU_HOUR
    """Dollars of a GPU for an hour; the default is a list price of May 2026."""
    utilisation: float = H100.utilisation
    """Share of the peak that a step is assumed to reach."""
    out: Path = ROOT / "results" / "scaling-model"
    """Folder of the table."""

    def __post_init__(self) -> None:
        require(0 < self.utilisation <= 1, "utilisation", self.utilisation, "use a share above 0, at most 1")
        require(self.price > 0, "price", self.price, "use dollars, such as 2.5")
        for gpus in self.gpus:
            whole = 1 <= gpus <= H100.gpus_per_node or (gpus > 0 and gpus % H100.gpus_per_node == 0)
            require(whole, "gpus", gpus, "use 1 to 8, or whole nodes of 8")


def assumptions(cluster: Cluster, price: float) -> list[str]:
    """A table of everything that was put in."""
    sources = {
        "peak": "NVIDIA's data sheet, bfloat16, dense",
        "utilisation": "assumed; well-tuned GPT-2-sized runs report 0.3 to 0.5",
        "gpus_per_node": "DGX and HGX H100",
        "node_bandwidth": "NVLink 4, data sheet, each direction",
        "network_bandwidth": "one 400 Gbit/s port for each GPU, each direction",
        "node_latency": "assumed",
        "network_latency": "assumed",
        "memory_bandwidth": "data sheet",
        "least": "assumed: a micro-batch's kernels have to be launched",
    }
    units = {"peak": "FLOP/s", "node_bandwidth": "B/s", "network_bandwidth": "B/s", "memory_bandwidth": "B/s"}
    lines = ["| assumption | value | source |", "|---|---|---|"]
    for field in fields(cluster):
        value = getattr(cluster, field.name)
        said = human(value, units[field.name]) if field.name in units else f"{value:g}"
        if field.name.endswith("latency") or field.name == "least":
            said = f"{value * 1e6:,g} µs"
        lines.append(f"| {field.name.replace('_', ' ')} | {said} | {sources[field.name]} |")
    return [*lines, f"| dollars per GPU-hour | {price:.2f} | assumed; the default is a list price of May 2026 |"]


def fixed_batch(work: Workload, settings: Settings, cluster: Cluster) -> list[str]:
    """The same run on more GPUs: its batch, rounded up to a multiple of them, is shared."""
    lines = [
        "| GPUs | sequences in a step | on each GPU | step | of it exchange | training | efficiency | dollars |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for gpus in settings.gpus:
        run = shared(work, gpus)
        slow, fast = (step(run, gpus, overlap=o, cluster=cluster) for o in (0.0, 1.0))
        low, high = (efficiency(run, gpus, work, overlap=o, cluster=cluster) for o in (0.0, 1.0))
        lines.append(
            f"| {gpus:,} | {run.batch_size:,} | {run.batch_size // gpus} | {span(slow.seconds, fast.seconds)} | "
            f"{duration(slow.exchange) if gpus > 1 else '-'} | "
            f"{span(run.steps * slow.seconds, run.steps * fast.seconds)} | {percents(low, high)} | "
            f"{dollars(run.steps * slow.seconds, gpus, settings.price)} |"
        )
    return lines


def grown_batch(work: Workload, settings: Settings, cluster: Cluster) -> list[str]:
    """Every GPU takes one micro-batch of the preset's own size, however many there are."""
    lines = [
        "| GPUs | sequences in a step | steps for the same tokens | tokens/s | efficiency |",
        "|---|---|---|---|---|",
    ]
    alone = grown(work, 1)
    for gpus in settings.gpus:
        run = grown(work, gpus)
        slow, fast = (tokens_per_second(run, gpus, overlap=o, cluster=cluster) for o in (0.0, 1.0))
        low, high = (efficiency(run, gpus, alone, overlap=o, cluster=cluster) for o in (0.0, 1.0))
        rate = human(slow) if human(slow) == human(fast) else f"{human(slow)} to {human(fast)}"
        lines.append(f"| {gpus:,} | {run.batch_size:,} | {run.steps:,} | {rate} | {percents(low, high)} |")
    return lines


def span(slow: float, fast: float) -> str:
    """Two durations as one text: from the shorter to the longer."""
    first, last = duration(fast), duration(slow)
    return first if first == last else f"{first} to {last}"


def percents(low: float, high: float) -> str:
    """Two shares as one text."""
    first, last = f"{low:.0%}", f"{high:.0%}"
    return first if first == last else f"{first} to {last}"


def sections(settings: Settings) -> dict[str, list[str]]:
    """The tables by the preset's name, the assumptions under ''."""
    cluster = replace(H100, utilisation=settings.utilisation)
    found = {"": assumptions(cluster, settings.price)}
    for name in settings.presets:
        work = count(preset(name))
        found[name] = [
            f"{human(work.parameters)} parameters, {human(work.tokens)} tokens, "
            f"{human(work.flops_per_step)} FLOP and {human(4 * work.parameters, 'B')} of gradients in a step. "
            "Batch fixed:",
            "",
            *fixed_batch(work, settings, cluster),
            "",
            f"Batch growing by {work.micro_batch} sequences with every GPU:",
            "",
            *grown_batch(work, settings, cluster),
        ]
    return found


def main(words: Sequence[str]) -> int:
    """Predict, write, print; returns the exit code."""
    settings = parse(Settings, words, prog="python -m experiments.scaling_model", description=__doc__ or "")
    lines = [
        "# Presets on 1 to 1,024 H100s: predicted from stated constants, never measured",
        "",
        f"`{' '.join(['python -m experiments.scaling_model', *words])}`. From a perfect overlap of the gradients' "
        "exchange with the backward pass to none, where both are given; efficiency is tokens per second over GPUs "
        "times those of one. Evaluations, samples, checkpoints, and the critic's own training not counted.",
        "",
    ]
    for name, section in sections(settings).items():
        lines += [f"## {name or 'What is assumed'}", "", *section, ""]
    settings.out.mkdir(parents=True, exist_ok=True)
    write_atomic(settings.out / "table.md", "\n".join(lines))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    run_main(main)
