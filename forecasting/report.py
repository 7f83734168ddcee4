"""The forecast that `python train.py PRESET --dry-run` prints: what a run is, takes here, and would cost elsewhere."""

from config import Config, critic_preset
from forecasting import h100
from forecasting.probe import caching_seconds
from forecasting.speed import Speed, measure, total_memory
from forecasting.workload import Workload, cache_layout, count, critic_config, critic_count, critic_flops
from training.distributed import World
from training.hardware import Hardware, matmul_peak
from training.micro_batches import micro_batches
from training.plan import duration, human, two_digits


def forecast(config: Config, hardware: Hardware, world: World, price: float | None = None) -> list[str]:
    """The lines for a run of `config`: counted, measured on this hardware within seconds, modelled for H100s.

    price: dollars of an H100 for an hour; None: an assumed one. Reads and writes no data. Raises ConfigError for a
    batch that the processes cannot share, and for settings that the objective refuses.
    """
    micro_batches(config.train, world.size)  # raises where they cannot share a step
    peak = matmul_peak(hardware.device, hardware.dtype)
    work, speed = count(config), measure(config, hardware, world, peak)
    lines = [*counted(config, work), *measured(work, speed, hardware, world, peak)]
    training, evaluation = parts_of(work, speed)
    total, critics = training + evaluation, []
    if critic_count(config) and not config.critic.run:
        judge = critic_config(config)
        critics = critic_count(config) * [count(judge)]
        pace = measure(judge, hardware, world, peak)
        first = len(critics) * sum(parts_of(critics[0], pace))
        total += first
        lines.append(
            f"critic      about {duration(first)} first, where it is missing: {critic_preset(config)}"
            f"{' twice' * (len(critics) == 2)}, {human(critics[0].tokens)} tokens ({pace.how})"
        )
    extra_flops, layout = 0.0, cache_layout(config)
    if layout is not None:
        extra_flops = critic_flops(config) * layout.windows * layout.block_size
        caching = layout.windows * caching_seconds(config, hardware, layout)
        total += caching
        lines.append(
            f"cache       about {duration(caching)} first, where it is missing: {human(layout.total_bytes, 'B')} on "
            f"disk, the {layout.top:,} likeliest tokens at {layout.windows:,} x {layout.block_size:,} positions"
        )
    unknown = ", besides evaluations" if work.val_tokens is None else ""
    lines.append(f"total       about {duration(total)}{unknown}; start-up, samples and checkpoints not counted")
    lines += h100.table(work, critics, extra_flops, price)
    if config.train.objective == "avatarl" and config.method.imagined_windows:
        lines.append("            writing imagined windows is part of the times measured here, not of this table")
    return lines


def counted(config: Config, work: Workload) -> list[str]:
    """What follows from the settings alone."""
    epochs = ""
    if work.train_tokens:
        epochs = f", {two_digits(work.tokens / work.train_tokens)} epochs of {config.data.corpus or 'tinyshakespeare'}"
    return [
        f"parameters  {human(work.parameters)} (vocabulary of {work.vocab_size:,})",
        f"tokens      {human(work.tokens)} in {work.steps:,} steps of {work.tokens_per_step:,}{epochs}",
        f"FLOPs       {human(work.student_flops * work.tokens)} for the student, "
        f"{human(work.critic_flops * work.tokens)} for its critic, "
        f"{human((work.evaluated_tokens or 0) * work.forward_flops)} for evaluations",
        *stored(config, work),
    ]


def stored(config: Config, work: Workload) -> list[str]:
    """What a corpus takes on the disk that is tokenised ahead of the run."""
    if config.data.corpus != "openwebtext" or work.train_tokens is None or work.val_tokens is None:
        return []
    size = 2 * (work.train_tokens / (config.data.train_stop - config.data.train_start) + work.val_tokens)
    return [f"disk        {human(size, 'B')} of tokens, made once with python -m data.prepare openwebtext"]


def measured(work: Workload, speed: Speed, hardware: Hardware, world: World, peak: float) -> list[str]:
    """What the run takes on this machine."""
    training, evaluation = parts_of(work, speed)
    reached = work.flops_per_step / speed.step
    several = f" on {world.size} processes, exchange of gradients not counted" if world.size > 1 else ""
    lacking = ""
    if speed.memory > total_memory(hardware.device):
        lacking = f": more than the {human(total_memory(hardware.device), 'B')} here; raise --train.grad-accum or "
        lacking += "lower --eval.batch-size"
    evaluations = "not counted: how long that text is would have to be read"
    if work.val_tokens is not None:
        evaluations = f"about {duration(evaluation)}: {work.evaluations} times {human(work.val_tokens)} tokens"
    return [
        f"hardware    {', '.join(hardware.notes)}",
        f"measured    {speed.how}",
        f"step        about {duration(speed.step)}{several}: {two_digits(work.tokens_per_step / speed.step)} tokens/s, "
        f"{reached / peak / world.size:.0%} of the measured matmul peak of {human(peak * world.size, 'FLOP/s')}",
        f"memory      about {two_digits(speed.memory / 1e9)} GB per process{lacking}",
        f"training    about {duration(training)}",
        f"evaluation  {evaluations}",
    ]


def parts_of(work: Workload, speed: Speed) -> tuple[float, float]:
    """Seconds of training and of evaluating; the latter 0 where the text's length is unknown."""
    return work.steps * speed.step, (work.evaluated_tokens or 0.0) * speed.evaluation
