"""A run folder with an untrained model in it, for tests of what people do with a run."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from config import Config, override
from data.tokenizers import Tokenizer
from files import write_json
from model import GPT

STEP = "step-000500"


def save_tiny_run(folder: Path, tokenizer: Tokenizer, **options) -> GPT:
    """Write a run with one checkpoint, as `load_run` reads it; returns its model, biases away from zero."""
    torch.manual_seed(0)
    config = override(Config(), model={"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, **options})
    model = GPT(config.model, tokenizer.vocab_size).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    place = folder / "checkpoints" / STEP
    place.mkdir(parents=True)
    save_file(model.state_dict(), place / "model.safetensors")
    size = (place / "model.safetensors").stat().st_size
    write_json(place / "meta.json", {"state": {"step": 500}, "sizes": {"model.safetensors": size}})
    (folder / "checkpoints" / "latest").write_text(STEP + "\n")
    (folder / "checkpoints" / "best").write_text(STEP + "\n")
    tokenizer.save(folder)
    record = {
        "config": config.to_dict(),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.fingerprint,
    }
    write_json(folder / "config.json", record)
    return model
