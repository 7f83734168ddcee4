"""The pages say what the code does now."""

import importlib
import re
from pathlib import Path

import pytest

from config import PRESETS
from reporting.metrics import as_markdown

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_metrics_page_is_the_one_that_the_code_writes():
    """Catches a metric whose meaning changed in the code and not in docs/metrics.md."""
    assert (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") == as_markdown()


def test_the_readme_names_every_preset():
    """Catches a preset that no reader finds, and a table that still lists one that is gone."""
    table = README.partition("## Presets")[2].partition("\n## ")[0]
    named = re.findall(r"`([a-z]+(?:-[a-z0-9]+)+|-\d+m)`", table)
    family, found = "", set()
    for name in named:
        family = family if name.startswith("-") else name.rpartition("-")[0]
        found.add(family + name if name.startswith("-") else name)
    assert found == set(PRESETS)


PAGES = [
    "README.md",
    "docs/method.md",
    "docs/results.md",
    "docs/surgery.md",
    "docs/scaling.md",
    "docs/bootstrapping.md",
    "results/README.md",
    "results/overview/table.md",
]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_is_there(page):
    """Catches a page that sends its reader to a file which was moved or renamed."""
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.(?:py|sh|md|toml))`", text))
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link}
    assert named | links
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    assert [link for link in sorted(links) if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_no_page_has_a_place_left_to_fill():
    """Catches a figure that was to be filled in after measuring."""
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert not re.search(r"@[A-Z]+@", page.read_text(encoding="utf-8")), page


PARTS = {"__init__", "arms", "bootstrap_facts", "study", "tables", "figures", "rivals"}
"""What studies are made of; every other file of experiments/ is one."""


def studies() -> list[str]:
    return sorted({p.stem for p in (ROOT / "experiments").glob("*.py")} - PARTS)


@pytest.mark.parametrize("study", studies())
def test_every_study_explains_itself(study, capsys):
    """Catches a study whose command line no longer parses, and one whose first lines name no command."""
    module = importlib.import_module(f"experiments.{study}")
    assert f"python -m experiments.{study}" in (module.__doc__ or "")
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0
    assert "--out" in capsys.readouterr().out
