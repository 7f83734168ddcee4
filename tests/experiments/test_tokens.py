"""Where a loss crosses a target in tokens."""

import math

import pytest

from experiments.tokens import Crossing, Settings, crossing, crossings, entries, figure, verdict
from tests.experiments.builders import row

CURVE = [(1000.0, 1.8), (100.0, 2.0), (10000.0, 1.5)]


@pytest.mark.parametrize(
    ("target", "tokens", "kind"),
    [
        (1.9, math.sqrt(100 * 1000), "crossed"),
        (1.6, math.exp(math.log(1000) + 2 / 3 * math.log(10)), "crossed"),
        (1.8, 1000.0, "crossed"),
        (1.5, 10000.0, "crossed"),
        (2.0, 100.0, "at most"),
        (2.5, 100.0, "at most"),
        (1.49, 10000.0, "never"),
    ],
)
def test_the_crossing_is_interpolated_in_log_tokens(target, tokens, kind):
    """Catches a straight line in tokens, an end that counts as crossed, and a target that is never met but reported."""
    found = crossing(CURVE, target)
    assert found.kind == kind and found.tokens == pytest.approx(tokens)


def test_a_curve_that_rises_again_is_crossed_where_it_first_falls():
    """Catches the second crossing, which would flatter whoever overfits."""
    assert crossing([(1, 2.0), (10, 1.0), (100, 3.0), (1000, 1.0)], 1.5).tokens == pytest.approx(math.sqrt(10))


def test_every_seed_is_measured_against_its_own_baseline():
    """Catches seeds compared with the mean of the others, and shares of the wrong length."""
    base = row("theirs", [[2.0] * 9 + [1.5], [2.0] * 9 + [1.7]], baseline=True)  # 100 steps
    ours = [row("short", [[1.6], [1.8]]), row("long", [[2.0] * 9 + [1.4], [2.0] * 9 + [1.75]])]  # 10 and 100 steps
    first, second = crossings(base, ours)
    assert first.kind == "crossed" and first.tokens == pytest.approx(math.sqrt(0.1))
    assert second.kind == "never" and second.tokens == pytest.approx(1.0)
    said = " ".join(verdict([first, second]))
    assert "0.316, > 1.000" in said and "1 of 2 seeds" in said and "±" not in said
    assert "<svg" in figure(base, ours)


def test_a_seed_whose_cross_entropy_diverged_is_no_failure_of_avatarl():
    """Catches "not reached" where there was nothing to reach."""
    found = [Crossing(0.4, "crossed"), Crossing(math.nan, "diverged"), Crossing(0.6, "crossed")]
    said = verdict(found)
    assert said[0] == "Cross-entropy diverged in 1 seeds, which are left out."
    assert "0.400, 0.600." in said[1] and said[2].startswith("Mean ± standard deviation: 0.500")
    assert len(verdict([Crossing(math.nan, "diverged")])) == 1
    base = row("cross-entropy", [[2.0, math.nan]])
    assert crossings(base, [row("AvataRL", [[2.0, 1.0]])])[0].kind == "diverged"


def test_verdicts_say_when_a_number_is_a_bound():
    """Catches a mean over seeds of which some were there before the shortest run."""
    crossed, early = crossing(CURVE, 1.9), crossing(CURVE, 3.0)
    assert "±" in verdict([crossed, crossed])[-1]
    assert verdict([crossed, early])[-1].startswith("At most")


def test_every_fraction_has_a_schedule_of_its_own():
    """Catches a short run that is a long one cut off while its rate is high, or that warms up for most of its way."""
    base, *ours = entries(Settings(steps=600, fractions=(0.5, 1.0)))
    assert base.baseline and [e.settings["train.steps"] for e in ours] == [300, 600]
    assert [e.settings["optim.warmup-steps"] for e in ours] == [30, 60]
