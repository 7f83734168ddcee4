"""Many candidates at once: equal to operating one by one, and nothing for the zero action."""

import functools
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from checks import ConfigError
from generation import generate
from model import GPT
from surgery.corrections import batched_generate, batched_logits, corrected, evaluating
from surgery.operation import LIMIT, Operator
from surgery.theater import SurgicalTheater
from tests.surgery.patients import BLOCK, VOCAB, bits, patient, random_actions, unchanged

OPTIONS: list[dict] = [
    {},
    {"bias": False, "position": "rope", "norm": "rmsnorm", "activation": "relu2", "qk_norm": True},
    {"short_conv": 2},
    {"ngram_embed": 2, "ngram_rows": 8},
]


def random_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def one_by_one(model: GPT, operator: Operator, actions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The definition: each candidate in a theatre, on its own context."""
    found = []
    for action, row in zip(actions, tokens, strict=True):
        with SurgicalTheater(model, operator.layers):
            operator.apply(action)
            found.append(model(row[None]))
    return torch.cat(found)


@given(
    options=st.sampled_from(OPTIONS),
    layers=st.sampled_from([[0], [1, 2], [2, 0], [-1]]),
    rank=st.integers(1, 8),
    count=st.integers(1, 5),
    length=st.integers(1, BLOCK),
    contexts=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=40)
def test_one_batch_equals_operating_one_by_one(options, layers, rank, count, length, contexts, seed):
    """Catches actions of the wrong sample or layer, vectors of the wrong side, and contexts that get mixed up."""
    model = patient(**options)
    operator, before = Operator(model, layers, rank), bits(model)
    actions, tokens = random_actions(count, len(layers), rank, seed), random_tokens(contexts, length, seed)
    shared = contexts == 1
    context = tokens if shared else tokens[torch.arange(count) % contexts]
    found = batched_logits(model, operator, actions, context)
    wanted = one_by_one(model, operator, actions, context.expand(count, -1))
    assert found.shape == (count, length, VOCAB)
    assert ((found - wanted).abs().max() / wanted.abs().max()).item() < 1e-5
    last = batched_logits(model, operator, actions, context[0] if shared else context, last_only=True)
    assert torch.allclose(last, found[:, -1], atol=1e-5 * wanted.abs().max().item())
    assert unchanged(model, before)


@pytest.mark.parametrize("layers", [[0], [2]])
def test_equal_contexts_share_their_beginning(layers):
    """Catches work that is done for every candidate though it is the same, and a share that goes too far."""
    model, seen = patient(), list[list[int]]()
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda m, args, y: seen[-1].append(len(args[0])))
    operator, actions = Operator(model, layers, 2), random_actions(6, 1, 2)
    tokens = random_tokens(2, 5).repeat(3, 1)
    before = layers[0]
    seen.append([])
    batched_logits(model, operator, actions, tokens)
    assert seen[-1] == [2] * before + [6] * (3 - before)
    seen.append([])
    batched_generate(model, operator, actions, tokens, 2)
    assert seen[-1] == [2] * before + [6] * (3 - before) + [6] * 6
    seen.append([])
    batched_generate(model, operator, actions, [*tokens[:5].tolist(), [1]], 1)
    assert seen[-1][:3] == [6] * 3  # prompts of different lengths start together


def test_the_candidates_differ():
    """Catches corrections without effect, which would equal nothing but themselves."""
    model = patient()
    operator = Operator(model, [0, 1], 2)
    logits = batched_logits(model, operator, random_actions(4, 2, 2), random_tokens(1, 6))
    apart = torch.cdist(logits.flatten(1), logits.flatten(1)) + torch.eye(4)
    assert apart.min() > 1e-3


@pytest.mark.parametrize("others", [False, True])
def test_zero_actions_change_no_bit(others):
    """Catches an addition of zeros, which turns −0 into 0, and candidates that reach into their neighbours' rows."""
    model = patient(norm="rmsnorm")
    with torch.no_grad():
        model.blocks[1].norm_1.weight[::2] = -0.0  # the projection's inputs are ±0 there
    operator, tokens = Operator(model, [1, 2], 3), random_tokens(4, 7)
    actions = random_actions(4, 2, 3)
    actions[2] = 0
    inputs: list[torch.Tensor] = []
    handle = model.blocks[1].attn.qkv.register_forward_hook(lambda m, args, y: inputs.append(args[0].detach()))
    with torch.no_grad():
        wanted = model(tokens)
    found = batched_logits(model, operator, actions if others else torch.zeros_like(actions), tokens)
    handle.remove()
    for row in (0, 2) if others else range(4):
        assert torch.equal(inputs[0][row].view(torch.int32), inputs[1][row].view(torch.int32))
        assert torch.equal(found[row].view(torch.int32), wanted[row].view(torch.int32))
    assert (inputs[0].view(torch.int32) == torch.tensor(-0.0).view(torch.int32)).any()
    assert others == (not torch.equal(found[1], wanted[1]))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("cut", "length"), [({}, 4), ({"top_k": 5, "top_p": 0.9}, BLOCK), ({}, 1), ({}, BLOCK + 3)])
def test_generation_equals_operating_one_by_one(options, cut, length):
    """Catches a cache of the unoperated keys, other random numbers than `generate`'s, past the block as well."""
    model = patient(**options)
    operator = Operator(model, [0, 2], 3)
    actions, prompts = random_actions(5, 2, 3), random_tokens(1, length).tolist()
    found = batched_generate(model, operator, actions, prompts, 3 * BLOCK, seed=7, temperature=0.9, **cut)
    assert found.shape == (5, 3 * BLOCK)
    for action, text in zip(actions, found.tolist(), strict=True):
        with SurgicalTheater(model, operator.layers):
            operator.apply(action)
            assert generate(model, prompts, 3 * BLOCK, seed=7, temperature=0.9, **cut) == [text]
    assert generate(model, prompts, 3 * BLOCK, seed=7, temperature=0.9, **cut) == [found[0].tolist()]
    assert len({tuple(text) for text in found.tolist()}) > 1


def test_candidates_share_the_random_numbers_of_their_prompt():
    """Catches luck that is taken for skill: candidates that do the same on the same prompt must write the same."""
    model = patient()
    operator = Operator(model, [1], 2)
    prompts = [[1, 2], [3, 4, 5], [1, 2], [3, 4, 5], [6]]
    texts = batched_generate(model, operator, torch.zeros(5, 1, 2), prompts, 9, seed=3).tolist()
    assert texts[0] == texts[2] and texts[1] == texts[3]
    assert [texts[0], texts[1], texts[4]] == generate(model, [prompts[0], prompts[1], prompts[4]], 9, seed=3)
    apart = batched_generate(model, operator, torch.zeros(3, 1, 2), [[1, 2]] * 3, 9, seed=3, streams=[0, 4, 0]).tolist()
    assert apart[0] == apart[2] == texts[0]
    assert [apart[1]] == generate(model, [[1, 2]], 9, seed=3, first_row=4) and apart[1] != apart[0]


def test_an_operated_model_may_be_evaluated_by_the_zero_action(monkeypatch):
    """Catches decompositions of operated weights for candidates that do nothing."""
    model = patient()
    operator = Operator(model, [1], 2)
    with SurgicalTheater(model, [1]):
        operator.apply(torch.tensor([[LIMIT, -LIMIT]]))
        monkeypatch.setattr("surgery.operation.decompose", lambda *_: pytest.fail("decomposed"))
        text = batched_generate(model, operator, torch.zeros(1, 1, 2), [[1, 2]], 9)
        assert text.tolist() == generate(model, [[1, 2]], 9)


def test_dropout_is_off_and_comes_back():
    """Catches candidates that are compared under different dropout masks, and a training run left without its own."""
    model = patient(dropout=0.5).train()
    operator, tokens = Operator(model, [0], 2), random_tokens(1, 5)
    first = batched_logits(model, operator, random_actions(3, 1, 2), tokens)
    assert model.training and model.blocks[0].dropout.training
    assert torch.equal(first, batched_logits(model, operator, random_actions(3, 1, 2), tokens))
    texts = [batched_generate(model, operator, torch.zeros(2, 1, 2), tokens, 20, seed=1) for _ in range(2)]
    assert torch.equal(*texts) and torch.equal(texts[0][0], texts[0][1])
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert model.training


def test_hooks_go_with_the_block_whatever_happens():
    """Catches a model that stays corrected after an error or a Ctrl-C."""
    model = patient()
    operator, actions = Operator(model, [0, 1], 2), random_actions(3, 2, 2)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), corrected(operator, actions):
            raise error
    with pytest.raises(ConfigError, match="rows = 2"), corrected(operator, actions):
        model(random_tokens(2, 4))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_another_thread_sees_the_model_as_it_is():
    """Catches corrections that leak into an evaluation that runs beside."""
    model, tokens, seen = patient(), random_tokens(1, 5), []
    wanted = model(tokens)
    with corrected(Operator(model, [0], 2), random_actions(3, 1, 2)):
        thread = threading.Thread(target=lambda: seen.append(model(tokens)))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], wanted)


class Objective(nn.Module):
    """Holds a student as an objective does."""

    def __init__(self, student: GPT) -> None:
        super().__init__()
        self.student = student


def test_wrapped_and_compiled_models_are_corrected():
    """Catches compiled code that runs past the hooks without a word."""
    model, tokens, actions = patient(), random_tokens(3, 5), random_actions(3, 1, 2)
    operator = Operator(model, [1], 2)
    wanted = batched_logits(model, operator, actions, tokens)
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(tokens)
    wrappers: list[Any] = [compiled, Objective(model), torch.compile(Objective(model), backend="eager")]
    for wrapped in wrappers:
        assert torch.equal(batched_logits(wrapped, Operator(wrapped, [1], 2), actions, tokens), wanted)
    model.compile_hidden()
    assert torch.equal(batched_logits(model, operator, actions, tokens), wanted)
    torch.compiler.reset()


def test_corrections_that_are_not_used_are_an_error():
    """Catches the unoperated model's answer as that of every candidate."""
    model = patient()
    operator = Operator(patient(), [1], 2)
    calls: list[Any] = [batched_logits, functools.partial(batched_generate, steps=4)]
    for call in calls:
        with pytest.raises(RuntimeError, match="did not run"):
            call(model, operator, random_actions(2, 1, 2), random_tokens(2, 3))
        call(model, operator, torch.zeros(2, 1, 2), random_tokens(2, 3))  # nothing to correct


def test_under_autocast():
    """Catches products of two types, and a zero row that is rounded on its way."""
    model, tokens = patient(), random_tokens(3, 5)
    operator, actions = Operator(model, [0, 2], 2), random_actions(3, 2, 2)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = batched_logits(model, operator, actions, tokens)
        assert torch.equal(found[0], model(tokens)[0])
        assert batched_generate(model, operator, actions, tokens, 4).shape == (3, 4)
    exact = batched_logits(model, operator, actions, tokens)
    assert (found - exact).abs().max() / exact.abs().max() < 0.05


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, o, a: batched_logits(m, o, a, random_tokens(2, 4)), "give 1 context, or 3"),
        (lambda m, o, a: batched_logits(m, o, 2 * a, random_tokens(3, 4)), f"from −{LIMIT} to"),
        (lambda m, o, a: batched_logits(m, o, a[0], random_tokens(1, 4)), r"actions \(M, L, r\)"),
        (lambda m, o, a: batched_logits(m, o, a, random_tokens(3, BLOCK + 1)), f"context is {BLOCK}"),
        (lambda m, o, a: batched_logits(nn.Linear(2, 2), o, a, random_tokens(3, 4)), "Linear"),
        (lambda m, o, a: batched_generate(m, o, a, [[1], [2]], 4), "give 1 prompt, or 3"),
        (lambda m, o, a: batched_generate(m, o, a, [[1]], 0), "at least 1 token"),
        (lambda m, o, a: batched_generate(m, o, a, [[VOCAB]], 4), "no such token"),
        (lambda m, o, a: batched_generate(m, o, a, [[1]], 4, streams=[0]), "one per candidate"),
        (lambda m, o, a: batched_generate(m, o, a, [[1]], 4, temperature=-1.0), "temperature"),
    ],
)
def test_requests_that_cannot_work_are_named(call, says):
    """Catches broadcasting that makes something of a wrong shape."""
    model = patient()
    with pytest.raises(ConfigError, match=says):
        call(model, Operator(model, [0, 1], 2), random_actions(3, 2, 2))
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.gpu
def test_on_a_gpu():
    """Catches tensors that stay behind on the CPU, in a theatre as in one batch."""
    model = patient().cuda()
    operator, actions, tokens = Operator(model, [0, 2], 3), random_actions(5, 2, 3), random_tokens(5, 6).cuda()
    before = bits(model)
    found, wanted = batched_logits(model, operator, actions, tokens), one_by_one(model, operator, actions, tokens)
    assert ((found - wanted).abs().max() / wanted.abs().max()).item() < 1e-4
    text = batched_generate(model, operator, torch.zeros(2, 2, 3), tokens[:1], 20, seed=1)
    assert [text[1].tolist()] == generate(model, tokens[:1].tolist(), 20, seed=1)
    assert unchanged(model, before)
