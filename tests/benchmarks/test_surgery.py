"""The surgery part at a size that takes moments: arms do the same work, figures are what they are called."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import surgery
from benchmarks.surgery import BATCH, CLONE, IN_PLACE, Case, Ward
from config import ModelConfig
from tests.benchmarks.conditions import conditions

CASE = Case(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16), 30, (1,), 3, 4, 5, 6)


def test_every_way_is_timed_and_compared(quick, tmp_path):
    """Catches an arm that fails unseen, and a ratio that is turned round."""
    shared, own, text = surgery.tables(conditions(tmp_path), CASE)
    bounded = [any("could be more than" in note for note in table.notes) for table in (shared, own, text)]
    assert bounded == [False, True, False] and own.row(BATCH).peak == 1e11
    for table in (shared, own, text):
        assert not table.failed and not any(row.failed for row in table.rows)
        assert table.row(BATCH).baselines == [row.name for row in table.rows[:-1]]
        table.row(BATCH).seconds, table.row(IN_PLACE).seconds = [1.0] * 3, [8.0] * 3
        table.notes.clear()
        assert f"one batch is 8.0 times as fast as: {IN_PLACE}" in surgery.described(table, CASE).notes
    assert shared.facts["rank"] == 3 and [r.name for r in text.rows] == [IN_PLACE, BATCH]


def test_flops_are_those_of_the_blocks(tmp_path):
    """Catches a bound from other work than is done: counted here by PyTorch's own counter, attention taken off."""
    ward, counts = Ward(CASE, conditions(tmp_path)), {}
    for shared in (True, False):
        tokens, _ = ward.contexts(shared)
        with FlopCounterMode(display=False) as counter:
            surgery.batched_logits(ward.model, ward.operator, ward.actions, tokens, last_only=True)
        counts[shared] = counter.get_flop_counts()["Global"]
    linear = {shared: found[torch.ops.aten.addmm] for shared, found in counts.items()}
    corrections = 2.0 * 16 * 3 * CASE.candidates * CASE.context  # shares times directions, added to the inputs
    assert linear == {shared: CASE.flops(shared, batch=True) + corrections for shared in linear}
    assert CASE.flops(True, batch=False) == CASE.flops(False, batch=True) > CASE.flops(True, batch=True)


def test_held_bytes_are_those_of_the_weights_concerned(tmp_path):
    """Catches a theatre that holds a clone, and singular vectors that are left out of what corrections hold."""
    ward = Ward(
        Case(ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=16), 300, (1,), 8, 4, 5, 6), conditions(tmp_path)
    )
    held = ward.held()
    if None in held.values():
        pytest.skip("this C library does not tell what it has handed out")
    assert held[CLONE] == pytest.approx(4 * ward.model.parameter_count(), rel=0.15)
    assert held[IN_PLACE] == pytest.approx(4 * 3 * 64 * 64, abs=4096)
    assert 4 * (8 * (64 + 192) + 4 * 8) < (held[BATCH] or 0) < 4 * 3 * 64 * 64


def test_a_batch_that_is_wrong_fails_the_part(quick, tmp_path, monkeypatch):
    """Catches one batch that is fast because it does something else."""
    right = surgery.batched_logits
    monkeypatch.setattr(surgery, "batched_logits", lambda m, o, a, *r, **k: right(m, o, a.flip(0), *r, **k))
    assert "not what operating one by one gives" in next(surgery.tables(conditions(tmp_path), CASE)).failed


def test_no_arm_makes_singular_vectors(tmp_path, monkeypatch):
    """Catches decompositions in the time of one arm and not of another."""
    ward = Ward(CASE, conditions(tmp_path))
    monkeypatch.setattr("surgery.operation.decompose", lambda *_: pytest.fail("decomposed"))
    monkeypatch.setattr(surgery, "measure", lambda title, arms, *_, **__: [arm.run() for arm in arms] and Stop.now())
    for make in (
        lambda: surgery.next_token(ward, conditions(tmp_path), True),
        lambda: surgery.text(ward, conditions(tmp_path)),
    ):
        with pytest.raises(Stop):
            make()


class Stop(Exception):
    """The arms have run."""

    @staticmethod
    def now() -> None:
        raise Stop


def test_candidates_and_model_are_left_as_they_were(tmp_path):
    """Catches a round that operates on what the one before left."""
    ward = Ward(CASE, conditions(tmp_path))
    before = {name: value.clone() for name, value in ward.model.state_dict().items()}
    seen: list[torch.Tensor] = []

    def evaluate(model, i):
        seen.append(model.blocks[1].attn.qkv.weight.detach().clone())
        return torch.zeros(1)

    for way in (ward.cloned, ward.in_place):
        way(evaluate)
    assert all(torch.equal(before[name], value) for name, value in ward.model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(seen[:4], seen[4:], strict=True))
    assert not torch.equal(seen[0], seen[1])
