"""Schedules: straight lines between knots, whole k, one row a step."""

import numpy as np
import pytest
import torch

from avatarl.schedules import Schedules, tabulate
from config import MethodConfig


def test_lines_between_knots():
    """Catches a staircase, a progress that never reaches 1, and a schedule that leaks into another field."""
    table = tabulate(MethodConfig(critic_weight_schedule="0:0.8,1:0.1"), 8)
    assert table["critic_weight"] == pytest.approx(np.linspace(0.8, 0.1, 8))
    assert table["reality_weight"] == pytest.approx([0.7] * 8)
    assert set(table) == set(MethodConfig.SCHEDULED)


def test_flat_beyond_the_outer_knots():
    """Catches extrapolation: before its first and after its last knot a weight stays."""
    found = tabulate(MethodConfig(epsilon_schedule="0.25:0.2,0.5:0.4,0.75:0.1"), 9)["epsilon"]
    assert found == pytest.approx([0.2, 0.2, 0.2, 0.3, 0.4, 0.25, 0.1, 0.1, 0.1])


@pytest.mark.parametrize(("steps", "wanted"), [(1, [0.8]), (2, [0.8, 0.1]), (3, [0.8, 0.45, 0.1])])
def test_short_runs(steps, wanted):
    """Catches a division by steps − 1 = 0, and a last step short of its value."""
    table = tabulate(MethodConfig(critic_weight_schedule="0:0.8,1:0.1"), steps)
    assert table["critic_weight"] == pytest.approx(wanted)


def test_k_is_whole():
    """Catches a fractional k: 2.6 proposals are 3."""
    found = tabulate(MethodConfig(top_k=6, top_k_schedule="0:2,1:6"), 6)["top_k"]
    assert found.tolist() == [2, 3, 4, 4, 5, 6]


def test_rows_on_the_device():
    """Catches values that come as numbers, the wrong row, or an index error after the last step."""
    schedules = Schedules(MethodConfig(critic_weight_schedule="0:0.8,1:0.1"), 8, "cpu")
    for step, wanted in [(0, 0.8), (7, 0.1), (8, 0.1), (1000, 0.1)]:
        now = schedules.at(step)
        assert all(isinstance(v, torch.Tensor) and v.shape == () for v in now.values())
        assert float(now["critic_weight"]) == pytest.approx(wanted)
        assert float(now["epsilon"]) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("changes", "k_varies", "ever_entropy"),
    [
        ({}, False, True),
        ({"entropy_coef": 0.0}, False, False),
        ({"entropy_coef": 0.0, "entropy_coef_schedule": "0:0,1:0.1"}, False, True),
        ({"entropy_coef": 0.1, "entropy_coef_schedule": "0:0"}, False, False),
        ({"top_k_schedule": "0:16"}, False, True),
        ({"top_k_schedule": "0:4"}, True, True),
        ({"top_k_schedule": "0:4,1:16"}, True, True),
    ],
)
def test_short_cuts(changes, k_varies, ever_entropy):
    """Catches a run whose scheduled k or β is skipped because its constant says otherwise."""
    schedules = Schedules(MethodConfig(**changes), 100, "cpu")
    assert (schedules.k_varies, schedules.ever_entropy) == (k_varies, ever_entropy)
