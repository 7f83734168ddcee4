"""GPT-2, the policy: learned positions, pre-LayerNorm, tanh-GELU, tied embedding and head.

Options (off by default): no biases, rotary positions, RMSNorm, exact GELU or squared ReLU, QK-norm, a short
convolution that lets every embedding hear the tokens before its own, and embeddings of the last few tokens together.
`GPT.hidden` stops before the head, so that a loss can take the unembedding in chunks; `GPT.forward` returns logits over
the true vocabulary. Shapes: B batch, T positions, D width, H heads, C = D / H, V vocabulary.

Left out of GPT-2 as published: nothing but its dropout of 0.1, which is a setting here (0 by default).
"""

import copy
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checks import require
from config_model import ModelConfig
from kernels import LONGEST_BLOCKED, blocked_attention

HASH_FACTOR = 0x5851F42D4C957F2D  # odd, of 63 bits
# Adam moves a row that is rarely met as far at a time as one that is met always, so a row counts for little. With a
# larger share the student learns its text by heart: results/default-preset.md.
NGRAM_SHARE = 0.05


def padded_vocab(vocab_size: int) -> int:
    """Rows of the stored embedding: large vocabularies are rounded up to 64 (50,257 → 50,304) for the GPU."""
    return vocab_size if vocab_size < 1024 else -(-vocab_size // 64) * 64


def attention_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The attention kernel in use: "flash-attn" where installed and the GPU has it, "blocked" on a CPU, else "sdpa"."""
    if device.type == "cpu":
        return "blocked"
    half = dtype in (torch.bfloat16, torch.float16)
    installed = importlib.util.find_spec("flash_attn") is not None
    if device.type == "cuda" and half and installed and torch.cuda.get_device_capability(device)[0] >= 8:
        return "flash-attn"
    return "sdpa"


@dataclass
class KVCache:
    """Keys and values of the tokens seen so far, preallocated: (layers, 2, B, H, T, C)."""

    store: Tensor
    length: int = 0
    recent: dict[str, Tensor] = field(default_factory=dict)
    """What a part of the model still needs of the tokens seen last, by the part's name: (B, n, …)."""

    @staticmethod
    def empty(config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype) -> "KVCache":
        """A cache that holds one block of `config.block_size` tokens for `batch` sequences."""
        shape = (config.n_layer, 2, batch, config.n_head, config.block_size, config.n_embd // config.n_head)
        return KVCache(torch.zeros(shape, device=device, dtype=dtype))

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, H, t, C) of one layer; return all keys and values up to and including them."""
        end = self.length + k.shape[2]
        self.store[layer, 0, :, :, self.length : end] = k
        self.store[layer, 1, :, :, self.length : end] = v
        return self.store[layer, 0, :, :, :end], self.store[layer, 1, :, :, :end]

    def follow(self, part: str, x: Tensor, count: int) -> Tensor:
        """What `part` makes of t tokens, x (B, t, …), after that of the `count` before, 0 where there are none;
        remembers the last `count`."""
        if self.length == 0 or part not in self.recent:
            self.recent[part] = x.new_zeros(len(x), count, *x.shape[2:])
        wide = torch.cat((self.recent[part], x), dim=1)
        self.recent[part] = wide[:, -count:]
        return wide

    def repeated(self, times: int) -> "KVCache":
        """A copy in which every row stands `times` times, one after the other."""
        recent = {part: x.repeat_interleave(times, dim=0) for part, x in self.recent.items()}
        return KVCache(self.store.repeat_interleave(times, dim=2), self.length, recent)


class RMSNorm(nn.RMSNorm):
    """RMSNorm with the constructor of LayerNorm; it has no bias to switch."""

    def __init__(self, width: int, bias: bool = False) -> None:
        super().__init__(width, eps=1e-5)


def make_norm(config: ModelConfig) -> nn.Module:
    """One normalisation layer of width D."""
    return (RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm)(config.n_embd, bias=config.bias)


def rotary_table(block_size: int, head_width: int) -> Tensor:
    """Cosines and sines by position and frequency, base 10,000: (2, T, C / 2). RoFormer, 2021."""
    frequency = 10_000.0 ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    angle = torch.outer(torch.arange(block_size, dtype=torch.float32), frequency)  # (T, C / 2)
    return torch.stack((angle.cos(), angle.sin()))  # (2, T, C / 2)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate each pair (first half, second half) of x (B, H, t, C) by table (2, t, C / 2)."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = table
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class ShortConvolution(nn.Module):
    """x_t + Σ_i weight_i ⊙ x_{t−i} over the n tokens before t: depthwise and causal, at first the identity.

    A first layer that finds the last tokens already together need not spend its attention on fetching them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.short_conv, 1, config.n_embd))

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        count, length = len(self.weight), x.shape[1]
        wide = F.pad(x, (0, 0, count, 0)) if cache is None else cache.follow("conv", x, count)  # (B, n + T, D)
        for i, weight in enumerate(self.weight, start=1):
            x = torch.addcmul(x, wide[:, count - i : count - i + length], weight)
        return x


class NgramEmbedding(nn.Module):
    """Embeddings of the last 2, 3, … n tokens together: tokens (B, T) → (B, T, D), 0 at the start.

    Every length has `ngram_rows` rows, which its stretches of tokens share by hash (Pagnoni et al., 2024, for bytes):
    what a count of n-grams knows, the first layer need not find out by attention. Looking up costs no products.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.longest, self.rows = config.ngram_embed, config.ngram_rows
        self.table = nn.Parameter(torch.zeros((self.longest - 1) * self.rows, config.n_embd))

    def forward(self, tokens: Tensor, cache: KVCache | None) -> Tensor:
        rows = self.rows_of(tokens, cache).flatten(0, 1)  # (B·T, n − 1)
        return NGRAM_SHARE * F.embedding_bag(rows, self.table, mode="sum").view(*tokens.shape, -1)

    def rows_of(self, tokens: Tensor, cache: KVCache | None) -> Tensor:
        """The table's row for the last 2, 3, … n tokens at every place: (B, T, n − 1), int64.

        A row is the top bits of Σ_i token_i · factor^i modulo 2^64; what stands before a text is a token of its own.
        """
        before, length = self.longest - 1, tokens.shape[1]
        named = tokens.long() + 1
        seen = F.pad(named, (before, 0)) if cache is None else cache.follow("ngrams", named, before)  # (B, n − 1 + T)
        shift, factor, key, found = 65 - self.rows.bit_length(), HASH_FACTOR, named * HASH_FACTOR, []
        for i in range(1, self.longest):
            factor = wrapped(factor * HASH_FACTOR)
            key = key + seen[:, before - i : before - i + length] * factor
            found.append((key >> shift & self.rows - 1) + (i - 1) * self.rows)
        return torch.stack(found, dim=-1)


def wrapped(number: int) -> int:
    """The same modulo 2^64, as an int64."""
    return (number + 2**63) % 2**64 - 2**63


class Attention(nn.Module):
    """Causal multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = config.n_head
        self.dropout = config.dropout
        self.qk_norm = config.qk_norm
        self.backend = "sdpa"
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, rotary: Tensor | None, cache: KVCache | None) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, C)
        if self.qk_norm:
            q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        y = self.attend(q, k, v)  # (B, T, H, C)
        return self.out(y.reshape(batch, length, width))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of the last q.shape[2] positions over all of k and v: (B, T, H, C)."""
        dropout = self.dropout if self.training else 0.0
        if self.backend == "flash-attn" and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            # No import statement: transformers would ask for the package wherever it loads an exported model.
            flash = importlib.import_module("flash_attn").flash_attn_func
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return flash(q, k, v, dropout_p=dropout, causal=True)
        new, seen = q.shape[2], k.shape[2]
        if self.backend == "blocked" and new == seen <= LONGEST_BLOCKED and not dropout:
            return blocked_attention(q, k, v).transpose(1, 2)
        dtype = q.dtype
        if q.device.type == "cpu" and dtype == torch.bfloat16:
            # PyTorch's own attention for CPUs is faster in float32, casts included.
            q, k, v = q.float(), k.float(), v.float()
        if new == seen:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            mask = torch.ones(new, seen, dtype=torch.bool, device=q.device).tril(seen - new)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return y.transpose(1, 2).to(dtype)


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": partial(F.gelu, approximate="tanh"),
    "gelu-erf": F.gelu,
    "relu2": relu2,
}


class MLP(nn.Module):
    """Two linear layers, four times the width between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))  # (B, T, 4D) inside


class Block(nn.Module):
    """Attention and MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm_1 = make_norm(config)
        self.attn = Attention(config, layer)
        self.norm_2 = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: Tensor | None, cache: KVCache | None) -> Tensor:
        x = x + self.dropout(self.attn(self.norm_1(x), rotary, cache))
        return x + self.dropout(self.mlp(self.norm_2(x)))


class GPT(nn.Module):
    """The policy π(next token | context). Tokens (B, T) int64 → logits (B, T, V)."""

    rotary: Tensor | None

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.wte = nn.Embedding(padded_vocab(vocab_size), config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.conv = ShortConvolution(config) if config.short_conv else None
        self.ngrams = NgramEmbedding(config) if config.ngram_embed else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm_f = make_norm(config)
        table = None
        if config.position == "rope":
            table = rotary_table(config.block_size, config.n_embd // config.n_head)
        self.register_buffer("rotary", table, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """GPT-2's initialisation: normal(0.02), residual projections divided by √(2 layers), biases 0."""
        residual = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=residual if name.endswith(("out", "down")) else 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    @property
    def unembedding(self) -> Tensor:
        """The head's rows of the true vocabulary, tied to the embedding: (V, D)."""
        rows = self.wte.weight
        return rows if len(rows) == self.vocab_size else rows[: self.vocab_size]

    def use_attention(self, backend: str) -> None:
        """Choose every block's attention: "sdpa" is PyTorch's own, "flash-attn" a GPU's, "blocked" ours for CPUs."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend

    def compile_hidden(self) -> None:
        """Let torch.compile take over `hidden`; generation, whose lengths vary, keeps the eager one."""
        self.hidden = torch.compile(self.hidden)  # type: ignore[method-assign]

    def clone(self) -> "GPT":
        """A second model with the same weights, kernels and mode, compiled anew where this one is."""
        compiled = self.__dict__.pop("hidden", None)  # bound to this model: a copy of it would run these weights
        twin = copy.deepcopy(self)
        if compiled is not None:
            self.__dict__["hidden"] = compiled
            twin.compile_hidden()
        return twin

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Final hidden states (B, T, D) of tokens (B, T); they follow what `cache` holds and are added to it.

        Raises ConfigError where the context would outgrow the block size.
        """
        start = cache.length if cache else 0
        end = start + tokens.shape[1]
        limit = self.config.block_size
        require(end <= limit, "tokens", end, f"the context is {limit} tokens")
        x = self.wte(tokens)  # (B, T, D)
        if self.conv is not None:
            x = self.conv(x, cache)
        if self.ngrams is not None:
            x = x + self.ngrams(tokens, cache)
        if self.wpe is not None:
            x = x + self.wpe.weight[start:end]
        rotary = None if self.rotary is None else self.rotary[:, start:end]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rotary, cache)
        if cache is not None:
            cache.length = end
        return self.norm_f(x)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        return self.hidden(tokens, cache) @ self.unembedding.T  # (B, T, V)

    def parameter_count(self) -> int:
        """Trained numbers; the tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> float:
        """Matrix-product FLOPs of a forward pass, per token, at full context: 2 per weight, plus attention.

        A training step costs three times as much. Causal attention is counted in full, as is usual.
        """
        c = self.config
        weights = 12 * c.n_layer * c.n_embd**2 + self.vocab_size * c.n_embd
        return 2.0 * weights + 4.0 * c.n_layer * c.block_size * c.n_embd
