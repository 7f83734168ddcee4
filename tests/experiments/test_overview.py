"""The page of all comparisons is made from what the studies kept, and from nothing else."""

import json
from pathlib import Path

import pytest

from config import ConfigError
from experiments import overview
from experiments.study import run_line
from tests.experiments.builders import row

ROOT = Path(__file__).resolve().parents[2]
COMPARISON = overview.Comparison("characters", "made-up", "AvataRL", "muon")


def kept(results: Path, *rows, role: str = "row") -> None:
    """Lines of results/made-up/runs.jsonl, as a study writes them."""
    folder = results / "made-up"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(run_line(one, outcome, role)) for one in rows for outcome in one.outcomes]
    with (folder / "runs.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(line + "\n" for line in lines))


def test_the_page_in_results_is_the_one_that_the_studies_make(tmp_path):
    """Catches a study that was run again, or a figure typed by hand, without the page being made anew."""
    assert overview.main(["--out", str(tmp_path)]) == 0
    for name in ("table.md", "figure.svg"):
        assert (ROOT / "results" / "overview" / name).read_text("utf-8") == (tmp_path / name).read_text("utf-8"), name


def test_a_line_has_means_differences_by_seed_and_ratios(tmp_path):
    """Catches the baseline subtracted the wrong way round, the wrong evaluation, and tuning's runs among the seeds."""
    mine, theirs = row("AvataRL", [[3.0, 1.5], [2.0, 1.7]], "muon"), row("cross-entropy", [[3.0, 1.6, 2.6]] * 2, "muon")
    kept(tmp_path, mine, theirs)
    kept(tmp_path, row("AvataRL", [[9.0]], "muon"), role="tuning")
    kept(tmp_path, row("AvataRL", [[7.0], [7.0]], "adamw"))
    cells = overview.line(COMPARISON, *overview.pair(COMPARISON, tmp_path)).split(" | ")
    assert cells[1:4] == ["2.6000 ± 0.0000", "1.6000 ± 0.1414", "-1.0000 ± 0.1414, lower in 2 of 2 seeds"]
    assert cells[4:7] == ["0.0200 of 0.0200: 1.00", "0.67", "0.67"]
    kept(tmp_path, row("cross-entropy, longer", [[1.0], [1.0]], "later"))
    longer = overview.Comparison("characters", "made-up", "AvataRL", "muon", rival=("later", "cross-entropy, longer"))
    assert overview.line(longer, *overview.pair(longer, tmp_path)).split(" | ")[3].startswith("+0.6000")
    best = overview.Comparison("characters", "made-up", "AvataRL", "muon", at="best", timed=False)
    cells = overview.line(best, *overview.pair(best, tmp_path)).split(" | ")
    assert cells[1] == "1.6000 ± 0.0000"
    assert cells[6] == "not compared"


def test_the_figure_puts_a_lower_loss_to_the_left_of_cross_entropys_line(tmp_path):
    """Catches a sign turned round between the table and the picture, and seeds that are not drawn."""
    kept(tmp_path, row("AvataRL", [[1.5], [1.4]], "muon"), row("cross-entropy", [[1.6], [1.6]], "muon"))
    drawn = overview.differences([(COMPARISON, *overview.pair(COMPARISON, tmp_path))])
    centres = [float(part.partition('"')[0]) for part in drawn.split('<circle cx="')[1:]]
    zero = float(drawn.partition(" 6V")[0].rpartition("M")[2])
    assert len(centres) == 2
    assert max(centres) < zero


def test_a_study_that_is_not_there_is_named(tmp_path):
    """Catches a traceback where someone has not run a study, or where its row has another name by now."""
    with pytest.raises(ConfigError, match=r"made-up.runs\.jsonl is not there.*results/README\.md"):
        overview.pair(COMPARISON, tmp_path)
    kept(tmp_path, row("cross-entropy", [[1.6]], "muon"))
    with pytest.raises(ConfigError, match="no row 'AvataRL'"):
        overview.pair(COMPARISON, tmp_path)
