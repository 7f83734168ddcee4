"""What a run is, said in a few lines before it starts; numbers and durations as a person reads them."""

from typing import Any

from config import Config
from data.prepare import Dataset
from training.distributed import World
from training.hardware import Hardware


def human(number: float, unit: str = "") -> str:
    """A number with three digits and a metric prefix: 12345 → 12.3 k."""
    for power, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= power:
            return f"{number / power:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def two_digits(number: float) -> str:
    """A positive number as an estimate deserves it: 234 → 230, 0.0123 → 0.012."""
    return f"{float(f'{number:.2g}'):,g}"


def duration(seconds: float) -> str:
    """Seconds with two digits, in the unit a person would choose: 95 → 95 s, 130 → 2.2 min."""
    for size, unit in ((365.25 * 86400, "years"), (86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{two_digits(seconds / size)} {unit}"
    return f"{two_digits(seconds)} s" if seconds >= 1 else f"{two_digits(1000 * seconds)} ms"


def announce(
    config: Config,
    record: dict[str, Any],
    dataset: Dataset,
    objective: Any,
    hardware: Hardware,
    world: World,
    folder: Any,
) -> None:
    """Print what is derived from the settings, so that a wrong run can be stopped in its first second."""
    per_step = config.train.batch_size * config.row_length
    tokens = per_step * config.train.steps
    judge = f", critic: {config.critic.kind}" if config.train.objective == "avatarl" else ""
    processes = f" on {world.size} processes" if world.size > 1 else ""
    print(f"run        {folder}  (preset {record['preset']}, {config.train.objective}{judge})")
    print(
        f"corpus     {dataset.corpus_name}: {len(dataset.train):,} training, {len(dataset.val):,} validation tokens, "
        f"vocabulary {dataset.tokenizer.vocab_size:,}"
    )
    print(
        f"model      {human(record['parameters'])} parameters, {config.model.n_layer} x {config.model.n_embd}, "
        f"context {config.model.block_size}"
    )
    print(
        f"length     {config.train.steps:,} steps x {per_step:,} tokens = {human(tokens)}, "
        f"{tokens / max(1, len(dataset.train)):.1f} epochs, {human(objective.flops_per_token() * tokens, 'FLOP')}"
    )
    print(f"hardware   {', '.join(hardware.notes)}{processes}", flush=True)
