"""Keeping an edit: noise is no reason, an improvement is; what was kept can be taken back."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from checks import ConfigError
from surgery.commits import HeldOut, Trial, commit, compare, undo, window_losses
from surgery.operation import Operator
from surgery.theater import projections
from tests.surgery.patients import BLOCK, bits, patient, random_actions, unchanged
from tests.surgery.tasks import TEXT
from training.hardware import Hardware

CPU = Hardware(torch.device("cpu"), torch.float32, False, "sdpa", ())


def test_noise_is_accepted_at_the_tests_level():
    """Catches a standard error of the wrong size: of one sample instead of the mean, or of unpaired losses.

    4,000 trials of pure noise at z = 2: 2.3 % pass by chance, 91 ± 9.4; the bounds are over four deviations out.
    """
    draw = torch.Generator().manual_seed(0)
    before = 2 + torch.randn(4000, 64, generator=draw)  # windows differ far more than an edit moves them
    after = before + 0.01 * torch.randn(4000, 64, generator=draw)
    kept = sum(compare(b, a).accepted(2.0) for b, a in zip(before, after, strict=True))
    assert 50 <= kept <= 135


def test_a_planted_improvement_is_accepted():
    """Catches a gain with the wrong sign, and noise that is not paired: it would hide a hundredth of a nat."""
    draw = torch.Generator().manual_seed(1)
    before = 2 + torch.randn(64, generator=draw)
    after = before - 0.01 + 0.01 * torch.randn(64, generator=draw)
    assert compare(before, after).accepted(2.0) and not compare(after, before).accepted(2.0)
    assert compare(before, after).gain == pytest.approx(0.01, abs=0.005)
    assert not Trial(0.0, 0.0).accepted(0.0), "nothing gained, nothing kept"


def held_out(windows: int = 10) -> HeldOut:
    return HeldOut(TEXT, BLOCK, windows=windows, seed=1)


def test_windows_are_drawn_without_repetition_and_anew():
    """Catches a decision on the same few windows each time, one window twice, and targets that are not shifted."""
    one = held_out()
    tokens, targets = one.draw(3)
    assert tokens.shape == targets.shape == (10, BLOCK)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert len({tuple(row) for row in tokens.tolist()}) == 10
    assert torch.equal(tokens, one.draw(3)[0]) and not torch.equal(tokens, one.draw(4)[0])
    with pytest.raises(ConfigError, match=r"accept.windows = 50: the held-out text of 600 tokens has 49"):
        held_out(50)


def test_window_losses_are_cross_entropies():
    """Catches dropout in a decision, padding that counts, and a mean over the wrong positions."""
    model = patient(dropout=0.5).train()
    tokens = torch.from_numpy(TEXT[: 3 * BLOCK].astype(np.int64)).view(3, BLOCK)
    targets = tokens.roll(-1)
    targets[2, 5:] = -1
    found = window_losses(model, tokens, targets, CPU)
    assert model.training
    logits = model.eval()(tokens)
    expected = [F.cross_entropy(logits[i], targets[i], ignore_index=-1).item() for i in range(3)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_trial_measures_the_edit_and_leaves_no_trace():
    """Catches a trial that changes the model, or compares it with itself; and a zero edit that is worth something."""
    model = patient()
    before, operator = bits(model), Operator(model, [0, 2], 3)
    _, action = random_actions(2, 2, 3)
    trial = held_out().trial(model, operator, action, 0, CPU)
    assert unchanged(model, before) and trial.gain != 0 and trial.noise > 0
    assert held_out().trial(model, operator, torch.zeros(2, 3), 0, CPU) == Trial(0.0, 0.0)
    tokens, targets = held_out().draw(0)
    old = window_losses(model, tokens, targets, CPU)
    operator.apply(action)
    assert trial == compare(old, window_losses(model, tokens, targets, CPU))


def test_commit_and_undo_are_exact(tmp_path):
    """Catches an edit that differs from what was tried, a delta that rounds, and weights put into another layer."""
    model, tried = patient(), patient()
    before, operator = bits(model), Operator(model, [0, 2], 3)
    _, action = random_actions(2, 2, 3)
    places = [p.weight.data_ptr() for p in projections(model, [0, 2])]
    commit(model, operator, action, tmp_path / "edits" / "one.safetensors")
    Operator(tried, [0, 2], 3).apply(action)
    assert unchanged(model, bits(tried)) and not unchanged(model, before)
    assert places == [p.weight.data_ptr() for p in projections(model, [0, 2])], "optimisers hold these"
    assert undo(model, tmp_path / "edits" / "one.safetensors") is True
    assert unchanged(model, before)


def test_undo_after_learning_takes_out_the_edit_alone(tmp_path):
    """Catches an undo that throws away what was learned since, or claims to be exact."""
    model, control = patient(), patient()
    _, action = random_actions(2, 2, 3)
    commit(model, Operator(model, [0, 2], 3), action, tmp_path / "one.safetensors")
    with torch.no_grad():
        for one in (model, control):
            for p in projections(one, [0, 2]):
                p.weight += 0.01
    assert undo(model, tmp_path / "one.safetensors") is False
    for mine, other in zip(projections(model, [0, 2]), projections(control, [0, 2]), strict=True):
        assert torch.allclose(mine.weight, other.weight, atol=1e-6)


def test_undo_refuses_what_is_no_edit_of_this_model(tmp_path):
    """Catches a half-undone model, and errors from the depths of safetensors."""
    model = patient()
    commit(model, Operator(model, [2], 3), random_actions(2, 1, 3)[1], tmp_path / "one.safetensors")
    with pytest.raises(ConfigError, match="2 blocks"):
        undo(patient(n_layer=2), tmp_path / "one.safetensors")
    with pytest.raises(ConfigError, match="no edit can be read"):
        undo(model, tmp_path / "none.safetensors")
