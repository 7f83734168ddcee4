"""Text that is read last: which step reads what, and who knows of it."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from avatarl.build import build_objective
from avatarl.levels import Levelled
from avatarl.objective import AvataRL
from config import Config, ConfigError, override
from config_method import first_held_back
from data.held_back import HeldBackBatches, check_held_back, known_tokens, training_batches
from model import GPT
from tests.avatarl.builders import tiny_gpt
from tests.data.test_batches import stream

T, ROWS, STEPS, SHARE, L = 8, 5, 20, 0.25, 808


def config(**method: Any) -> Config:
    """Twenty steps of five windows of eight tokens, the last quarter of text and steps held back."""
    base = Config()
    return override(
        base,
        model={"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": T},
        critic={"kind": "mixed", "mixed_context": 2},
        train={"steps": STEPS, "batch_size": ROWS},
        optim={"warmup_steps": 1},
        method={"top_k": 4, "held_back": SHARE, **method},
    )


def test_held_back_text_is_read_last_and_once():
    """Catches a step that reads of the other part, a window that is read twice, and one that crosses the border."""
    known, first = known_tokens(L, SHARE), first_held_back(STEPS, SHARE)
    assert (known, first) == (606, 15)
    batches, late = training_batches(stream(L), config()), []
    for step in range(STEPS):
        batch = batches.batch(step)
        assert torch.equal(batch.indices, step * ROWS + torch.arange(ROWS)) and batch.first == step * ROWS
        assert torch.equal(batch.targets, batch.tokens + 1)
        held = batch.positions is None
        assert held == (step >= first)
        assert bool((batch.tokens >= known).all()) if held else int(batch.targets.max()) < known
        late += batch.tokens[:, 0].tolist() if held else []
    assert len(late) == 25 and len(set(late[:24])) == 24, "202 tokens hold 24 windows of 8 and the token after"


def test_slices_of_held_back_text_are_parts_of_the_same_batch():
    """Catches held-back text that depends on the number of processes."""
    for step in (3, 17):
        whole = training_batches(stream(L), config()).batch(step)
        parts = [training_batches(stream(L), config()).batch(step, *rows) for rows in ((0, 2), (2, 5))]
        for name in ("tokens", "targets", "indices"):
            assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
        assert [p.first for p in parts] == [step * ROWS, step * ROWS + 2]


def test_nothing_is_held_back_by_default_or_from_cross_entropy():
    """Catches other windows for runs that hold nothing back, and a baseline that reads in another order."""
    plain = training_batches(stream(L), config(held_back=0.0))
    other = training_batches(stream(L), override(config(), train={"objective": "cross-entropy"}))
    for step in (0, STEPS - 1):
        assert torch.equal(plain.batch(step).tokens, other.batch(step).tokens)
    assert not isinstance(plain, HeldBackBatches) and not isinstance(other, HeldBackBatches)


def built(**method: Any) -> tuple[AvataRL, np.ndarray]:
    """An objective on a text whose last quarter has a rule of its own, and that text."""
    draw = np.random.default_rng(0)
    text = np.concatenate((draw.integers(0, 6, 606), np.tile([6, 7, 8], 68)[:202])).astype(np.uint16)
    student = GPT(config().model, 9)
    made = build_objective(student, config(**method), text, [], nullcontext)
    assert isinstance(made, AvataRL)
    return made, text


def test_the_critic_does_not_know_what_is_held_back():
    """Catches counts of held-back text, text that is imagined from it, and slopes fitted to nothing."""
    objective, text = built(imagined_windows=1)
    critic: Any = objective._critics[0]
    assert torch.equal(critic.corpus, torch.from_numpy(text[:606].astype(np.int64)))
    imagined = objective.imagination
    assert imagined is not None and len(imagined._text) == 606
    writer = imagined._writer
    assert isinstance(writer, Levelled) and bool(writer.slopes.any())
    plain = built(imagined_windows=1, held_back=0.0)[0].imagination
    assert plain is not None and plain._writer is not None and not isinstance(plain._writer, Levelled)


@pytest.mark.parametrize("step", [14, 15], ids=["before", "from there on"])
def test_reality_alone_pays_for_it(step):
    """Catches a critic that votes on text unknown to it, a share that ε keeps back, and a switch one step off."""
    objective, text = built(unproposed="gold", sparsify="none", normalize="sum", entropy_coef=0.0)
    reference = GPT(config().model, 9)
    reference.load_state_dict(objective.student.state_dict())
    batch = training_batches(text, config()).batch(step)
    loss, _ = objective(batch, step, {}, False)
    expected = F.cross_entropy(reference(batch.tokens).flatten(0, 1), batch.targets.flatten())
    loss.backward()
    expected.backward()
    close = [
        torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-5)
        for p, q in zip(objective.student.parameters(), reference.parameters(), strict=True)
        if p.grad is not None and q.grad is not None
    ]
    assert len(close) > 5 and all(close) == (step == 15)


def test_an_objective_without_the_text_is_as_before():
    """Catches a default that lets reality speak alone."""
    objective, _ = built(held_back=0.0)
    last = objective.settings(STEPS - 1)
    assert float(last.reality_weight) == pytest.approx(0.7) and float(last.epsilon) == pytest.approx(0.1)
    plain = AvataRL(tiny_gpt(), config().method, steps=STEPS, seed=0, critic=objective._critics[0])
    assert float(plain.settings(STEPS - 1).critic_weight) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"method": {"held_back": 1.0}}, r"held-back.*below 1"),
        ({"method": {"held_back": 0.01}}, r"held-back.*steps = 20"),
        ({"critic": {"kind": "model"}}, r"held-back.*ngram, mixed or suffix"),
        ({"critic": {"kind": "ensemble"}}, r"held-back.*ngram, mixed or suffix"),
        ({"critic": {"cache": True}}, r"held-back.*without a cache"),
        ({"method": {"context": "student"}}, r"held-back.*student"),
    ],
)
def test_what_cannot_hold_text_back_is_refused(groups, message):
    """Catches a critic that knows the text all the same, a share without a step, and settings that would not act."""
    with pytest.raises(ConfigError, match=message):
        override(config(), **groups)


def test_too_little_text_is_refused():
    """Catches a run that begins and finds not one window of the text that it held back."""
    with pytest.raises(ConfigError, match=r"held-back = 0.25.*30 training tokens into 22 and 8"):
        check_held_back(30, config())
    check_held_back(L, config())
    check_held_back(3, config(held_back=0.0))
