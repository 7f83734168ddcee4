"""GPT-2 as a function: what may depend on what, its size, its start, its options."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from config import ConfigError, ModelConfig
from model import GPT, NGRAM_SHARE, KVCache, NgramEmbedding, attention_backend, padded_vocab, rotary_table, rotate
from tests.model_options import OPTIONS

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12}


def tiny(vocab_size: int = 11, seed: int = 0, **options) -> GPT:
    """A small model whose every parameter, biases and norms included, is away from its trivial start."""
    torch.manual_seed(seed)
    model = GPT(ModelConfig(**{**TINY, **options}), vocab_size).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@given(cut=st.integers(0, 11), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=10)
def test_no_position_sees_a_later_token(options, cut, seed):
    """Catches a missing or shifted causal mask: a changed token must move logits at it, none before."""
    model = tiny(**options)
    torch.manual_seed(seed)
    tokens = torch.randint(11, (2, 12))
    changed = tokens.clone()
    changed[:, cut] = (changed[:, cut] + 1) % 11
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :cut], after[:, :cut])
    assert not torch.allclose(before[:, cut], after[:, cut])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_parameter_learns(options):
    """Catches an option that builds a weight and then leaves it out of the function."""
    model = tiny(**options)
    model(torch.randint(11, (2, 12))).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("parts", [(12,), (5, 7), (1,) * 12, (4, 1, 6, 1)], ids=str)
def test_cache_in_any_portions_equals_one_pass(options, parts):
    """Catches a wrong position, mask or slot when tokens come in portions of one, several or all."""
    model = tiny(**options)
    tokens = torch.randint(11, (3, 12))
    cache = KVCache.empty(model.config, 3, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        pieces = [model(piece, cache) for piece in tokens.split(list(parts), dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), atol=1e-4, rtol=1e-4)


def test_context_beyond_the_block_is_refused():
    """Catches silent reading past the position table, directly and through a cache."""
    model = tiny()
    with pytest.raises(ConfigError, match="12 tokens"):
        model(torch.zeros(1, 13, dtype=torch.long))
    cache = KVCache.empty(model.config, 1, torch.device("cpu"), torch.float32)
    model.hidden(torch.zeros(1, 12, dtype=torch.long), cache)
    with pytest.raises(ConfigError, match="12 tokens"):
        model.hidden(torch.zeros(1, 1, dtype=torch.long), cache)


def test_head_is_the_embedding():
    """Catches a head with weights of its own: one tensor in the state dict, and gradients meet in it."""
    model = tiny()
    names = set(model.state_dict())
    assert "wte.weight" in names and not any("head" in name for name in names)
    assert model.unembedding.data_ptr() == model.wte.weight.data_ptr()
    hidden = model.hidden(torch.arange(11)[None])
    torch.testing.assert_close(model(torch.arange(11)[None]), hidden @ model.wte.weight.T)


def test_padding_is_cut_before_anything_looks():
    """Catches logits over the padded rows, which would take probability from real tokens."""
    assert padded_vocab(50257) == 50304 and padded_vocab(65) == 65 and padded_vocab(1024) == 1024
    model = tiny(vocab_size=1030)
    assert model.wte.weight.shape[0] == 1088 and model.unembedding.shape[0] == 1030
    tokens = torch.randint(1030, (1, 12))
    before = model(tokens)
    assert before.shape == (1, 12, 1030)
    with torch.no_grad():
        model.wte.weight[1030:] = 1e6
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("vocab_size", [65, 1030])
def test_untrained_model_knows_nothing(vocab_size):
    """Catches a wrong initial scale: the loss of a fresh model is ln V to a few hundredths."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=4, n_head=4, n_embd=128, block_size=64), vocab_size)
    tokens, gold = torch.randint(vocab_size, (2, 8, 64)).unbind()
    loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), gold.flatten())
    assert abs(loss.item() - math.log(vocab_size)) < 0.06


def test_initial_scales():
    """Catches residual projections not scaled down by √(2 layers), and biases or norms off their start."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=8, n_head=4, n_embd=256, block_size=256), 1024)
    for name, parameter in model.named_parameters():
        if name.endswith(("out.weight", "down.weight")):
            assert parameter.std().item() == pytest.approx(0.02 / 4, rel=0.02), name
        elif parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.02), name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name


def test_size_and_cost_of_gpt2():
    """Catches a lost or doubled weight: GPT-2 small has 124,439,808; here 47 padding rows of 768 join."""
    with torch.device("meta"):
        model = GPT(ModelConfig(), 50257)
    assert model.parameter_count() == 124_439_808 + 47 * 768
    per_block = 768 * 3 * 768 + 768 * 768 + 2 * 768 * 4 * 768  # qkv, out, up and down
    attention = 2 * 1024 * 768 + 2 * 1024 * 768  # scores, weighted sum of values
    by_hand = 12 * (2 * per_block + attention) + 2 * 50257 * 768
    assert model.flops_per_token() == by_hand


def test_cost_is_what_pytorch_counts():
    """Catches a FLOPs formula that drifted from the model: PyTorch's own counter sees the same products."""
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16)
    model = GPT(config, 65)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(3, 16, dtype=torch.long))
    assert counter.get_total_flops() == 3 * 16 * model.flops_per_token()


def test_the_short_convolution_is_its_formula():
    """Catches a weight of another token's, a shift by one, and a start that is not the plain model's."""
    torch.manual_seed(0)
    model = GPT(tiny(short_conv=2).config, 11)
    assert model.conv is not None
    x = torch.randn(2, 12, 16)
    assert torch.equal(model.conv(x, None), x)
    with torch.no_grad():
        model.conv.weight.normal_()
    found, (one, two) = model.conv(x, None), model.conv.weight[:, 0]
    torch.testing.assert_close(found[:, 0], x[:, 0])
    torch.testing.assert_close(found[:, 1], x[:, 1] + one * x[:, 0])
    torch.testing.assert_close(found[:, 7], x[:, 7] + one * x[:, 6] + two * x[:, 5])


def test_ngrams_share_a_row_exactly_where_their_tokens_are_the_same():
    """Catches a hash that looks at another token or at too few, a row outside its length's part of the table, and a
    start that is not told from a token. 2,197 stretches of 3 collide in 2^40 rows with probability below 1e-5."""
    embedding = NgramEmbedding(tiny(ngram_embed=3, ngram_rows=4).config)
    embedding.rows = 2**40
    tokens = torch.tensor(list(itertools.product(range(13), repeat=3)))
    pairs, triples = embedding.rows_of(tokens, None)[:, -1].unbind(-1)
    assert len(pairs.unique()) == 13**2 and len(triples.unique()) == 13**3
    assert torch.equal(pairs.view(13, 13, 13), pairs.view(13, 13, 13)[:1].expand(13, -1, -1))
    assert int(pairs.max()) < 2**40 <= int(triples.min()) and int(triples.max()) < 2**41
    alone = embedding.rows_of(torch.arange(13)[:, None], None)[:, 0]
    assert len(torch.cat((alone.flatten(), pairs, triples)).unique()) == 13**2 + 13**3 + 2 * 13


def test_ngram_embeddings_are_their_sum():
    """Catches a table that does not start at 0, a length left out, another scale, and rows that are not spread."""
    torch.manual_seed(0)
    model, tokens = GPT(tiny(ngram_embed=4, ngram_rows=32).config, 11), torch.randint(11, (5, 12))
    assert model.ngrams is not None
    assert torch.equal(model.ngrams(tokens, None), torch.zeros(5, 12, 16))
    with torch.no_grad():
        model.ngrams.table.normal_()
    rows = model.ngrams.rows_of(tokens, None)
    assert rows.shape == (5, 12, 3) and [len(part.unique()) > 16 for part in rows.unbind(-1)] == [True] * 3
    torch.testing.assert_close(model.ngrams(tokens, None), NGRAM_SHARE * model.ngrams.table[rows].sum(-2))


@given(i=st.integers(0, 63), j=st.integers(0, 63), shift=st.integers(0, 63), seed=st.integers(0, 99))
@settings(deadline=None)
def test_rotary_scores_depend_on_distance_alone(i, j, shift, seed):
    """Catches rotations with mixed-up halves, signs or frequencies; rotation also keeps every length."""
    table = rotary_table(128, 8)
    torch.manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 1, 8)

    def score(at_q: int, at_k: int) -> torch.Tensor:
        turned_q = rotate(q, table[:, at_q : at_q + 1])
        torch.testing.assert_close(turned_q.norm(), q.norm())
        return (turned_q * rotate(k, table[:, at_k : at_k + 1])).sum()

    torch.testing.assert_close(score(i, j), score(i + shift, j + shift), atol=1e-4, rtol=1e-4)


def test_rotary_scores_do_depend_on_distance():
    """Catches a rotation that does nothing, or whose pairs all turn at one frequency."""
    table = rotary_table(16, 4)
    angles = torch.atan2(table[1], table[0])  # (T, C / 2)
    torch.testing.assert_close(angles[1], torch.tensor([1.0, 0.01]))
    x = torch.randn(1, 1, 16, 4)
    assert not torch.allclose(rotate(x, table)[:, :, 1:], x[:, :, 1:], atol=1e-3)
    assert torch.equal(rotate(x, table)[:, :, 0], x[:, :, 0])


def test_options_change_what_they_name():
    """Catches an option that is accepted and ignored."""
    names = {str(option): set(tiny(**option).state_dict()) for option in OPTIONS[:6]}
    assert not any(n.endswith("bias") for n in names["{'bias': False}"])
    assert "wpe.weight" not in names["{'position': 'rope'}"]
    assert not any("norm" in n and n.endswith("bias") for n in names["{'norm': 'rmsnorm'}"])
    plain = tiny()
    tokens = torch.randint(11, (1, 12))
    for option in ({"activation": "relu2"}, {"qk_norm": True}):
        other = tiny(**option)
        other.load_state_dict(plain.state_dict())
        assert not torch.allclose(other(tokens), plain(tokens)), option


def test_dropout_acts_in_training_only():
    """Catches dropout that is never on, or stays on in evaluation."""
    model, tokens = tiny(dropout=0.5), torch.randint(11, (1, 12))
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.allclose(model(tokens), model(tokens))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bfloat16_autocast_stays_close(options):
    """Catches operands of mixed types under autocast, with and without a cache."""
    model, tokens = tiny(**options), torch.randint(11, (2, 12))
    cache = KVCache.empty(model.config, 2, torch.device("cpu"), torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model(tokens)
        cached = torch.cat([model(piece, cache) for piece in tokens.split([8, 4], dim=1)], dim=1)
    exact = model(tokens)
    assert (whole - exact).abs().mean() < 0.05 * exact.abs().mean()
    assert (cached - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_backend_without_a_gpu():
    """Catches flash-attn being chosen where it cannot run."""
    assert attention_backend(torch.device("cpu"), torch.bfloat16) == "blocked"
    assert attention_backend(torch.device("cpu"), torch.float32) == "blocked"
    assert attention_backend(torch.device("mps"), torch.float32) == "sdpa"


def test_a_clone_runs_its_own_weights_where_the_model_is_compiled(monkeypatch):
    """Catches a moving average or a twin that, copied from a compiled student, answers with the student's weights."""
    monkeypatch.setattr(torch, "compile", lambda method: lambda *words: method(*words))
    model = tiny()
    model.compile_hidden()
    clone = model.clone()
    tokens = torch.arange(8)[None]
    assert torch.equal(clone(tokens), model(tokens))
    with torch.no_grad():
        for p in clone.parameters():
            p.zero_()
    assert not clone(tokens).any()
    assert model(tokens).any()
