"""The GPU's parts, on whatever is here."""

import pytest

from benchmarks import gpu
from benchmarks.gpu import StepClock
from tests.benchmarks.conditions import TINY, conditions


@pytest.mark.parametrize(
    ("body", "failed"),
    [
        ("def test_a(): pass", ""),
        ("def test_a(): assert 0", "pytest ended with 1"),
        ("", "no test is marked gpu"),
    ],
)
def test_the_tests_part_knows_how_they_ended(body, failed, tmp_path):
    """Catches a run without tests, or with failures, that counts as passed."""
    path = tmp_path / "test_it.py"
    path.write_text(body)
    (table,) = gpu.tests(conditions(tmp_path, seconds=60.0), (str(path), "--rootdir", str(tmp_path)))
    assert table.failed == failed
    assert len(table.notes) >= 1


def test_tests_that_do_not_end_are_stopped(tmp_path):
    """Catches a hanging test that takes the time of everything after it."""
    (table,) = gpu.tests(conditions(tmp_path, seconds=0.01))
    assert "not over after" in table.failed


def test_large_steps_are_compared_with_the_strongest_baseline(quick, tmp_path):
    """Catches a missing arm, an arm that fails, or a critic whose FLOPs are forgotten."""
    (table,) = gpu.large(conditions(tmp_path), {"tiny": TINY}, TINY, 90, compile="off")
    assert not any(row.failed for row in table.rows) and [len(r.seconds) for r in table.rows] == [3] * 4
    plain, entropy, both, ours = table.rows
    assert plain.name == gpu.COMPILED and ours.baselines == [plain.name, both.name]
    assert plain.flops == entropy.flops and both.flops == ours.flops == pytest.approx(4 / 3 * plain.flops)


def char_settings(c, corpus):
    """A run of twelve steps, a line every four."""
    return TINY.config(
        c,
        data={"corpus": str(corpus)},
        train={"objective": "avatarl", "steps": 12, "checkpoint_every": 0},
        critic={"kind": "ngram", "ngram_context": 2},
        method={"top_k": 4},
        optim={"warmup_steps": 2},
        eval={"every": 0, "sample_tokens": 0, "ladder": 0},
        log={"every": 4},
    )


def test_the_whole_run_is_timed_after_its_first_line(quick, corpus, tmp_path, monkeypatch, place):
    """Catches compilation or evaluations in the seconds, and a loss that is not that of the last step."""
    c = conditions(tmp_path, seconds=60.0)
    (table,) = gpu.char(c, char_settings(c, corpus))
    times = table.facts["times"]
    assert not table.failed and list(times) == [4, 8, 12]
    assert table.facts["seconds"] == pytest.approx((times[12] - times[4]) / 8 * 12)
    assert 0 < table.facts["val_ce"] < 5


def test_a_run_that_takes_too_long_is_cut(quick, corpus, tmp_path, place):
    """Catches a part that eats the time of the others, and a loss reported for a run that never ended."""
    c = conditions(tmp_path, seconds=0.0)
    (table,) = gpu.char(c, char_settings(c, corpus))
    assert table.failed.startswith("stopped at step 4") and table.facts["val_ce"] is None


def test_the_preset_keeps_its_length_and_model(tmp_path):
    """Catches a benchmark of another run than the preset's: only what is not training may be left out."""
    ours, theirs = gpu.char_config(conditions(tmp_path)), gpu.preset("avatarl-char-gpu")
    assert (ours.model, ours.method, ours.optim, ours.critic) == (
        theirs.model,
        theirs.method,
        theirs.optim,
        theirs.critic,
    )
    assert (ours.train.steps, ours.train.batch_size) == (theirs.train.steps, theirs.train.batch_size) == (5000, 64)
    assert issubclass(StepClock, gpu.Recorder)
