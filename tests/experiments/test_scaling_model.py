"""The predicted tables say what the model computes, and the page says what the tables say."""

from pathlib import Path

import pytest

from experiments import scaling_model
from experiments.scaling_model import Settings, fixed_batch, grown_batch, sections
from forecasting.cluster import H100, step
from tests.tiny_train import ROOT, here

WORK = scaling_model.count(scaling_model.preset("avatarl-250m"))


def test_the_page_shows_what_the_command_computes():
    """Catches a page whose figures are those of an older model, or of constants that have changed."""
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    tables = sections(Settings())
    assert "\n".join(tables[""]) in page and "\n".join(tables["avatarl-250m"]) in page


def test_every_count_has_its_row_in_both_tables():
    """Catches a count that one of the two ways leaves out, and a batch that does not divide."""
    settings = Settings(gpus=(1, 8, 1024))
    for table in (fixed_batch(WORK, settings, H100), grown_batch(WORK, settings, H100)):
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:]]
        assert [row[0] for row in rows] == ["1", "8", "1,024"] and rows[0][
            -1 if table[0].count("|") == 6 else 6
        ] == "100%"
        for row in rows:
            assert int(row[1].replace(",", "")) % int(row[0].replace(",", "")) == 0


def test_dollars_are_hours_times_gpus_times_price():
    """Catches a price of one GPU for all of them."""
    row = fixed_batch(WORK, Settings(gpus=(8,), price=100.0), H100)[2]
    expected = 4000 * step(WORK, 8, overlap=0).seconds / 3600 * 8 * 100
    assert float(row.split("$")[1].strip(" |").replace(",", "")) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    "words, named",
    [(["--gpus", "12"], "gpus = 12"), (["--utilisation", "2"], "utilisation = 2.0"), (["--price", "0"], "price = 0.0")],
)
def test_what_cannot_be_is_refused(words, named):
    """Catches one node and a half, and a machine above its peak."""
    outcome = here(*words, main=scaling_model.main)
    assert outcome.code == 2 and named in outcome.errors[0]


def test_the_command_writes_its_table(tmp_path: Path):
    """Catches a table without its command or its assumptions, and a preset that was asked for and is missing."""
    outcome = here("--presets", "avatarl-30m", "--out", str(tmp_path / "new"), main=scaling_model.main)
    page = (tmp_path / "new" / "table.md").read_text(encoding="utf-8")
    assert outcome.code == 0 and page in outcome.out + "\n"
    for part in ("never measured", "experiments.scaling_model --presets avatarl-30m", "450 GB/s", "## avatarl-30m"):
        assert part in page
