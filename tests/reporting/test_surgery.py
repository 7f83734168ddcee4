"""The verdict on surgery: what it says follows from the numbers, and a page shows the arms side by side."""

import json
from pathlib import Path
from typing import Any

import pytest

from config import ConfigError
from experiments.surgery import Settings, page
from report import write_report
from reporting.surgery import compared, is_hybrid, parts_of, read_result, table, verdict

MADE = {
    "command": "python -m experiments.surgery",
    "processor": "a CPU",
    "cores": 2,
    "versions": {"torch": "2.13.0"},
    "git": {"commit": "abc"},
    "started": "2026-01-01",
}


def arm(ce: float, **more: Any) -> dict[str, Any]:
    """One arm's end."""
    same = {"steps": 100, "tokens": 1e4, "seconds": 5.0, "val_accuracy": 0.3, "val_ece": 0.02, "ce_jumps": None}
    return same | {"val_ce": ce, "trials": 9, "accepted": 2, "accepted_gain": 0.01, "unseen_gain": 0.004} | more


def result(seed: int, gain: float, noise: float = 0.001, random: float = 0.0) -> dict[str, Any]:
    """A finished hybrid run in which the surgeon gained so much."""
    one = {"steps": 50, "seconds": 3.0, "stagnated": True, "val_ce": 2.1, "val_accuracy": 0.28}
    arms = {
        "surgeon": arm(2.0 - gain, gain=gain, gain_noise=noise),
        "none": arm(2.0, trials=0, accepted=0),
        "random": arm(2.0 - random, gain=random, gain_noise=noise),
    }
    return {"seed": seed, "surgeon": "sac", "phase_1": one, "phase_2": None, "arms": arms}


@pytest.mark.parametrize("gain, word", [(0.05, "Improvement"), (-0.05, "Harm"), (0.0015, "None")])
def test_one_seed_is_judged_by_the_texts_noise(gain, word):
    """Catches a sign the wrong way round, noise that is no matter, and one seed sold as a finding."""
    said = verdict([result(1, gain)])
    assert said.startswith(word) and f"{gain:+.4f} ± 0.0020" in said and "One seed" in said


def test_several_seeds_are_judged_by_their_spread():
    """Catches intervals from the windows' noise, unpaired ones, and the normal's 1.96 for three seeds."""
    spread = [result(i, g) for i, g in enumerate((0.02, 0.05, 0.03), 1)]
    found = compared(spread, "none")
    assert found is not None
    assert found.gain == pytest.approx(0.1 / 3) and found.noise == pytest.approx(0.0152753 / 3**0.5, rel=1e-4)
    assert found.half == pytest.approx(4.30 * found.noise)
    assert verdict(spread).startswith("None"), "0.033 ± 0.038"
    steady = [result(i, g) for i, g in enumerate((0.030, 0.031, 0.032), 1)]
    assert verdict(steady).startswith("Improvement") and "3 seeds, paired" in verdict(steady)
    assert verdict([result(i, -g) for i, g in enumerate((0.030, 0.031, 0.032), 1)]).startswith("Harm")


def test_chance_that_does_as_well_is_said():
    """Catches praise for a surgeon whose gain random edits have too."""
    runs = [result(i, 0.030 + 0.001 * i, random=0.030 + 0.0012 * i) for i in (1, 2, 3)]
    assert verdict(runs).startswith("Improvement") and "Against random edits: -0.0004" in verdict(runs)
    assert "(none)" in verdict(runs) and "Chance under the same rule does as well" in verdict(runs)
    assert "Chance" not in verdict([result(i, 0.030 + 0.001 * i) for i in (1, 2, 3)])


def test_a_plateau_that_was_none_is_said():
    """Catches an answer to the question of the plateau from runs that were still learning."""
    runs = [result(i, 0.03 + 0.001 * i) for i in (1, 2, 3)]
    assert "stagnated" not in verdict(runs)
    runs[1]["phase_1"]["stagnated"] = False
    assert "Phase 1 had not stagnated with 1 of 3 seeds" in verdict(runs)
    assert "Phase 1 had not stagnated: " in verdict(runs[1:2])


def test_time_better_spent_is_said():
    """Catches an improvement at equal tokens that hides what the same time would have brought."""
    one = result(1, 0.03)
    one["arms"]["none-same-time"] = arm(1.9, gain=0.1, gain_noise=0.001)
    assert verdict([one]).startswith("Improvement") and "Further steps are the better use" in verdict([one])


def test_without_its_control_there_is_no_verdict():
    """Catches a claim from the surgeon's arm alone."""
    alone = result(1, 0.05)
    del alone["arms"]["none"]
    assert verdict([alone]).startswith("No verdict")


def test_the_table_has_an_arm_a_row():
    """Catches edits credited to nobody, and seeds that are not averaged."""
    rows = table([result(1, 0.02), result(2, 0.04)])
    assert len(rows) == 5 and all(row.count("|") == rows[0].count("|") for row in rows)
    assert "| surgeon | 100 |" in rows[2] and "+0.0300 ± 0.0141" in rows[2] and "4 of 18" in rows[2]
    assert rows[3].startswith("| nobody, same tokens") and rows[3].endswith("|  |")


def hybrid(folder: Path, seed: int, gain: float) -> Path:
    """A folder as hybrid.py leaves it, with little in its parts."""
    for part in ("grpo", "surgeon", "none", "random"):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps({"hybrid": {}, "arm": part, "until": 1}))
        (folder / part / "metrics.jsonl").write_text('{"step": 1, "val/ce": 2.0}\n')
    (folder / "config.json").write_text(json.dumps({"hybrid": {}}))
    (folder / "result.json").write_text(json.dumps(result(seed, gain)))
    return folder


def test_a_page_compares_the_arms_of_several_seeds(tmp_path):
    """Catches a hybrid run that report.py refuses, a verdict per seed instead of over them, and a part left out."""
    folders = [hybrid(tmp_path / f"seed{i}", i, 0.03 + 0.001 * i) for i in (1, 2, 3)]
    assert all(map(is_hybrid, folders)) and not is_hybrid(folders[0] / "none")
    assert [p.name for p in parts_of(folders[0])] == ["surgeon", "none", "random"]
    text = write_report(folders, tmp_path / "page.html").read_text()
    assert "Improvement: surgery lowers" in text and "3 seeds, paired" in text and "seed2/random" in text
    (folders[0] / "result.json").write_text("torn")
    assert "2 seeds, paired" in write_report(folders, tmp_path / "page.html").read_text()


def test_the_studys_page():
    """Catches a table of seeds that lost one, or does not say whether phase 1 stagnated."""
    text = page([result(i, 0.02) for i in (1, 2, 3)], MADE)
    assert text.count("| yes | 2.1000, 28.0 % |") == 3 and "| 3 | step 50 |" in text


def test_other_settings_are_other_runs():
    """Catches a study that is continued with runs of other settings."""
    folders = {Settings(also=also).folder(seed) for also in ((), ("surgery.rank=4",)) for seed in (1, 2)}
    assert len(folders) == 4
    assert Settings(also=("surgery.layers=0 1",)).words(1)[-3:] == ["--surgery.layers", "0", "1"]


def test_the_verdicts_gain_is_the_tables():
    """Catches two numbers for one gain on one page: over whole windows in the table, over all tokens in the verdict."""
    one = result(1, 0.03)
    one["arms"]["surgeon"]["val_ce"] += 0.0002  # a last, shorter window
    assert "+0.0300 ± 0.0020" in verdict([one]) and "+0.0300 ± 0.0010" in table([one])[2]
    del one["arms"]["surgeon"]["gain"]
    assert "+0.0298" in verdict([one])


def test_a_result_that_lacks_numbers_is_no_result(tmp_path):
    """Catches a KeyError over a damaged result.json."""
    (tmp_path / "result.json").write_text('{"arms": {"surgeon": {"val_ce": 1}}, "phase_1": {}}')
    assert read_result(tmp_path) is None
    (tmp_path / "result.json").write_text(json.dumps(result(1, 0.01)))
    assert read_result(tmp_path) == result(1, 0.01)


def test_a_hybrid_run_that_has_logged_nothing_is_named(tmp_path):
    """Catches "no run folder given" where one was given."""
    (tmp_path / "config.json").write_text('{"hybrid": {}}')
    with pytest.raises(ConfigError, match="nothing is logged there yet"):
        write_report([tmp_path], tmp_path / "report.html")
