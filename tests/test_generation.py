"""Generation: the cache changes nothing, a row is its own, filters and stops do what they say."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config import ConfigError, ModelConfig
from generation import Sampling, context_start, generate, uniform_draws
from model import GPT
from tests.model_options import OPTIONS

VOCAB = 13


def tiny(block_size: int = 8, vocab_size: int = VOCAB, **options) -> GPT:
    """A small random model with opinions: sharp enough that the context matters."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=block_size, **options), vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def by_hand(model: GPT, prompt: list[int], count: int, seed: int, row: int, sampling: Sampling) -> list[int]:
    """Full-context generation of one row, token by token, from the definition alone."""
    draws = uniform_draws(seed, row, [len(prompt)], count)[0]
    tokens = list(prompt)
    for n in range(len(prompt), len(prompt) + count):
        context = tokens[context_start(n, model.config.block_size) :]
        with torch.no_grad():
            logits = model(torch.tensor([context]))[:, -1]
        tokens.append(int(sampling.pick(logits, draws[n : n + 1])))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("block_size", [8, 5, 1])
def test_cache_equals_full_context(options, block_size):
    """Catches any position, mask or slide in which the cached path departs, far past the block."""
    model = tiny(block_size, **options)
    prompts = [[1], [2, 3, 4], list(range(11))]
    sampling = Sampling(0.9, 9, 0.95)
    request: dict = {"temperature": 0.9, "top_k": 9, "top_p": 0.95, "seed": 5}
    cached = generate(model, prompts, 25, **request)
    assert cached == generate(model, prompts, 25, use_cache=False, **request)
    assert cached == [by_hand(model, prompt, 25, 5, row, sampling) for row, prompt in enumerate(prompts)]


@given(
    prompts=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12), min_size=1, max_size=4),
    seed=st.integers(0, 2**64 - 1),
    temperature=st.sampled_from([0.0, 0.7, 1.0, 3.0]),
)
@settings(deadline=None, max_examples=25)
def test_a_row_depends_on_no_other(prompts, seed, temperature):
    """Catches draws shared between rows, and contexts that shift with the neighbours' lengths."""
    model = tiny()
    together = generate(model, prompts, 15, temperature=temperature, seed=seed)
    for row, prompt in enumerate(prompts):
        request: dict = {"temperature": temperature, "seed": seed, "first_row": row}
        assert generate(model, [prompt], 15, **request) == [together[row]]
        assert generate(model, [prompt], 9, use_cache=False, **request) == [together[row][:9]]


@given(block=st.integers(1, 70), length=st.integers(1, 400))
def test_context_rule(block, length):
    """Catches contexts that are empty, too long, shorter than promised, or that move backwards."""
    start = context_start(length, block)
    seen = length - start
    assert 1 <= seen <= block
    assert start == 0 if length <= block else seen > block - max(1, block // 4)
    assert start <= context_start(length + 1, block)


def test_cache_saves_the_work():
    """Catches a cache that is rebuilt at every step: most steps must feed the model one token."""
    model = tiny(block_size=16)
    fed: list[int] = []
    model.wte.register_forward_hook(lambda module, inputs, output: fed.append(inputs[0].shape[1]))
    generate(model, [[1, 2, 3]], 61)
    assert fed[0] == 3 and set(fed[1:14]) == {1}
    assert len(fed) == 61 and [n for n in fed[14:] if n > 1] == [13] * 12


def test_compiled_models_are_sampled_eagerly():
    """Catches sampling during training through the compiled `hidden`, which would compile each length."""
    model = tiny()
    expected = generate(model, [[1, 2]], 12)
    model.hidden = lambda *tokens: pytest.fail("compiled")  # type: ignore[method-assign]
    assert generate(model, [[1, 2]], 12) == expected


def test_seed_decides():
    """Catches draws from global state, or a seed or row number that is not used."""
    model = tiny()
    torch.manual_seed(1)
    first = generate(model, [[1], [1]], 30, seed=1)
    torch.manual_seed(2)
    assert generate(model, [[1], [1]], 30, seed=1) == first
    other = generate(model, [[1], [1]], 30, seed=2)
    assert len({tuple(row) for row in [*first, *other]}) == 4


def test_draws_follow_the_distribution():
    """Catches a biased draw. 20,000 draws against 4 probabilities; chance of a false alarm below 1e-6."""
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]])
    count = 20_000
    draws = uniform_draws(3, 0, [0], count)[0]
    picks = Sampling(temperature=2.0).pick(logits.expand(count, 4), draws)
    p = (logits[0] / 2.0).softmax(0)
    share = picks.bincount(minlength=4) / count
    assert ((share - p).abs() < 5.5 * (p * (1 - p) / count).sqrt()).all()


@given(
    logits=st.lists(st.floats(-8, 8), min_size=2, max_size=9),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.floats(0.01, 1.0),
)
@settings(deadline=None)
def test_filters_keep_the_smallest_sufficient_set(logits, top_k, top_p):
    """Catches top-k or top-p off by one, applied to the wrong distribution, or dropping everything."""
    row = torch.tensor([logits], dtype=torch.float64)
    kept = Sampling(1.0, top_k, top_p).keep_likely(row)[0].isfinite()
    values = row[0]
    assert kept.any()
    assert values[kept].min() >= values[~kept].max() if (~kept).any() else True
    bar = values.sort(descending=True).values[min(top_k or 99, len(logits)) - 1]
    pool = values >= bar
    assert not (kept & ~pool).any()
    p = values.masked_fill(~pool, -math.inf).softmax(0)
    least = values[kept].min()
    assert p[kept].sum() >= (top_p or 1.0) - 1e-9
    assert p[values > least].sum() < (top_p or 1.0) + 1e-9  # without the least likely: not enough


def test_filters_by_example():
    """Catches both filters being ignored, or mixed up, on numbers that can be read."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = {
        (None, None): [1, 1, 1, 1],
        (2, None): [1, 1, 0, 0],
        (None, 0.5): [1, 0, 0, 0],
        (None, 0.51): [1, 1, 0, 0],
        (None, 0.9): [1, 1, 1, 0],
        (2, 0.6): [1, 0, 0, 0],  # of the two that are left the first has 0.625
        (9, 1.0): [1, 1, 1, 1],
    }
    for (top_k, top_p), expected in kept.items():
        assert Sampling(1.0, top_k, top_p).keep_likely(logits).isfinite().int().tolist() == [expected]


@given(
    draw=st.sampled_from([0.0, 1e-300, 0.5, 1 - 2**-53, 1.0]),  # 1.0: what float32 makes of the one before
    temperature=st.sampled_from([1e-300, 1e-3, 1.0, 1e9]),
)
@settings(deadline=None)
def test_extreme_draws_stay_inside(draw, temperature):
    """Catches NaN from tiny temperatures, and steps past the last token that may be drawn."""
    logits = torch.tensor([[-1e4, 3.0, 2.0, -1e4, 1.0, -3e38]])
    token = Sampling(temperature, top_k=3).pick(logits, torch.tensor([draw], dtype=torch.float64))
    assert token.item() in (1, 2, 4)
    if temperature <= 1e-3:
        assert token.item() == 1


def test_greedy_takes_the_likeliest():
    """Catches temperature 0 dividing by zero or drawing."""
    model = tiny()
    row = generate(model, [[1, 2]], 6, temperature=0, seed=1)[0]
    assert row == generate(model, [[1, 2]], 6, temperature=0, seed=2, top_k=4, top_p=0.3)[0]
    with torch.no_grad():
        assert row[:6] == model.eval()(torch.tensor([[1, 2, *row]]))[0].argmax(-1)[1:7].tolist()


def test_end_of_text_ends_a_row_alone():
    """Catches a stop that cuts its neighbours, that is returned, or that counts inside a prompt."""
    model = tiny()
    prompts = [[1], [4, 4, 4], [7]]
    free = generate(model, prompts, 30, seed=3)
    stop = free[0][4]
    heard: list[list[int]] = [[], [], []]
    stopped = generate(
        model, prompts, 30, seed=3, end_of_text=stop, on_token=lambda row, token: heard[row].append(token)
    )
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free]
    assert heard == stopped
    inside = generate(model, [[1, 4, 4], [stop, stop, 2, stop]], 9, seed=3)
    expected = [row[: row.index(stop)] if stop in row else row for row in inside]
    assert generate(model, [[1, 4, 4], [stop, stop, 2, stop]], 9, seed=3, end_of_text=stop) == expected


def test_mode_is_restored():
    """Catches sampling under dropout, and a training run left in evaluation mode, errors included."""
    model = tiny(dropout=0.5).train()
    first = generate(model, [[1]], 20)
    assert model.training and first == generate(model, [[1]], 20)

    def hang_up(row: int, token: int) -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        generate(model, [[1]], 20, on_token=hang_up)
    assert model.training
    generate(model.eval(), [[1]], 1)
    assert not model.training


def test_padded_rows_are_never_drawn():
    """Catches draws from the padding of the vocabulary."""
    model = tiny(vocab_size=1030)
    with torch.no_grad():
        model.wte.weight[1030:] = 100 * model.wte.weight[0]
    rows = generate(model, [[1], [2]], 40, temperature=5.0)
    assert max(map(max, rows)) < 1030


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_under_autocast(options):
    """Catches a cache in another type than the keys that autocast makes."""
    with torch.autocast("cpu", torch.bfloat16):
        rows = generate(tiny(**options), [[1], [2, 3]], 12)
    assert [len(row) for row in rows] == [12, 12]


def test_nothing_asked_nothing_done():
    """Catches crashes on no prompts or no tokens."""
    assert generate(tiny(), [], 5) == []
    assert generate(tiny(), [[1], [2]], 0) == [[], []]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompts": [[1], []]}, "prompt 2 is empty"),
        ({"prompts": [[1, VOCAB]]}, f"prompt = \\[{VOCAB}\\].*0 to {VOCAB - 1}"),
        ({"prompts": [[-1]]}, "no such token"),
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"top_k": 0}, "top-k = 0"),
        ({"top_p": 0.0}, "top-p = 0.0"),
        ({"top_p": 1.1}, "top-p = 1.1"),
        ({"max_new_tokens": -1}, "tokens = -1"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**64}, "seed = "),
    ],
    ids=str,
)
def test_bad_requests_are_named(change, says):
    """Catches a bad value that goes through or fails without its name."""
    with pytest.raises(ConfigError, match=says):
        generate(**{"model": tiny(), "prompts": [[1]], "max_new_tokens": 3, **change})
