"""Ratios, quartiles, and what a table says."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.table import Row, Table, markdown, quartiles

TIMES = st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=40)


def two(a: list[float], b: list[float]) -> Table:
    """Arms a and b, b compared with a."""
    return Table("two", rows=[Row("a", seconds=a), Row("b", ["a"], seconds=b)])


def test_ratios_are_taken_round_by_round():
    """Catches a ratio of medians: a machine that slows down for some rounds would decide it."""
    table = two([1.0, 10.0, 4.0], [2.0, 20.0, 3.0])
    assert table.ratios("b", "a") == [2.0, 2.0, 0.75]
    assert quartiles(table.ratios("b", "a"))[1] == 2.0  # while the medians' ratio is 3 / 4
    assert "2.00 (1.375 to 2.00)" in markdown(table)


@given(TIMES)
def test_quartiles_are_those_of_numpy(values):
    """Catches exclusive quantiles, or low and high swapped."""
    assert quartiles(values) == pytest.approx(np.percentile(values, [25, 50, 75]))


def test_a_table_comes_back_from_json():
    """Catches a field that is not written, or comes back as another type."""
    table = two([1.0], [2.0])
    table.rows[0].memory, table.rows[1].failed, table.facts["k"] = 5, "no memory", 16
    assert Table.from_dict(json.loads(json.dumps(asdict(table)))) == table


def test_columns_that_say_nothing_are_left_out():
    """Catches empty columns, and a column lost where only one arm fills it."""
    table = two([1.0], [2.0])
    assert markdown(table).splitlines()[2] == "| arm | ms | time ratio |"
    table.rows[1].memory = 3_000_000
    table.rows[1].flops, table.rows[1].peak = 1e9, 1e9
    table.unit, table.work, table.reference = "tokens", 8, "a"
    shown = markdown(table)
    assert "tokens/s" in shown and "| 3.0 |" in shown and "| 50.0 % |" in shown
    assert "| b | 2,000 (2,000 to 2,000) | 4 | 0.50 | 2.00 (2.00 to 2.00) |" in shown


def test_what_an_arm_holds_counts_in_its_peak():
    """Catches a comparison of peak memory that forgets weights and critic where they are known."""
    table = two([1.0], [1.0])
    for row, held in zip(table.rows, (3_000_000, 9_000_000), strict=True):
        row.memory, row.held = 1_000_000, held
    assert [r.bytes for r in table.rows] == [4_000_000, 10_000_000]
    assert "| 10.0 | 2.50 |" in markdown(table)


def test_an_arm_without_timings_says_why():
    """Catches a failed arm that vanishes, or breaks the page that shows the others."""
    table = two([], [2.0])
    table.rows[0].failed, table.reference = "out of memory", "a"
    assert "failed: out of memory" in markdown(table)
    assert table.ratios("b", "a") == []


def test_a_row_with_several_baselines_names_them():
    """Catches two ratios in one cell that no reader can tell apart."""
    table = two([1.0], [2.0])
    table.rows.append(Row("c", ["a", "b"], seconds=[3.0]))
    assert "3.00 (3.00 to 3.00) of a; 1.500 (1.500 to 1.500) of b" in markdown(table)
