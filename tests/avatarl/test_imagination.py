"""Imagined windows: who writes them, who judges them, and that they are the same however a run is cut."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from avatarl import imagination
from avatarl.critics import DenseOpinion
from avatarl.imagination import Imagination, Writer, written_at_once
from avatarl.loss import judge, reinforce_loss
from avatarl.mixed import MixedCritic
from avatarl.ngram import NgramCritic
from avatarl.objective import AvataRL
from avatarl.suffixes import SuffixCritic
from config import Config, ConfigError, override
from tests.avatarl.builders import method, random_batch, tiny_gpt

V, T, STEPS, ROWS = 11, 8, 10, 3
CRITICS = {
    "ngram": lambda text: NgramCritic(text, V, context=3),
    "mixed": lambda text: MixedCritic(text, V, context=3),
    "suffix": lambda text: SuffixCritic(text, V, max_context=3),
}


def text_of(length: int = 600, seed: int = 0) -> np.ndarray:
    """A text in which what stands two places back matters."""
    draw, text = np.random.default_rng(seed), [0, 1]
    while len(text) < length:
        text.append(int((text[-1] + 2 * text[-2] + draw.integers(3)) % V))
    return np.array(text, dtype=np.uint16)


class TableWriter:
    """Writes and judges by a table of probabilities after each pair of tokens, (V, V, V)."""

    vocab_size, reach = V, 2

    def __init__(self, table: Tensor) -> None:
        self.table, self.asked = table, 0

    def after(self, context: Tensor) -> DenseOpinion:
        self.asked += 1
        assert context.shape[1] == 2
        return DenseOpinion(self.table[context[:, 0], context[:, 1]].log())

    def opinion(self, tokens: Tensor, positions: Tensor | None) -> DenseOpinion:
        first = torch.zeros_like(tokens[:, :1])
        before = torch.cat((first, tokens[:, :-1]), 1)
        return DenseOpinion(self.table[before, tokens].log().flatten(0, 1))


def table(seed: int = 0, certain: bool = False) -> Tensor:
    """Random probabilities; `certain`: one token has nearly all of them, the sum of the two before it."""
    if certain:
        pairs = torch.arange(V)[:, None] + torch.arange(V)
        return torch.nn.functional.one_hot(pairs % V, V).float().mul(1 - 1e-7).add(1e-9)
    return torch.randn(V, V, V, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)


def imagined_by(writer: Any, seed: int = 0, text: np.ndarray | None = None, block_size: int = T) -> Imagination:
    text = text_of() if text is None else text
    return Imagination(writer, text, block_size=block_size, batch_size=ROWS, steps=STEPS, seed=seed)


def rows(step: int, start: int = 0, stop: int = ROWS) -> tuple[int, Tensor]:
    first = step * ROWS
    return first + start, torch.arange(first + start, first + stop)


def avatarl(student: Any, writer: TableWriter, seed: int = 0, **changes: Any) -> AvataRL:
    m = method(imagined_windows=2, **changes)
    own = Imagination(writer, text_of(), block_size=T, batch_size=ROWS, steps=STEPS, seed=seed)
    return AvataRL(student, m, steps=STEPS, seed=seed, critic=writer, imagination=own)


def step_batch(step: int = 0) -> Any:
    first, indices = rows(step)
    return random_batch()._replace(first=first, indices=indices)


def test_windows_are_what_the_writer_says():
    """Catches a context that is one place off, a token drawn from another row's odds, a first token of the corpus."""
    tokens, written, _ = imagined_by(TableWriter(table(certain=True))).windows(*rows(0), count=2)
    assert tokens.shape == written.shape == (2 * ROWS, T)
    assert torch.equal(tokens[:, 1:], written[:, :-1])
    assert torch.equal(written[:, 1:], (tokens[:, 1:] + tokens[:, :-1]) % V)
    assert len({tuple(row) for row in tokens.tolist()}) > ROWS, "all windows begin at the same place"


def test_a_gpu_writes_more_at_once_within_its_limits():
    """Catches a GPU left with a CPU's portions, and portions whose log-probabilities outgrow what is kept for them."""
    for block_size, vocab_size in ((64, 65), (256, 65), (1024, 4096)):
        on_cpu, on_gpu = (written_at_once(block_size, vocab_size, device) for device in ("cpu", "cuda"))
        assert 1 <= 4 * on_cpu <= on_gpu and 2 * on_gpu * block_size * vocab_size <= 2**29
    assert written_at_once(64, 65) == written_at_once(64, 65, "meta")


def test_windows_begin_behind_places_of_the_text():
    """Catches windows that continue what stands nowhere in the text: the first tokens would be drawn from noise."""
    text = np.array([3, 4] * 50, dtype=np.uint16)
    tokens, _, _ = imagined_by(TableWriter(table(certain=True)), text=text).windows(*rows(0), count=4)
    assert (tokens[:, 0] == 7).all()
    assert set(tokens[:, 1].tolist()) == {0, 10}  # 7 + 4 or 7 + 3: some begin behind each of the two pairs


def test_tokens_are_drawn_as_often_as_they_are_likely():
    """Catches a greedy writer, odds that are not normalised, and draws that depend on one another."""
    writer = TableWriter(table())
    tokens, written, _ = imagined_by(writer, block_size=64).windows(*rows(0), count=200)
    pairs = (tokens[:, :-1] * V + tokens[:, 1:]).flatten()
    counts = torch.zeros(V * V, V).index_put_((pairs, written[:, 1:].flatten()), torch.ones(len(pairs)), True)
    total = counts.sum(1, keepdim=True)
    expected = writer.table.flatten(0, 1) * total
    chi_square = ((counts - expected).square() / expected.clamp_min(1e-9))[expected > 5].sum()
    cells = int((expected > 5).sum())
    assert cells > 500 and abs(chi_square - cells) < 6 * (2 * cells) ** 0.5


@pytest.mark.parametrize("kind", CRITICS)
def test_critics_say_of_contexts_what_they_say_of_windows(kind):
    """Catches `after` leaving a token out, reading past the context, or looking one token late."""
    critic: Any = CRITICS[kind](text_of())
    context = torch.from_numpy(text_of(seed=3)[:30].astype(np.int64)).view(10, 3)
    whole = critic.opinion(context, None).full().view(10, 3, V)[:, -1]
    torch.testing.assert_close(critic.after(context).full(), whole)
    assert isinstance(critic, Writer) and critic.reach == (5 if kind == "mixed" else 3)


@pytest.mark.parametrize("kind", CRITICS)
def test_the_opinion_is_the_writers_own(kind):
    """Catches judgements of another position, and contexts that end at the window's first token."""
    critic: Any = CRITICS[kind](text_of())
    tokens, _, opinion = imagined_by(critic).windows(*rows(0), count=2)
    wanted = critic.opinion(tokens, None).full().view(*tokens.shape, V)
    found = opinion.full().view(*tokens.shape, V)
    sighted = critic.reach - 1  # from here on a window holds all that its critic looks at
    torch.testing.assert_close(found[:, sighted:], wanted[:, sighted:], rtol=2e-3, atol=2e-3)  # kept in float16
    assert not torch.allclose(found[:, 0], wanted[:, 0], atol=1e-2), "what stood before the window is forgotten"


def test_windows_depend_on_seed_row_and_number_alone():
    """Catches text that another division of the batch, a resume or a falling count would change."""
    writer = TableWriter(table())
    whole = imagined_by(writer)
    first, later = (whole.windows(*rows(step), count=3) for step in (0, 4))
    resumed = imagined_by(writer).windows(*rows(4), count=3)
    assert torch.equal(resumed.tokens, later.tokens)
    assert torch.equal(resumed.opinion.full(), later.opinion.full())
    other = imagined_by(writer).windows(*rows(4, 1, 3), count=3)  # another process, or another micro-batch
    assert torch.equal(other.tokens, later.tokens[3:])
    fewer = imagined_by(writer).windows(*rows(4), count=1)
    assert torch.equal(fewer.tokens, later.tokens.view(ROWS, 3, T)[:, 0])
    assert not torch.equal(first.tokens, later.tokens)
    assert not torch.equal(imagined_by(writer, seed=1).windows(*rows(0), count=3).tokens, first.tokens)


def test_windows_are_written_ahead_and_forgotten():
    """Catches a writer that is asked anew at every step, and text of past steps that fills the memory."""
    writer = TableWriter(table())
    whole = imagined_by(writer)
    for step in range(STEPS):
        whole.windows(*rows(step), count=2)
    assert writer.asked == T + 1
    short = imagined_by(writer)
    short.at_once = 2 * ROWS * 2  # two steps
    for step in range(STEPS):
        short.windows(*rows(step), count=2)
        assert len(short._ready) <= 2


@pytest.mark.parametrize("judged_by", ["critic", "consensus"])
def test_loss_is_the_mean_over_all_decisions(judged_by):
    """Catches imagined windows judged by a reality that was not there, weighed as one window, or read as gold."""
    writer, batch = TableWriter(table()), step_batch()
    student, reference = tiny_gpt(), tiny_gpt()
    loss, metrics = avatarl(student, writer, imagined_judge=judged_by)(batch, 0, {}, True)
    loss.backward()
    m = method()
    alone = method(reality_weight=0.0, critic_weight=1.0) if judged_by == "critic" else m
    tokens, written, opinion = imagined_by(writer).windows(batch.first, batch.indices, count=2)
    sums = []
    for text, gold, said, s in (
        (batch.tokens, batch.targets, writer.opinion(batch.tokens, None), m),
        (tokens, written, opinion, alone),
    ):
        logits = reference(text).flatten(0, 1)
        actions, _, r = judge(logits, said, gold.flatten(), s)
        mean = reinforce_loss(logits, actions, r, entropy_coef=m.entropy_coef, policy_weighting="reinforce")
        sums.append(len(logits) * mean)
    wanted = sum(sums) / (3 * batch.tokens.numel())
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    for (name, a), b in zip(student.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7, msg=name)
    assert metrics["imagination/critic_kl"] > 0


def test_micro_batches_have_their_rows_windows():
    """Catches a micro-batch that learns from the windows of the batch's first rows."""
    writer, batch = TableWriter(table()), step_batch(2)
    objective = avatarl(tiny_gpt(), writer)
    whole, _ = objective(batch, 2, {}, False)
    parts = []
    for i in range(ROWS):
        part = batch._replace(
            **{n: getattr(batch, n)[i : i + 1] for n in ("tokens", "targets", "positions", "indices")}
        )
        parts.append(objective(part._replace(first=batch.first + i), 2, {}, False)[0])
    torch.testing.assert_close(whole, torch.stack(parts).mean())


def test_no_windows_no_difference():
    """Catches a schedule that does not reach the step: at its end the objective is the one without imagination."""
    writer, batch = TableWriter(table()), step_batch(STEPS - 1)
    falling = avatarl(tiny_gpt(), writer, imagined_windows_schedule="0:2,1:0")
    plain = AvataRL(tiny_gpt(), method(), steps=STEPS, seed=0, critic=writer)
    assert torch.equal(falling(batch, STEPS - 1, {}, False)[0], plain(batch, STEPS - 1, {}, False)[0])
    assert not torch.equal(falling(batch, 0, {}, False)[0], plain(batch, 0, {}, False)[0])
    assert falling.flops_per_token() == pytest.approx(plain.flops_per_token() * (1 + 1.0), rel=0.1)


def test_a_large_vocabulary_is_refused():
    """Catches a run that fills the memory with the odds of every token at every imagined position."""
    writer: Any = TableWriter(table())
    writer.vocab_size = imagination.MAX_VOCABULARY + 1
    with pytest.raises(ConfigError, match=r"imagined-windows.*4,097"):
        imagined_by(writer)


@pytest.mark.parametrize(
    ("critic", "changes"),
    [
        ({"kind": "model"}, {}),
        ({"kind": "self"}, {}),
        ({"kind": "ngram", "cache": True}, {}),
        ({"kind": "ngram"}, {"context": "student"}),
        ({"kind": "ngram"}, {"advantage": "group", "policy_weighting": "expected"}),
        ({"kind": "ngram"}, {"imagined_windows": -1}),
        ({"kind": "ngram"}, {"imagined_windows_schedule": "0:3,1:0"}),
    ],
)
def test_what_cannot_be_imagined_is_refused(critic, changes):
    """Catches a run that fails at its first step, or ignores what it was asked for."""
    with pytest.raises(ConfigError, match="imagined-windows"):
        override(Config(), critic=critic, method={"imagined_windows": 2, **changes})
