"""GPT as a model of Hugging Face's, where their GPT-2 can't express it: rotary positions, tables of n-grams and so on.

`export.py --to hf` writes this file into the folder, beside the modules that it imports, so that
`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` needs nothing of this project. Only that export
imports it here. Shapes: B batch, T positions, V vocabulary.
"""

from dataclasses import asdict
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from checks import require
from config_model import ModelConfig
from model import GPT, rotary_table


class AvataRLConfig(PretrainedConfig):
    """The fields of ModelConfig in a dictionary, `gpt`, and the names under which others look for them."""

    model_type = "avatarl"

    def __init__(self, gpt: dict[str, Any] | None = None, vocab_size: int = 65, **further: Any) -> None:
        self.gpt = asdict(ModelConfig(**(gpt or {})))
        self.vocab_size = vocab_size
        self.hidden_size = self.gpt["n_embd"]
        self.num_hidden_layers = self.gpt["n_layer"]
        self.num_attention_heads = self.gpt["n_head"]
        self.max_position_embeddings = self.gpt["block_size"]
        super().__init__(**{"tie_word_embeddings": False, **further})  # the tie is GPT's own


class AvataRLForCausalLM(PreTrainedModel, GenerationMixin):
    """GPT with the interface of transformers; generation reads the last `block_size` tokens anew at every step."""

    config_class = AvataRLConfig
    base_model_prefix = "gpt"
    accepts_loss_kwargs = False  # the loss is a mean: who accumulates gradients divides it
    _supports_sdpa = True

    def __init__(self, config: AvataRLConfig) -> None:
        super().__init__(config)
        self.gpt = GPT(ModelConfig(**config.gpt), config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """What a checkpoint lacks: the table of rotations, which transformers leaves unset, and it alone."""
        if isinstance(module, GPT) and module.rotary is not None:
            shape = module.config
            module.rotary.copy_(rotary_table(shape.block_size, shape.n_embd // shape.n_head))

    def get_input_embeddings(self) -> nn.Module:
        return self.gpt.wte

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> CausalLMOutput:
        """Logits (B, T, V), and with labels (B, T) the mean cross-entropy of the next ones in nats; −100 is left out.

        Padding may follow a text; before or within one it would be read. Raises ConfigError there, and for a text that
        is longer than the context.
        """
        if attention_mask is not None:
            falls = bool((attention_mask.long().diff(dim=-1) <= 0).all())
            require(falls, "attention_mask", "padding before text", 'this model reads it: use padding_side="right"')
        logits = self.gpt(input_ids)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The last tokens, as many as the context holds. Raises ConfigError for padding, which would be read."""
        whole = attention_mask is None or bool(attention_mask.all())
        require(whole, "attention_mask", "padding", "generate from prompts of one length, or from one at a time")
        return {"input_ids": input_ids[:, -self.gpt.config.block_size :]}
