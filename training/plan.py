"""What a run will be, before it starts: parameters, tokens, FLOPs, memory and time, in a few lines."""

from typing import Any

import torch

from config import Config, critic_preset, preset
from data.prepare import Dataset
from model import GPT
from training.distributed import World
from training.hardware import Hardware, matmul_peak

# A rough share of the measured matmul peak that a step reaches. On a CPU the default run logs 0.2 to 0.3
# (train/utilisation) in bfloat16; the others are guesses until someone measures them.
ASSUMED_UTILISATION = {"cpu": 0.25, "cuda": 0.40, "mps": 0.20}
NOMINAL_VOCAB = {"char": 65, "gpt2": 50257}


def human(number: float, unit: str = "") -> str:
    """A number with three digits and a metric prefix: 12345 → 12.3 k."""
    for power, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= power:
            return f"{number / power:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def duration(seconds: float) -> str:
    """Seconds as a person would say them: 95 → 1 min 35 s."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"


def memory_bytes(config: Config, parameters: int, vocab_size: int, dtype: torch.dtype, world: int) -> float:
    """Estimated peak of weights, gradients, optimiser state, activations and one chunk of logits, per process.

    Activations: about 16 numbers of width D and 8 of width 4D/4 a position and layer, in the products' type.
    """
    m, rows = config.model, config.train.batch_size // (config.train.grad_accum * world)
    size = 2 if dtype == torch.bfloat16 else 4
    state = parameters * 4 * (3 if config.optim.name == "muon" else 4)
    activations = rows * m.block_size * m.n_layer * m.n_embd * 24 * size
    logits = 3 * min(rows * m.block_size * vocab_size, 16 * 2**20) * 4
    return state + activations + logits


def critic_flops(config: Config, vocab_size: int) -> tuple[float, float]:
    """FLOPs of the critic per token of training, and of its own pretraining; zero for one that is no model."""
    c = config.critic
    if config.train.objective != "avatarl" or c.kind != "model" or c.run:
        return 0.0, 0.0
    trained = preset(critic_preset(config))
    with torch.device("meta"):
        forward = GPT(trained.model, vocab_size).flops_per_token()
    tokens = trained.train.steps * trained.train.batch_size * trained.model.block_size
    critics = 2 if c.cross_fit else 1
    return critics * forward, critics * 3 * forward * tokens


def forecast(config: Config, hardware: Hardware, world: World) -> list[str]:
    """Lines for --dry-run: what the run of `config` costs on this hardware. Reads and writes no data."""
    vocab_size = NOMINAL_VOCAB.get(config.data.tokenizer, config.data.bpe_vocab)
    with torch.device("meta"):
        model = GPT(config.model, vocab_size)
    parameters = model.parameter_count()
    tokens = config.train.steps * config.train.batch_size * config.model.block_size
    flops = 3 * model.flops_per_token() * tokens
    judged, pretraining = critic_flops(config, vocab_size)
    kind = hardware.device.type
    peak = matmul_peak(hardware.device, hardware.dtype) * world.size
    share = ASSUMED_UTILISATION[kind]
    seconds = (flops + judged * tokens) / (peak * share)
    memory = memory_bytes(config, parameters, vocab_size, hardware.dtype, world.size)
    return [
        f"parameters  {human(parameters)} (vocabulary of {vocab_size:,})",
        f"tokens      {human(tokens)} in {config.train.steps:,} steps of {tokens // config.train.steps:,}",
        f"FLOPs       {human(flops)} for the student, {human(judged * tokens)} for its critic, "
        f"{human(pretraining)} to pretrain that where it is missing",
        f"memory      about {memory / 1e9:.2f} GB per process, besides PyTorch itself",
        f"time        about {duration(seconds)} of training, at {share:.0%} of this machine's measured "
        f"{human(peak, 'FLOP/s')}",
        f"hardware    {', '.join(hardware.notes)}",
    ]


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
    per_step = config.train.batch_size * config.model.block_size
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
