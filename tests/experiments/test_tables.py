"""The arithmetic of tables: means, spreads, paired differences, curves on the clock."""

import json
import math
import statistics
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from experiments.figures import chart, curves, dots, reliability
from experiments.study import StudySettings, stamp
from experiments.tables import (
    along,
    caught_up,
    ce_at,
    columns,
    difference,
    gaps,
    markdown,
    on_the_clock,
    page,
    spread,
    verdicts,
    with_other_threads,
)
from tests.experiments.builders import row

BASE = row("theirs", [[2.0, 1.6], [2.1, 1.9], [2.2, 1.7]], "muon", baseline=True)
OURS = row("ours", [[1.9, 1.5], [2.0, 1.7], [2.1, 1.75]], "muon")


def test_a_spread_is_of_the_sample():
    """Catches the population's standard deviation, which is too small by a fifth for three seeds."""
    assert spread([1.0, 2.0, 4.0]) == f"{7 / 3:.4f} ± {statistics.stdev([1, 2, 4]):.4f}"
    assert spread([1.5], 2) == "1.50"
    assert spread([1.0, math.nan, math.inf]) == "diverged in 2 of 3"


def test_differences_are_paired_by_seed():
    """Catches means of different seeds subtracted, and a higher loss called better."""
    assert gaps(OURS, BASE) == pytest.approx([-0.1, -0.2, 0.05])
    assert difference()[1](OURS, BASE) == f"-0.0833 ± {statistics.stdev([-0.1, -0.2, 0.05]):.4f}, lower in 2 of 3 seeds"
    assert difference()[1](BASE, BASE) == "baseline" and difference()[1](OURS, None) == "—"
    with pytest.raises(ValueError, match="same seeds"):
        gaps(OURS, row("fewer", [[1.0]]))


def test_a_row_meets_the_baseline_of_its_own_group():
    """Catches AdamW's rows compared with Muon's baseline."""
    other = row("theirs", [[9.0, 9.0]] * 3, "adamw", baseline=True)
    (said,) = verdicts([BASE, OURS, other])
    assert said.startswith("- muon: ours − theirs = -0.0833") and "1.00 times the calibration error" in said
    lines = markdown([other, BASE, OURS], columns(tuned=False))
    assert [line for line in lines if line.startswith("## ")] == ["## adamw", "## muon"]
    assert "lower in 2 of 3 seeds" in lines[-2]


def test_who_is_early_is_told_by_how_much():
    """Catches tokens counted as shares of the wrong run, and a seed passed over that is late or never there."""
    base = row("theirs", [[3.0, 2.0, 1.8, 1.7], [3.0, 2.0, 1.9, 1.8]], baseline=True)
    ours = row("ours", [[2.5, 1.7, 1.6, 1.5], [2.5, 1.9, 1.7, 1.9]])
    late = row("late", [[2.5, 1.6, 1.6, 1.5], [2.5, 1.9, 1.9, 1.9]])
    assert caught_up(ours, base) == [0.5, 0.75] and caught_up(late, base) == [0.5, math.inf]
    end = row("end", [[2.5, 1.9, 1.8, 1.7], [2.5, 1.9, 1.9, 1.8]])
    first, second, third = verdicts([base, ours, late, end])
    assert caught_up(end, base) == [1, 1] and "reached" not in third
    assert first.endswith("The baseline's end is reached by 50 and 75 % of its tokens.")
    assert "reached" not in second and second.endswith("calibration error.")


def test_the_best_and_the_end_are_told_apart():
    """Catches a study of overfitting that reads the last loss where it says the best."""
    risen = row("risen", [[1.0, 2.0]])
    base = row("base", [[1.5, 1.7]], baseline=True)
    assert gaps(risen, base, at="best") == [-0.5] and gaps(risen, base) == pytest.approx([0.3])


def test_a_diverged_run_has_no_mean():
    """Catches a mean over the seeds that survived."""
    (first, *rest) = OURS.outcomes
    lost = replace(OURS, outcomes=(replace(first, diverged=True), *rest))
    assert "diverged in 1 of 3" in "\n".join(markdown([BASE, lost], columns(tuned=False)))
    assert difference()[1](lost, BASE) == "—"


def test_runs_with_other_threads_are_named(tmp_path):
    """Catches a page that says how many threads every run had, where an earlier call gave some of them others."""
    for threads in (1, 2):
        (tmp_path / str(threads)).mkdir()
        (tmp_path / str(threads) / "config.json").write_text(json.dumps({"config": {"run": {"threads": threads}}}))
    (outcome,) = row("alone", [[1.0, 2.0]]).outcomes
    found = [replace(row(label, [[1.0]]), outcomes=(replace(outcome, folder=tmp_path / label),)) for label in "12"]
    rows = [replace(r, entry=replace(r.entry, label=f"of {n}")) for n, r in enumerate(found, 1)]
    assert (
        with_other_threads(StudySettings(threads=1), rows) == " Trained by an earlier call, with run.threads 2: of 2."
    )
    assert with_other_threads(StudySettings(threads=4), rows).count("earlier call") == 2
    assert with_other_threads(StudySettings(threads=2), rows[1:]) == ""


@pytest.mark.parametrize(("second", "ce"), [(1.0, 1.9), (1.5, 1.7), (2.0, 1.5), (2.5, None), (0.5, 1.9)])
def test_a_curve_is_read_between_its_evaluations(second, ce):
    """Catches a reading at the next evaluation, or one beyond the end of the run."""
    found = ce_at(OURS.outcomes[0], second)
    assert found == (None if ce is None else pytest.approx(ce))


def test_the_clock_table_says_what_it_is_not_worth():
    """Catches a comparison of unfinished schedules without its caveat."""
    slow = row("slow", [[1.9, 1.5]] * 3, "muon")
    for outcome in slow.outcomes:
        outcome.final["seconds"] = 3.0
    said = "\n".join(on_the_clock([BASE, slow]))
    assert "| muon | slow | 1.7000 ± 0.0000 |" in said and "not comparable before its end" in said


def test_curves_are_compared_step_by_step():
    """Catches a difference of another step or with the other sign."""
    assert along(OURS, BASE)[2:] == [
        "| 10 | 2.1000 | 2.0000 | -0.1000, -0.1000, -0.1000 |",
        "| 20 | 1.7333 | 1.6500 | -0.1000, -0.2000, +0.0500 |",
    ]


def test_a_page_names_its_command_machine_and_seeds():
    """Catches a table that nobody can repeat."""
    made = stamp("compare", ["--seeds", "3"])
    text = page("A title", made, StudySettings(), [BASE, OURS], after=["the end"])
    for what in (
        "# A title",
        "`python -m experiments.compare --seeds 3`",
        made["processor"],
        "Seeds 1 to 3",
        "the end",
    ):
        assert what in text


def test_a_page_names_the_text_that_was_validated_on():
    """Catches losses on one text told as another's."""
    made, also = stamp("words", []), ("data.corpus=a.txt",)
    assert "the whole held-out split of tinyshakespeare" in page("", made, StudySettings(), [BASE])
    assert "the whole held-out split of a.txt" in page("", made, StudySettings(also=also), [BASE])
    assert "all of b.txt" in page("", made, StudySettings(also=(*also, "data.val-corpus=b.txt")), [BASE])


def test_figures_hold_every_row_and_no_hole():
    """Catches a figure that breaks on one seed, one evaluation, equal losses or a diverged run."""
    lone, flat = row("lone", [[1.5]]), row("flat", [[1.5, 1.5, 1.5]])
    lost = row("lost <&>", [[2.0, math.nan]])
    for rows in ([BASE, OURS], [lone], [flat], [BASE, lost], [lost]):
        for svg in (curves(rows), dots(rows)):
            drawing = ElementTree.fromstring(svg)
            width, height = (float(side) for side in drawing.get("viewBox", "").split()[2:])
            for dot in drawing.iter("{http://www.w3.org/2000/svg}circle"):
                assert 0 < float(dot.get("cx", "nan")) < width and 0 < float(dot.get("cy", "nan")) < height
            assert "nan" not in svg and "inf" not in svg.replace("information", "")
    assert curves([BASE, OURS]).count("<circle") == 6 and dots([BASE, OURS]).count("<circle") == 6
    assert "lost &lt;&amp;&gt;" in dots([lost])
    assert chart([], "x").startswith("<svg")
    assert reliability([("one", [(0.2, 0.3), (0.8, 0.7)])], "confidence").count("<circle") == 2
