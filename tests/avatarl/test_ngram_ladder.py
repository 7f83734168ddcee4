"""The n-gram ladders against counting by hand and against DESIGN section 3's reference table."""

from fractions import Fraction

import numpy as np
import pytest

from avatarl.ngram_ladder import leave_one_out_ladder, ngram_ladder
from config import ConfigError
from tests.avatarl.ngram_oracle import oracle

TRAIN_CHARACTERS = 1_003_854  # nine tenths of tinyshakespeare, as in DESIGN's table


@pytest.mark.parametrize("seed", range(3))
def test_ladders_are_the_formula(seed):
    """Catches a wrong suffix, fallback, guess or offset in the ladders, which score on their own."""
    stream = np.random.default_rng(seed).integers(0, 4, 150)
    train, val = stream[:110].tolist(), stream[110:].tolist()
    ladder, own = ngram_ladder(stream[:110], stream[110:], 5), leave_one_out_ladder(stream[:110], 5)
    assert [r["context"] for r in ladder] == [r["context"] for r in own] == [1, 2, 3, 4, 5, 6]
    for n in (1, 2, 4, 6):
        ps = [oracle(train, 5, n, Fraction(3, 4), val[:t]) for t in range(10, len(val))]
        golds = val[10:]
        ce = -np.log([float(p[g]) for p, g in zip(ps, golds, strict=True)]).mean()
        accuracy = np.mean([p.index(max(p)) == g for p, g in zip(ps, golds, strict=True)])
        assert ladder[n - 1]["ce"] == pytest.approx(ce, abs=1e-9)
        assert ladder[n - 1]["accuracy"] == pytest.approx(accuracy, abs=1e-9)
        left_out = [oracle(train, 5, n, Fraction(3, 4), train[:t], t)[train[t]] for t in range(10, len(train))]
        assert own[n - 1]["ce"] == pytest.approx(-np.log([float(p) for p in left_out]).mean(), abs=1e-9)


def test_reference_table(shakespeare):
    """Catches any departure from DESIGN's n-gram: both of its rows, to half a unit of the last digit."""
    points = np.frombuffer(shakespeare.encode("utf-32-le"), np.uint32)
    characters = np.unique(points, return_inverse=True)[1]
    train, val = characters[:TRAIN_CHARACTERS], characters[TRAIN_CHARACTERS:]
    ladder = ngram_ladder(train, val, 65)
    assert [r["ce"] for r in ladder] == pytest.approx([2.4865, 2.0560, 1.7896, 1.6922, 1.7214, 1.7868], abs=5e-4)
    accuracy = [100 * r["accuracy"] for r in ladder]
    assert accuracy == pytest.approx([27.0, 38.1, 47.2, 52.7, 54.2, 54.8], abs=0.1)
    own = [r["ce"] for r in leave_one_out_ladder(train, 65)]
    assert own == pytest.approx([2.4537, 1.9202, 1.5727, 1.4502, 1.4547, 1.5058], abs=5e-4)


def test_bad_input_is_named():
    """Catches an error from deep inside numpy for a validation text of other tokens, or of too few."""
    with pytest.raises(ConfigError, match="0 to 9"):
        ngram_ladder(np.arange(5).repeat(9), np.arange(10).repeat(2), 5)
    with pytest.raises(ConfigError, match="at least 11"):
        ngram_ladder(np.arange(5).repeat(9), np.arange(5), 5)
