"""AvataRL's GPT as Hugging Face's GPT-2 and back: weights, model and tokenizer.

What GPT-2 can express crosses without loss: learned positions, LayerNorm, tanh-GELU, with or without biases.
Two things look different afterwards. A model without biases comes out with biases of zero, and comes back as
a model that has them. The padding of a large vocabulary stays here: Hugging Face gets the true vocabulary,
and padding that comes back is zero.

A model that is no GPT-2 is saved as one of our own class, with the code that it takes (modeling_avatarl.py).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from config import ConfigError, ModelConfig, require
from data.tokenizers import END_OF_TEXT, BpeTokenizer, CharTokenizer, Tokenizer
from files import write_atomic, write_json
from model import GPT, padded_vocab

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

RENAMED = {
    "blocks.": "h.",
    "norm_1": "ln_1",
    "norm_2": "ln_2",
    "norm_f": "ln_f",
    "attn.qkv": "attn.c_attn",
    "attn.out": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
AS_IN_GPT2 = {
    "position": "learned",
    "norm": "layernorm",
    "activation": "gelu",
    "qk_norm": False,
    "short_conv": 0,
    "ngram_embed": 0,
}
ROOT = Path(__file__).resolve().parent
CODE = ("modeling_avatarl", "model", "kernels", "config_model", "checks")
"""What a model of our own class consists of, the module of its classes first."""
REQUIRED_OF_HF = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def state_to_hf(state: Mapping[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """State dict of a GPT as that of GPT2LMHeadModel: other names, projections (in, out), true vocabulary."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        theirs = name
        for ours, other in RENAMED.items():
            theirs = theirs.replace(ours, other)
        if name.startswith("blocks.") and value.ndim == 2:
            value = value.T.contiguous()
        found[f"transformer.{theirs}"] = value[:vocab_size] if name == "wte.weight" else value
        stem, kind = name.rsplit(".", 1)
        if kind == "weight" and not name.startswith(("wte", "wpe")) and f"{stem}.bias" not in state:
            found[f"transformer.{theirs.removesuffix('weight')}bias"] = value.new_zeros(value.shape[-1])
    found["lm_head.weight"] = found["transformer.wte.weight"]
    return found


def state_from_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `state_to_hf`; the embedding gets its padding back, as zeros."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "lm_head.weight":  # tied: stored once here
            continue
        ours = name.removeprefix("transformer.")
        for mine, theirs in RENAMED.items():
            ours = ours.replace(theirs, mine)
        if ours.startswith("blocks.") and value.ndim == 2:
            value = value.T.contiguous()
        elif ours == "wte.weight":
            value = F.pad(value, (0, 0, 0, padded_vocab(len(value)) - len(value)))
        found[ours] = value
    return found


def beyond_gpt2(config: ModelConfig) -> list[str]:
    """The fields by which a model is no GPT-2."""
    return [name for name, theirs in AS_IN_GPT2.items() if getattr(config, name) != theirs]


def to_hf(model: GPT, end_of_text: int | None = None) -> "GPT2LMHeadModel":
    """The same function as a GPT2LMHeadModel in evaluation mode, on the CPU.

    Raises ConfigError for a model with an option that GPT-2 lacks, or when transformers is not installed.
    """
    config = model.config
    if lacking := beyond_gpt2(config):
        flag, value = f"model.{lacking[0].replace('_', '-')}", getattr(config, lacking[0])
        raise ConfigError(f"{flag} = {value!r}: GPT-2 has no such thing; it can't be converted")
    transformers = import_transformers()
    theirs = transformers.GPT2Config(
        vocab_size=model.vocab_size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    hf_model = transformers.GPT2LMHeadModel(theirs).to(model.wte.weight.dtype)
    hf_model.load_state_dict(state_to_hf(model.state_dict(), model.vocab_size))
    return hf_model.eval()


def from_hf(hf_model: "GPT2LMHeadModel") -> GPT:
    """The same function as a GPT in evaluation mode, on the CPU.

    Raises ConfigError for a setting of Hugging Face's GPT-2 that GPT here has no counterpart for.
    """
    theirs = hf_model.config
    for name, allowed in REQUIRED_OF_HF.items():
        value = getattr(theirs, name, allowed[0])
        require(value in allowed, name, value, f"only {' or '.join(map(str, allowed))} can be converted")
    inner = 4 * theirs.n_embd
    require(theirs.n_inner in (None, inner), "n_inner", theirs.n_inner, f"must be 4 * n_embd = {inner}")
    dropouts = {theirs.resid_pdrop, theirs.embd_pdrop, theirs.attn_pdrop}
    require(len(dropouts) == 1, "resid_pdrop, embd_pdrop, attn_pdrop", dropouts, "set the three to one value")
    config = ModelConfig(
        n_layer=theirs.n_layer,
        n_head=theirs.n_head,
        n_embd=theirs.n_embd,
        block_size=theirs.n_positions,
        dropout=dropouts.pop(),
    )
    model = GPT(config, theirs.vocab_size).to(hf_model.dtype)
    model.load_state_dict(state_from_hf(hf_model.state_dict()))
    return model.eval()


def save_hf(model: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """Write model and tokenizer into `folder`, as transformers' `from_pretrained` reads them.

    A model that is no GPT-2 takes its code along and is loaded with `trust_remote_code=True`.
    """
    if beyond_gpt2(model.config):
        save_with_code(model, tokenizer.end_of_text, folder)
    else:
        to_hf(model, tokenizer.end_of_text).save_pretrained(folder)
    to_hf_tokenizer(tokenizer, model.config.block_size).save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    # The one name of this class that transformers 4 and 5 both know; 5 writes its own.
    named = json.loads(settings.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(settings, named)


def save_with_code(model: GPT, end_of_text: int | None, folder: Path) -> None:
    """Write weights, configuration and the modules that make a GPT of them, which import each other, and a licence."""
    import_transformers()
    from modeling_avatarl import AvataRLConfig, AvataRLForCausalLM

    ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    theirs = AvataRLForCausalLM(AvataRLConfig(asdict(model.config), model.vocab_size, **ends))
    theirs.to(model.wte.weight.dtype).gpt.load_state_dict(model.state_dict())
    classes = {"AutoConfig": AvataRLConfig, "AutoModelForCausalLM": AvataRLForCausalLM}
    theirs.config.auto_map = {auto: f"{CODE[0]}.{found.__name__}" for auto, found in classes.items()}
    theirs.generation_config.use_cache = False
    theirs.save_pretrained(folder)
    ours = re.compile(rf"^from ({'|'.join(CODE)}) import", re.MULTILINE)
    for name in CODE:
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        write_atomic(folder / f"{name}.py", ours.sub(r"from .\1 import", source))
    write_atomic(folder / "LICENSE", (ROOT / "LICENSE").read_text(encoding="utf-8"))


def to_hf_tokenizer(tokenizer: Tokenizer, block_size: int) -> "PreTrainedTokenizerFast":
    """The same tokens as a fast tokenizer of transformers.

    One thing differs: where a text spells out <|endoftext|>, Hugging Face makes it the special token.
    """
    import_transformers()
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, CharTokenizer):
        ids = {character: i for i, character in enumerate(tokenizer.characters)}
        # A stand-in for unknowns that is no token itself: an unseen character is an error.
        backend = Backend(models.WordLevel(ids, unk_token=""))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
    else:
        tokens, merges = bpe_tables(tokenizer)
        backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    ends = {} if tokenizer.end_of_text is None else {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=block_size,
        clean_up_tokenization_spaces=False,
        **ends,
    )


def bpe_tables(tokenizer: Tokenizer) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens in id order and merges in order of rank, in GPT-2's printable spelling of bytes.

    tiktoken keeps only ranks: a token's merge is the pair that is left when its bytes are merged by all
    earlier ranks.
    """
    if isinstance(tokenizer, BpeTokenizer):
        return tokenizer.tokens, tokenizer.merges
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    spelling = byte_spelling()
    ranks = {encoding.decode_single_token_bytes(i): i for i in range(encoding.eot_token)}
    tokens = ["".join(spelling[byte] for byte in token) for token in ranks]
    merges = []
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append(("".join(spelling[b] for b in parts[0]), "".join(spelling[b] for b in parts[1])))
    return [*tokens, END_OF_TEXT], merges


def byte_spelling() -> list[str]:
    """GPT-2's printable character for each of the 256 bytes: itself where it is visible, else from 256 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]


def import_transformers() -> Any:
    """The library, quiet. Raises ConfigError with the way to get it."""
    try:
        import transformers
    except ImportError:
        raise ConfigError("Hugging Face's format needs transformers; pip install transformers") from None
    transformers.utils.logging.disable_progress_bar()
    return transformers
