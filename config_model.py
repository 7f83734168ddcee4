"""The group `model`: the shape of the policy, and where it departs from GPT-2."""

from dataclasses import dataclass
from typing import Literal

from checks import check_fields, require


@dataclass(frozen=True)
class ModelConfig:
    """GPT-2 and its options (DESIGN section 4). The vocabulary comes from the tokenizer."""

    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Attention heads; must divide n-embd."""
    n_embd: int = 768
    """Width D of the residual stream."""
    block_size: int = 1024
    """Context length T in tokens."""
    dropout: float = 0.0
    """Dropout on embeddings, attention and residual branches while training."""
    bias: bool = True
    """Biases in linear layers and norms, as in GPT-2."""
    position: Literal["learned", "rope"] = "learned"
    """Position information: GPT-2's learned table, or rotary embeddings."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before every branch and at the end."""
    activation: Literal["gelu", "gelu-erf", "relu2"] = "gelu"
    """MLP non-linearity: GPT-2's tanh-GELU, the GELU that this approximates (cheaper on a CPU), or squared ReLU."""
    qk_norm: bool = False
    """RMS-normalise queries and keys inside each head."""
    short_conv: int = 0
    """Tokens before each one that its embedding also hears, by a depthwise causal convolution; 0: as in GPT-2."""
    ngram_embed: int = 0
    """Longest stretch of tokens with an embedding of its own, beside each token's; from 2 on. 0: as in GPT-2."""
    ngram_rows: int = 8192
    """Rows of the table of every such length, a power of 2; more stretches than rows share them by hash."""

    def __post_init__(self) -> None:
        check_fields("model", self)
        for name in ("n_layer", "n_head", "n_embd", "block_size"):
            value = getattr(self, name)
            require(value >= 1, f"model.{name.replace('_', '-')}", value, "use a positive number")
        near = max(1, round(self.n_embd / self.n_head)) * self.n_head
        fix = f"must be divisible by model.n-head = {self.n_head}; try {near}"
        require(self.n_embd % self.n_head == 0, "model.n-embd", self.n_embd, fix)
        turns = self.position == "learned" or self.n_embd // self.n_head % 2 == 0
        require(turns, "model.position", self.position, "rotary embeddings need an even head width n-embd / n-head")
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "use a probability below 1")
        require(self.short_conv >= 0, "model.short-conv", self.short_conv, "use 0 (none) or a few tokens, such as 3")
        n, rows = self.ngram_embed, self.ngram_rows
        require(n in (0, *range(2, 17)), "model.ngram-embed", n, "use 0 (none) or 2 to 16")
        require(rows.bit_count() == 1 < rows, "model.ngram-rows", rows, "use a power of 2, such as 8192")
