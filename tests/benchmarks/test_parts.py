"""The parts beside the steps, at sizes that take moments."""

import xml.etree.ElementTree as ElementTree

import pytest
import torch
import torch.nn.functional as F

from benchmarks import generation, growth, kernels, loss, precision
from benchmarks.figure import figure
from benchmarks.growth import Grid
from benchmarks.loss import Inputs, Problem
from generation import generate
from tests.benchmarks.conditions import TINY, conditions

SMALL = Problem(n=24, vocab=70, width=16, k=4)


def test_losses_are_compared_from_logits_and_from_hidden_states(quick, tmp_path):
    """Catches an arm that fails unseen, or a table without its ratios."""
    tables = list(loss.tables(conditions(tmp_path), (70,), n=24, width=16, k=4))
    assert [t.facts["dtype"] for t in tables] == ["float32", "float32", "bfloat16"]
    for table in tables:
        assert not table.failed and [len(r.seconds) for r in table.rows] == [3, 3, 3]
        assert [len(r.baselines) for r in table.rows] == [0, 1, 1]


def test_the_losses_are_the_ones_they_are_called(tmp_path):
    """Catches a cross-entropy of other logits, and gradients that stay behind and count as inputs' memory."""
    inputs = Inputs(SMALL, conditions(tmp_path))
    logits = inputs.leaf_logits()
    assert inputs.cross_entropy().item() == pytest.approx(F.cross_entropy(logits, inputs.gold).item(), rel=1e-5)
    assert inputs.fused(0.01).item() == pytest.approx(inputs.definition(logits, 0.01).item(), rel=1e-5)
    assert inputs.of_logits(logits, 0.01).item() == pytest.approx(inputs.definition(logits, 0.01).item(), rel=1e-5)
    assert inputs.fused(0.0).item() != pytest.approx(inputs.fused(0.5).item(), rel=1e-3)
    loss.both_ways(lambda: inputs.fused(0.01), [inputs.hidden, inputs.unembedding])()
    assert inputs.hidden.grad is None and inputs.unembedding.grad is None


def test_a_fused_loss_that_is_not_its_definition_fails_the_part(quick, tmp_path, monkeypatch):
    """Catches a fast loss that is fast because it is wrong."""
    right = loss.fused_avatarl_loss
    monkeypatch.setattr(loss, "fused_avatarl_loss", lambda *a, **k: (1.01 * right(*a, **k)[0], {}))
    _, exact, _ = loss.tables(conditions(tmp_path), (70,), n=24, width=16, k=4)
    assert "not its definition" in exact.failed
    assert exact.facts["errors"]["gradient of hidden"] == pytest.approx(0.01, rel=0.01)


def test_both_ways_of_generating_write_the_same(quick, tmp_path, monkeypatch):
    """Catches a cache that is left off in both arms, or arms that draw different amounts."""
    seen = []

    def watched(*arguments, **settings):
        seen.append((settings["use_cache"], generate(*arguments, **settings)))
        return seen[-1][1]

    monkeypatch.setattr(generation, "generate", watched)
    (table,) = generation.tables(conditions(tmp_path), [TINY])
    assert table.work == 4 * 14 and {use for use, _ in seen} == {True, False}
    assert all(rows == seen[0][1] and [len(r) for r in rows] == [14] * 4 for _, rows in seen)


def test_growth_has_every_point_on_its_axis_and_in_its_picture(quick, corpus, tmp_path):
    """Catches a point under another's value, and a picture that no browser reads."""
    grid = Grid(SMALL, vocabularies=(5, 90), decisions=(8, 24), proposals=(1, 3), shapes=[TINY], corpus=str(corpus))
    with pytest.raises(ValueError, match="top-k"):
        list(growth.tables(conditions(tmp_path), Grid(SMALL, vocabularies=(3,))))  # k = 4
    tables = list(growth.tables(conditions(tmp_path), grid))
    found = [(t.facts["axis"], t.facts["value"]) for t in tables]
    assert found[:-1] == [
        *((growth.VOCABULARY, v) for v in (5, 90)),
        *((growth.DECISIONS, n) for n in (8, 24)),
        *((growth.PROPOSALS, k) for k in (1, 3)),
    ]
    assert found[-1][0] == growth.PARAMETERS and found[-1][1] > 12 * 16**2
    drawn = ElementTree.fromstring(figure(tables))
    words = " ".join("".join(e.itertext()) for e in drawn.iter() if e.tag.endswith("text"))
    assert all(axis in words for axis, _ in found) and words.count("×") >= len(tables)


def test_precisions_are_what_they_are_called(quick, corpus, tmp_path):
    """Catches a bfloat16 arm in float32, and a compiled arm that vanishes without a word."""
    (table,) = precision.tables(conditions(tmp_path), [TINY], compiled=False, corpus=str(corpus))
    assert [row.precision for row in table.rows] == ["float32, highest", "float32, medium", "bfloat16"]
    assert table.reference == "float32" and not any(row.failed for row in table.rows)


def test_without_a_compiler_nothing_is_compiled(quick, corpus, tmp_path, monkeypatch):
    """Catches an eager step that is reported as a compiled one."""
    monkeypatch.setattr("training.hardware.has_compiler", lambda: False)
    (table,) = precision.tables(conditions(tmp_path), [TINY], corpus=str(corpus))
    assert len(table.rows) == 3 and "compiler" in table.notes[0]


def test_kernels_compute_what_they_are_compared_with(quick, tmp_path):
    """Catches arms of different work: every call of a table gets the same inputs and gives every gradient."""
    attention, activations = kernels.tables(conditions(tmp_path), [TINY])
    assert [row.name for row in activations.rows] == ["gelu", "gelu-erf", "relu2"]
    assert not any(row.failed for row in activations.rows)
    assert len(attention.rows) == 5 and not any(row.failed for row in attention.rows)
    parts = kernels.leaves(1, (3, 5), seed=1)
    assert torch.equal(parts[torch.float32][0].bfloat16(), parts[torch.bfloat16][0])
