"""Numbers and durations as a person reads them."""

import pytest

from training.plan import duration, human, two_digits


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (12345, "12.3 k"), (1.065e7, "10.7 M"), (2e9, "2 G"), (3.2e12, "3.2 T"), (5e17, "500 P")],
)
def test_numbers_a_person_reads(number, text):
    """Catches a prefix that is off by a thousand."""
    assert human(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12 ms"),
        (0.347, "350 ms"),
        (4, "4 s"),
        (95, "95 s"),
        (132, "2.2 min"),
        (3599, "60 min"),
        (9000, "2.5 h"),
        (172_800, "2 days"),
        (86400 * 500, "500 days"),
        (86400 * 365.25 * 2.04, "2 years"),
    ],
)
def test_durations_a_person_reads(seconds, text):
    """Catches minutes reported as seconds, and more digits than an estimate has."""
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0.0123, "0.012"), (9.96, "10"), (234.5, "230"), (15_432, "15,000"), (7, "7")]
)
def test_estimates_have_two_digits(number, text):
    """Catches a forecast that pretends to know the third digit, or writes 1.5e+04."""
    assert two_digits(number) == text
