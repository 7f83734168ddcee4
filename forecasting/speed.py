"""How long a run takes on this machine and what memory it needs, measured within seconds before it starts.

Where a whole micro-batch is cheap, a few of them are timed. Where it is not, models of few layers and of one with
the run's width and vocabulary are, on two small numbers of sequences R, for

    cost(L layers, R sequences) = fixed + R · (head and critic + L · layer),

whose three unknowns they give. What a step does once, however many micro-batches it has, is timed apart.
"""

import math
import os
from typing import NamedTuple

import torch

from config import Config, override
from forecasting.probe import Cost, Probe, resident_bytes
from forecasting.workload import count, evaluated_rows, memory_bytes
from training.distributed import World
from training.hardware import Hardware
from training.micro_batches import micro_batches

# What a step may reach of the measured matmul peak. It decides only what can be measured in time, and stands in
# where nothing can.
ASSUMED_UTILISATION = {"cpu": 0.25, "cuda": 0.40, "mps": 0.20}
WHOLE_SECONDS = 1.5  # a micro-batch that should take less is measured as it is
PART_LAYERS = (4, 2)  # otherwise so many layers are, or if need be so many, on
PART_SECONDS = 0.7  # sequences that should take so long
SLOW_SECONDS = 2.5  # no micro-batch of a partial probe should take longer
LIMIT_SECONDS = 30.0  # where one sequence should take longer, nothing is measured
LIMIT_BYTES = 4e9  # of a probe on a CPU, or half of all memory


class Sizes(NamedTuple):
    """What is measured or asked for: so many layers on so many sequences. Half a sequence is one of half the length."""

    layers: int
    rows: float


class Speed(NamedTuple):
    """What a run will take on this machine."""

    how: str
    """How that was found out, for a person."""
    step: float
    """Seconds of a training step."""
    evaluation: float
    """Seconds per validation token."""
    memory: float
    """Peak bytes of each process."""


class Points(NamedTuple):
    """Costs at `base`, at as many layers and `few` rows, and at as many rows and one layer."""

    base: Sizes
    few: float
    at_base: Cost
    at_few: Cost
    shallow: Cost | None
    """None where `base` has all layers of the run."""

    def scaled(self, name: str, to: Sizes, least: tuple[float, float] = (0.0, 0.0), per_layer: float = 0.0) -> float:
        """The field `name` of the costs at other sizes.

        Exact for fixed + per_layer · L + R · (head + L · layer), where `per_layer`, what a layer costs whatever
        the rows, is given. Noise must not make a slope smaller than `least`: what a row costs here, and a layer of it.
        """
        here, fewer_rows = getattr(self.at_base, name), getattr(self.at_few, name)
        per_row = max(least[0], (here - fewer_rows) / (self.base.rows - self.few))
        layer = least[1]
        if self.shallow is not None:
            step = (here - getattr(self.shallow, name)) / (self.base.layers - 1)
            layer = max(layer, (step - per_layer) / self.base.rows)
        more_layers = (to.layers - self.base.layers) * (per_layer + to.rows * layer)
        return here + (to.rows - self.base.rows) * per_row + more_layers


def measure(config: Config, hardware: Hardware, world: World, peak: float) -> Speed:
    """Time and memory of a run of `config` here. `peak`: FLOP/s of this process's matrix products, measured."""
    micros = micro_batches(config.train, world.size)
    whole = Sizes(config.model.n_layer, config.train.batch_size // (micros * world.size))
    wanted = affordable(config, hardware, whole, peak)
    if wanted is None:
        return assumed(config, hardware, world, peak)
    before = resident_bytes(hardware.device)
    probe = Probe(config, hardware, wanted.layers, collect=wanted != whole or micros > 1)
    base, few, at_base, at_few = two_sizes(probe, wanted, partial=wanted != whole)
    runs, shallow = probe.runs, None
    if base.layers < whole.layers:
        probe.keep_one_layer()
        shallow = probe.cost(base.rows)
    points = Points(base, few, at_base, at_few, shallow)
    text = how(config, hardware, points, whole, runs, micros)
    return conclude(config, hardware, world, peak, points, whole, before)._replace(how=text)


def conclude(
    config: Config, hardware: Hardware, world: World, peak: float, points: Points, whole: Sizes, before: float
) -> Speed:
    """What measured points say about the run. `before`: bytes that the process held without any model."""
    micros = config.train.batch_size // (whole.rows * world.size)
    base, full, shallow = points.base, points.at_base, points.shallow
    one, deep = (count(of_sizes(config, Sizes(layers, 1))) for layers in (base.layers, base.layers + 1))
    length, evaluated = config.model.block_size, Sizes(whole.layers, evaluated_rows(config))
    # Nothing is faster than the matmul peak.
    training = (one.flops_per_step / peak, (deep.flops_per_step - one.flops_per_step) / peak)
    looking = (one.forward_flops * length / peak, (deep.forward_flops - one.forward_flops) * length / peak)
    layer_once = (full.once - shallow.once) / (base.layers - 1) if shallow else 0.0
    # Autocast keeps each weight in the products' type too, however many rows there are.
    casts = 12 * config.model.n_embd**2 * hardware.dtype.itemsize if hardware.dtype != torch.float32 else 0
    saved = points.scaled("saved", whole, per_layer=casts)
    memory = before + memory_bytes(config, hardware, world.size, saved)
    if base == whole and not math.isnan(full.memory):  # only the evaluation's is left to be estimated
        memory = max(full.memory, before + memory_bytes(config, hardware, world.size, saved=0.0))
    return Speed(
        how="",
        step=micros * points.scaled("micro", whole, training) + full.once + (whole.layers - base.layers) * layer_once,
        evaluation=points.scaled("evaluation", evaluated, looking) / (evaluated.rows * length * world.size),
        memory=memory,
    )


def two_sizes(probe: Probe, wanted: Sizes, *, partial: bool) -> tuple[Sizes, float, Cost, Cost]:
    """Measure on few rows and on all that are wanted; of a partial probe on as many as do not take long.

    Returns the larger size, the rows of the smaller one, and the costs of both.
    """
    few, *more = (rows if rows < 1 else rows // 1 for rows in (wanted.rows / part for part in (8, 4, 2, 1)))
    at_few = probe.cost(few)
    if not partial:
        return wanted, few, probe.cost(wanted.rows, seconds=1.5, at_least=3), at_few
    rows = max([more[0], *(rows for rows in more if at_few.micro * rows / few < SLOW_SECONDS)])
    return Sizes(wanted.layers, rows), few, probe.cost(rows), at_few


def affordable(config: Config, hardware: Hardware, whole: Sizes, peak: float) -> Sizes | None:
    """`whole`, or the part of it that can be measured within seconds: few layers on few sequences. None: no part."""
    limit = memory_limit(hardware.device)

    def seconds(sizes: Sizes) -> float:
        work = count(of_sizes(config, sizes))
        return work.flops_per_step / (peak * ASSUMED_UTILISATION[hardware.device.type])

    def fits(sizes: Sizes) -> bool:
        return memory_bytes(of_sizes(config, sizes), hardware) < limit

    if seconds(whole) < WHOLE_SECONDS and fits(whole):
        return whole
    for layers in PART_LAYERS:
        one = Sizes(min(layers, whole.layers), 1)
        if seconds(one) < LIMIT_SECONDS and fits(one):
            break
    else:
        return None
    rows = min(whole.rows, max(1, int(PART_SECONDS / seconds(one))))
    while not fits(Sizes(one.layers, rows)):
        rows //= 2  # one row fits
    return Sizes(one.layers, rows)


def of_sizes(config: Config, sizes: Sizes) -> Config:
    """`config` with so many layers, and steps and evaluations of so many whole sequences."""
    rows = int(sizes.rows)
    train = {"batch_size": rows, "grad_accum": 1}
    return override(config, model={"n_layer": sizes.layers}, train=train, eval={"batch_size": rows})


def memory_limit(device: torch.device) -> float:
    """Bytes that a probe may take."""
    if device.type == "cuda":
        return 0.8 * torch.cuda.mem_get_info(device)[0]
    return min(LIMIT_BYTES, 0.5 * total_memory(device))


def total_memory(device: torch.device) -> float:
    """Bytes of memory that the device has."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")


def assumed(config: Config, hardware: Hardware, world: World, peak: float) -> Speed:
    """What is left where even two layers are too much: FLOPs at an assumed share of the peak."""
    work, share = count(config), ASSUMED_UTILISATION[hardware.device.type]
    reached = peak * share * world.size
    return Speed(
        how=f"not at all: two layers alone are too much to try; assumed {share:.0%} of this machine's matmul peak",
        step=work.flops_per_step / reached,
        evaluation=work.forward_flops / reached,
        memory=memory_bytes(config, hardware, world.size),
    )


def how(config: Config, hardware: Hardware, points: Points, whole: Sizes, runs: int, micros: int) -> str:
    """What was measured, in words; `micros` micro-batches make a step."""
    length, base = config.row_length, points.base
    text = f"{runs} whole steps" if micros == 1 else f"{runs} whole micro-batches, of {micros} in a step"
    if base != whole:
        layers = f"1 and {base.layers} layers" if points.shallow else "all layers"
        tokens = f"{points.few * length:,.0f} and {base.rows * length:,.0f} tokens"
        times = f"{micros} times " * (micros > 1)
        text = f"on {layers} with {tokens}, scaled to {whole.layers} with {times}{whole.rows * length:,.0f}"
        text += ", give or take a third"
    return text + ("; eager, where the run compiles and should be faster" if hardware.compile else "")
