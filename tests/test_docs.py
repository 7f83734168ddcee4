"""The pages say what the code does now."""

import re
import subprocess
from pathlib import Path

import pytest

import train
from config import PRESETS, differences
from experiments import ablation, arms, default_run, kill_and_resume, precision, protocol, threads
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


@pytest.mark.parametrize("page", ["README.md", "docs/method.md"])
def test_every_file_that_a_page_names_is_there(page):
    """Catches a page that sends its reader to a file which was moved or renamed."""
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.(?:py|sh|md|toml))`", text))
    named |= {link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link}
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_no_page_has_a_place_left_to_fill():
    """Catches a figure that was to be filled in after measuring."""
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert not re.search(r"@[A-Z]+@", page.read_text(encoding="utf-8")), page


@pytest.mark.parametrize("study", [ablation, default_run, kill_and_resume, precision, protocol, threads])
def test_every_study_explains_itself(study, capsys):
    """Catches a study whose command line no longer parses."""
    with pytest.raises(SystemExit) as end:
        study.main(["--help"])
    assert end.value.code == 0
    assert "seed" in capsys.readouterr().out


def test_a_study_reads_back_what_its_arm_reached(tmp_path):
    """Catches a table made from the first evaluation instead of the last."""
    lines = ['{"step": 0, "val/ce": 4.2}', '{"step": 5, "val/ce": 2.0}', '{"step": 6, "train/loss": 1.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert arms.last_evaluation(tmp_path) == {"step": 5, "val/ce": 2.0}


def test_the_comparison_treats_both_methods_alike():
    """Catches an arm that gets other rates, seeds or lengths than its rival: the gap would not be the method's."""
    ours = protocol.arm("avatarl", "muon", 0.5, 2, 2000)
    theirs = protocol.arm("cross-entropy", "muon", 0.5, 2, 2000)
    assert ours.flags == theirs.flags and ours.preset != theirs.preset
    shared = [{g: f for g, f in PRESETS[a.preset][2].items() if g in ("model", "optim")} for a in (ours, theirs)]
    assert shared[0] == shared[1]
    assert ours.seed == 2


def test_the_verdict_is_said_seed_by_seed():
    """Catches a verdict that compares means of different seeds, or calls a higher loss better."""
    rows = [
        {"optimizer": "muon", "method": "avatarl", "seeds": [{"val/ce": 1.5, "val/ece": 0.01}] * 2},
        {"optimizer": "muon", "method": "cross-entropy", "seeds": [{"val/ce": 1.6, "val/ece": 0.02}] * 2},
    ]
    (said,) = protocol.verdicts(rows)
    assert "-0.1000 ± 0.0000" in said and "lower in 2 of 2 seeds" in said and "0.50 times" in said


def test_an_arm_that_was_cut_off_starts_again_under_its_own_name(tmp_path, monkeypatch):
    """Catches a study that reads the step-0 loss of a run that was killed before its first checkpoint."""
    place = tmp_path / "arm"
    place.mkdir()
    (place / "metrics.jsonl").write_text('{"step": 0, "val/ce": 4.2}\n')

    def train(words, **_):
        assert not place.exists() and words[words.index("--run.name") + 1] == "arm"
        place.mkdir()
        (place / "metrics.jsonl").write_text('{"step": 9, "val/ce": 1.5}\n')
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(arms.subprocess, "run", train)
    assert arms.run_arm(arms.Arm("arm", "protocol-avatarl"), tmp_path, 1)["val/ce"] == 1.5


def test_every_variant_of_the_ablation_is_a_run_that_differs():
    """Catches a variant whose flags no longer parse, or that changes nothing."""
    configs = {}
    for variant, arm in ablation.arms(ablation.Settings(seeds=1)):
        configs[variant] = train.read_command([arm.preset, *arm.flags])[1].config
    assert len(configs) == len(ablation.VARIANTS)
    assert all(differences(configs["default"], c) for variant, c in configs.items() if variant != "default")


@pytest.mark.parametrize(
    ("losses", "next_scale"),
    [
        ({0.5: 1.60, 1.0: 1.61, 2.0: 1.65}, 0.25),
        ({0.5: 1.76, 1.0: 1.70, 2.0: 1.69}, 4.0),
        ({0.5: 1.58, 1.0: 1.57, 2.0: 1.59}, None),
        ({8.0: 1.3, 16.0: 1.2}, None),
    ],
)
def test_no_arm_is_left_at_the_end_of_its_grid(losses, next_scale):
    """Catches a rival whose best rate was never tried: beating it would show only that."""
    assert protocol.beyond({scale: {"val/ce": ce} for scale, ce in losses.items()}) == next_scale
