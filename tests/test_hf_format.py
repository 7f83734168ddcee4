"""Hugging Face's GPT-2 and ours are one function, both ways; what can't cross is named, or takes its code along."""

import builtins
import subprocess
import sys

import pytest
import torch

from config import ConfigError, ModelConfig
from data.tokenizers import END_OF_TEXT, Gpt2Tokenizer, Tokenizer, train_bpe, train_char
from hf_format import from_hf, save_hf, state_from_hf, state_to_hf, to_hf, to_hf_tokenizer
from model import GPT
from tests.model_options import OPTIONS
from tests.tiny_train import environment

transformers = pytest.importorskip("transformers")

TEXT = "To be, or not to be:\nthat's the  question \n\n\tnaïve 😀 Straße 漢字\n"


def ours(vocab_size: int = 23, **options) -> GPT:
    """A small GPT with no parameter at its trivial start."""
    torch.manual_seed(0)
    config = ModelConfig(**{"n_layer": 3, "n_head": 2, "n_embd": 32, "block_size": 16, **options})
    return shaken(GPT(config, vocab_size)).eval()


def theirs(**options):
    """A small GPT2LMHeadModel with random biases and norms, in training mode and with dropout on."""
    torch.manual_seed(1)
    sizes = {"n_layer": 3, "n_head": 2, "n_embd": 32, "n_positions": 16, "vocab_size": 23}
    config = transformers.GPT2Config(**{**sizes, "bos_token_id": None, "eos_token_id": None, **options})
    return shaken(transformers.GPT2LMHeadModel(config))


def shaken(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def assert_same_function(gpt: GPT, hf_model, vocab_size: int = 23) -> None:
    assert not gpt.training and not hf_model.training
    tokens = torch.randint(vocab_size, (2, 16))
    with torch.no_grad():
        logits = hf_model(tokens).logits
        assert logits.shape == (2, 16, vocab_size) and logits.std() > 0.5
        torch.testing.assert_close(gpt(tokens), logits, atol=1e-4, rtol=0)


def test_ours_as_theirs():
    """Catches a transposed projection, mixed-up q, k and v, another GELU or epsilon, on the way out."""
    gpt = ours()
    assert_same_function(gpt, to_hf(gpt))


def test_theirs_as_ours():
    """Catches the same on the way in, with dropout in their config that evaluation must not apply."""
    hf_model = theirs()
    gpt = from_hf(hf_model)
    assert gpt.config.dropout == 0.1
    assert_same_function(gpt, hf_model.eval())


@pytest.mark.parametrize("vocab_size", [23, 1030])
def test_both_ways_lose_nothing(vocab_size):
    """Catches a weight that is rounded, dropped or doubled: round trips are exact, names included."""
    gpt = ours(vocab_size, dropout=0.2)
    back = from_hf(to_hf(gpt))
    assert back.config == gpt.config and back.vocab_size == vocab_size
    expected = gpt.state_dict()
    expected["wte.weight"][vocab_size:] = 0  # padding does not cross
    assert_equal_states(back.state_dict(), expected)
    hf_model = theirs(vocab_size=vocab_size)
    assert_equal_states(to_hf(from_hf(hf_model)).state_dict(), hf_model.state_dict())


def assert_equal_states(a, b) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_state_functions_are_pure():
    """Catches a conversion that changes what it was given."""
    state = ours().state_dict()
    copy = {name: value.clone() for name, value in state.items()}
    state_from_hf(state_to_hf(state, 23))
    assert_equal_states(state, copy)


def test_padding_stays_here():
    """Catches padded rows that become tokens of the Hugging Face model."""
    gpt = ours(vocab_size=1030)
    hf_model = to_hf(gpt)
    assert gpt.wte.weight.shape[0] == 1088 and hf_model.config.vocab_size == 1030
    assert_same_function(gpt, hf_model, 1030)
    assert_same_function(from_hf(hf_model), hf_model, 1030)


def test_without_biases():
    """Catches biases left at their random start, or refused: zeros say the same, and come back as biases."""
    gpt = ours(bias=False)
    hf_model = to_hf(gpt)
    assert_same_function(gpt, hf_model)
    back = from_hf(hf_model)
    assert back.config.bias
    assert_same_function(back, hf_model)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("position", "rope"),
        ("norm", "rmsnorm"),
        ("activation", "relu2"),
        ("activation", "gelu-erf"),
        ("qk_norm", True),
        ("short_conv", 3),
        ("ngram_embed", 3),
    ],
)
def test_what_gpt2_lacks_is_named(option, value):
    """Catches an option that is silently dropped, which would export another function."""
    with pytest.raises(ConfigError, match=f"model.{option.replace('_', '-')} = {value!r}: GPT-2 has no"):
        to_hf(ours(**{option: value}))


@pytest.mark.parametrize(
    "option",
    [
        {"activation_function": "relu"},
        {"layer_norm_epsilon": 1e-6},
        {"n_inner": 64},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"tie_word_embeddings": False},
        {"embd_pdrop": 0.3},
    ],
    ids=str,
)
def test_what_gpt_lacks_is_named(option):
    """Catches settings of theirs that are silently dropped, which would import another function."""
    with pytest.raises(ConfigError, match=next(iter(option))):
        from_hf(theirs(**option))


def test_missing_library_is_one_line(monkeypatch):
    """Catches a traceback where transformers is not installed."""
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "transformers":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="pip install transformers"):
        to_hf(ours())


@pytest.fixture(scope="module")
def gpt2(shared) -> Gpt2Tokenizer:
    """GPT-2's tokenizer from the vocabulary on disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "data" / "gpt2-bpe"))
        return Gpt2Tokenizer()


def assert_same_tokens(tokenizer: Tokenizer, exported, text: str) -> None:
    ids = tokenizer.encode(text).tolist()
    assert exported.encode(text) == ids
    assert exported.decode(ids) == text
    assert len(exported) == tokenizer.vocab_size
    assert exported.eos_token_id == tokenizer.end_of_text
    if tokenizer.end_of_text is not None:
        assert exported.encode(END_OF_TEXT) == [tokenizer.end_of_text]
        assert exported.decode([tokenizer.end_of_text, *ids], skip_special_tokens=True) == text


@pytest.mark.filterwarnings("ignore")
def test_gpt2_tokens(gpt2, shakespeare):
    """Catches merges rebuilt in a wrong order from tiktoken's ranks: 100,000 characters, the same tokens."""
    assert_same_tokens(gpt2, to_hf_tokenizer(gpt2, 10**6), shakespeare[:100_000] + TEXT)


@pytest.mark.parametrize("train", [train_char, lambda text: train_bpe(text, 300)], ids=["char", "bpe"])
def test_saved_folder_is_what_transformers_reads(train, tmp_path):
    """Catches an export that only we can read: model and tokenizer come back through the Auto classes."""
    tokenizer = train(TEXT)
    gpt = ours(tokenizer.vocab_size)
    save_hf(gpt, tokenizer, tmp_path)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert_same_tokens(tokenizer, exported, TEXT)
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_function(gpt, hf_model, tokenizer.vocab_size)
    assert hf_model.config.eos_token_id == tokenizer.end_of_text
    prompt = exported("be", return_tensors="pt")
    text = exported.decode(hf_model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0])
    assert text.startswith("be")


ELSEWHERE = """
import sys
from pathlib import Path
import torch
import transformers

root = Path(sys.argv[1])
found = {}
for folder in sorted(path for path in root.iterdir() if (path / "config.json").is_file()):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokens = torch.load(root / "tokens.pt")
    with torch.no_grad():
        logits = model(tokens).logits
    count = 30 if model.config.model_type == "avatarl" else 12  # GPT-2 ends with its context
    text = model.generate(tokens[:, :4], max_new_tokens=count, do_sample=False, pad_token_id=0)
    half = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    with torch.no_grad():
        found[folder.name] = (logits, text, half(tokens).logits.float())
loss = model(tokens, labels=tokens).loss
loss.backward()
mask = torch.ones_like(tokens)
mask[0, -3:] = 0
after = model(tokens, attention_mask=mask.bool()).logits
before = mask.flip(-1)


def refusal(action, mask, **how):
    try:
        action(tokens, attention_mask=mask, **how)
    except ValueError as error:
        return str(error)
    return ""


refusals = [refusal(model, before), *(refusal(model.generate, m, max_new_tokens=2) for m in (mask, before))]
model.save_pretrained(root / "again" / "model")
again = transformers.AutoModelForCausalLM.from_pretrained(root / "again" / "model", trust_remote_code=True)
with torch.no_grad():
    again = again(tokens).logits
told = {"found": found, "loss": loss.item(), "after": after.detach(), "again": again, "refusals": refusals}
torch.save(told, root / "found.pt")
"""


def test_what_is_no_gpt2_takes_its_code_along(tmp_path):
    """Catches code that needs this checkout, rotations left unset, another function, bfloat16 that fails, a copy that
    lost its code, and padding that is read.

    Loaded by a process that sees nothing of the project; generation goes past the end of the context.
    """
    tokenizer, models = train_char(TEXT), {}
    for i, options in enumerate(OPTIONS):
        models[f"{i:02}"] = gpt = ours(tokenizer.vocab_size, **options)
        folder = tmp_path / f"{i:02}"
        folder.mkdir()
        save_hf(gpt, tokenizer, folder)
        with_code = set(options) - {"bias"} != set()
        assert (folder / "model.py").exists() == (folder / "LICENSE").exists() == with_code
    tokens = torch.randint(tokenizer.vocab_size, (2, 16))
    torch.save(tokens, tmp_path / "tokens.pt")
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    settled = environment() | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", str(tmp_path / "elsewhere.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=settled, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    seen = torch.load(tmp_path / "found.pt")
    assert seen["found"].keys() == models.keys()
    for name, gpt in models.items():
        logits, text, half = seen["found"][name]
        with torch.no_grad():
            torch.testing.assert_close(logits, gpt(tokens), atol=1e-4, rtol=0)
        assert (half - logits).abs().mean() < 0.1 * logits.std()
        assert text.tolist() == greedy(gpt, tokens[:, :4], text.shape[1] - 4)
    last = models[max(models)]
    with torch.no_grad():
        logits = last(tokens)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert seen["loss"] == pytest.approx(loss.item(), abs=1e-4)
    torch.testing.assert_close(seen["after"], logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(seen["again"], logits, atol=1e-4, rtol=0)
    assert "padding before text" in seen["refusals"][0]
    assert all("one length" in refusal for refusal in seen["refusals"][1:])


def test_tokens_of_a_large_vocabulary_and_their_end(tmp_path, monkeypatch):
    """Catches padded rows that become tokens, and generation that does not know where a text ends."""
    tokenizer = train_bpe("".join(chr(0x4E00 + i % 977) + "ab"[i % 2] for i in range(8_000)) + TEXT, 1100)
    gpt = ours(tokenizer.vocab_size, position="rope")
    assert len(gpt.wte.weight) > tokenizer.vocab_size > 1024
    save_hf(gpt, tokenizer, tmp_path / "out")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert_same_tokens(tokenizer, exported, TEXT)
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert_same_function(gpt, hf_model, tokenizer.vocab_size)
    assert hf_model.generation_config.eos_token_id == tokenizer.end_of_text


@torch.no_grad()
def greedy(gpt: GPT, tokens: torch.Tensor, count: int) -> list[list[int]]:
    """Tokens (B, T) and the `count` likeliest ones after them, each from the last block."""
    for _ in range(count):
        best = gpt(tokens[:, -gpt.config.block_size :])[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat((tokens, best), dim=1)
    return tokens.tolist()


def test_exported_characters_refuse_strangers(tmp_path):
    """Catches an unseen character that is dropped in silence."""
    exported = to_hf_tokenizer(train_char("abc"), 16)
    with pytest.raises(Exception, match=r"\[UNK\]"):
        exported.encode("abd")
