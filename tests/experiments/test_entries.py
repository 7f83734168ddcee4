"""What the studies train: every entry of every one is a run that starts."""

import dataclasses
import os
from typing import Any

import pytest

import train
from checks import ConfigError
from config import MethodConfig, differences
from experiments import ablation, compare, imagined, precision, protocol, repeated, sizes, tokens, words
from experiments.arms import ROOT, built, flags
from experiments.rivals import PUBLISHED, tuning
from experiments.study import Entry, StudySettings, common, rate
from tests.experiments.builders import row

SETTINGS: dict[str, tuple[Any, Any]] = {
    "ablation of the method": (ablation, ablation.Settings()),
    "ablation of the model": (ablation, ablation.Settings(of="model")),
    "compare": (compare, compare.Settings()),
    "imagined": (imagined, imagined.Settings()),
    "precision": (precision, precision.Settings()),
    "protocol": (protocol, protocol.Settings()),
    "repeated": (repeated, repeated.Settings()),
    "repeated, 10m": (repeated, repeated.Settings(size="10m")),
    "sizes": (sizes, sizes.Settings()),
    "tokens": (tokens, tokens.Settings()),
    "tokens, imagined": (tokens, tokens.Settings(recipe="protocol-imagined")),
    "tokens, 8,000 steps": (tokens, tokens.Settings(recipe="protocol-imagined-long", steps=8000, fractions=(1.0,))),
    "words": (words, words.Settings(judges=tuple(words.JUDGES), windows=(0, 2), longer=(3000, 6000))),
}
STUDIES: dict[str, tuple[list[Entry], StudySettings]] = {
    name: (module.entries(settings), settings) for name, (module, settings) in SETTINGS.items()
}


def settings_of(entry: Entry, how: StudySettings) -> dict:
    """All settings of an entry's run, as `conduct` lays them over each other."""
    return {**common(entry.preset, how.steps, how.evaluations), **entry.settings, "run.seed": 1}


@pytest.mark.parametrize("study", STUDIES)
def test_every_entry_is_a_valid_run_of_its_own(study):
    """Catches a wrong flag that would end a study after an hour, and a variant that changes nothing."""
    entries, how = STUDIES[study]
    for steps in (6, how.steps):
        configs = [built(e.preset, settings_of(e, dataclasses.replace(how, steps=steps))) for e in entries]
        for i, config in enumerate(configs):
            assert all(differences(config, other) for other in configs[:i]), entries[i].label
    labels = [(e.group, e.label) for e in entries]
    assert len(labels) == len(set(labels))
    for group in {e.group for e in entries}:
        assert sum(e.baseline for e in entries if e.group == group) == 1


@pytest.mark.parametrize("study", STUDIES)
def test_the_command_line_takes_every_entry(study):
    """Catches a setting that the config knows and train.py's command line spells otherwise."""
    entries, how = STUDIES[study]
    settings = [settings_of(entry, how) for entry in entries]
    merged: dict = {}
    for one in settings:  # all spellings at once, as parsing a command takes a tenth of a second
        merged |= {k: v for k, v in one.items() if k != "train.label-smoothing"}
    for told in (settings[-1], merged):
        _, command = train.read_command([entries[-1].preset, *flags(told)])
        assert command.config == built(entries[-1].preset, told)


def test_the_comparison_treats_both_methods_alike():
    """Catches an arm with other rates, models or lengths than its rival: the gap would not be the method's."""
    for entries, how in (STUDIES[name] for name in ("protocol", "compare", "sizes", "repeated", "words")):
        for group in {e.group for e in entries}:
            configs = [built(e.preset, settings_of(e, how)) for e in entries if e.group == group]
            for config in configs[1:]:
                changed = {key.partition(".")[0] for key in differences(configs[0], config)}
                assert changed <= {"method", "critic", "train"}
                assert config.train.steps == configs[0].train.steps
                assert config.train.batch_size == configs[0].train.batch_size


def test_a_share_of_the_rate_is_avatarls():
    """Catches cross-entropy slowed down with its rival, and one optimiser of two left behind."""
    theirs, *ours = repeated.entries(repeated.Settings(pace=0.5))
    assert [theirs.settings[f"optim.{name}"] for name in ("lr", "muon-lr")] == [3e-3, 0.02]
    assert len(ours) == 2
    for entry in ours:
        assert [entry.settings[f"optim.{name}"] for name in ("lr", "muon-lr")] == [1.5e-3, 0.01]


def test_repeated_text_is_handed_over_as_told():
    """Catches a hand-over that cross-entropy gets too, which would train it anew, and one that is not applied."""
    theirs, *ours = repeated.entries(repeated.Settings(fall="0.95:0.8/0.1:0.4"))
    plainly, *_ = repeated.entries(repeated.Settings())
    assert theirs == plainly
    for entry in ours:
        assert entry.settings["method.critic-weight-schedule"] == "0:0.95,1:0.8"
        assert entry.settings["method.reality-weight-schedule"] == "0:0.1,1:0.4"


def test_windows_are_those_of_the_recipe_that_imagines():
    """Catches imagined windows in the plain recipe, and a number that is not passed on."""
    entries = {e.label: e for e in repeated.entries(repeated.Settings(windows=5))}
    imagined = {label: built(e.preset, e.settings).method.imagined_windows for label, e in entries.items()}
    assert imagined == {"cross-entropy": 0, "AvataRL": 0, "AvataRL, imagined": 5}


def test_published_is_published():
    """Catches a recipe that changes what its rival 'published settings' means."""
    (entry,) = [e for e in compare.entries(compare.Settings(optimizers=("muon",))) if "published" in e.label]
    assert built(entry.preset, entry.settings).method == MethodConfig()
    assert {"method.sparsify", "method.reality-weight-schedule"} <= set(PUBLISHED)


def test_distillation_never_hears_reality():
    """Catches a teacher that is gold in disguise, or a schedule that goes on beneath."""
    (entry,) = [e for e in compare.entries(compare.Settings(optimizers=("muon",))) if "distillation" in e.label]
    method = built(entry.preset, entry.settings).method
    assert method.knots("reality_weight") == ((0.0, 0.0),) and method.knots("critic_weight") == ((0.0, 1.0),)


def test_the_rates_of_both_optimisers_move_together():
    """Catches a tuning of Muon that leaves AdamW's rate of the embeddings behind."""
    entry = sizes.entries(sizes.Settings())[0]
    scaled = rate(StudySettings()).applied(entry.preset, entry.settings, 0.5)
    assert scaled["optim.lr"] == pytest.approx(1.5e-3) and scaled["optim.muon-lr"] == pytest.approx(0.01)


def test_weight_decay_of_both_optimisers_is_tuned():
    """Catches a decay that the optimiser in use never sees."""
    entry = repeated.entries(repeated.Settings())[0]
    decay = tuning(StudySettings(), (), (1.0, 10.0))[-1]
    config = built(entry.preset, decay.applied(entry.preset, entry.settings, 10.0))
    assert config.optim.weight_decay == pytest.approx(1.0) and config.optim.muon_weight_decay == pytest.approx(0.1)
    assert config.data.train_stop == 0.1 and config.eval.every == 100


def test_a_part_of_the_ablation_keeps_its_baseline():
    """Catches --only that leaves nothing to compare with."""
    labels = [e.label for e in ablation.entries(ablation.Settings(only=("proposes",)))]
    assert labels == [ablation.BASELINE, "student proposes nothing"]


def test_a_text_is_named_from_the_checkout(tmp_path, monkeypatch):
    """Catches a study that only finds its texts where it was written, and a record with this machine's folders."""
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "text.txt").write_text("text")
    monkeypatch.setenv("AVATARL_DATA", str(tmp_path))
    found = words.Settings(train="some/text.txt", val="some/text.txt", also=("model.n-layer=1",)).further
    assert found["data.corpus"] == found["data.val-corpus"] and not os.path.isabs(found["data.corpus"])
    assert (ROOT / found["data.corpus"]).resolve() == (tmp_path / "some" / "text.txt").resolve()
    assert found["data.tokenizer"] == "bpe" and found["model.n-layer"] == 1
    with pytest.raises(ConfigError, match="AVATARL_DATA"):
        words.text_file("some/other.txt")


@pytest.mark.parametrize(
    ("preset", "how"),
    [
        ("protocol-words", words.Settings(windows=(2,))),
        ("protocol-words-plain", words.Settings(windows=(0,), falls=("1:0.6/0:0.6",))),
    ],
)
def test_the_presets_of_words_are_what_the_study_measures(preset, how):
    """Catches a preset that promises the study's figures with other settings."""
    _, ours = words.entries(how)
    tokens = {"data.tokenizer": "bpe", "data.bpe-vocab": how.vocabulary}
    ran = built(ours.preset, {**settings_of(ours, how), **tokens})
    apart = differences(ran, built(preset, {**common(preset, how.steps, how.evaluations)}))
    assert apart.keys() == {"run.dtype", "run.seed"}


def test_cross_entropy_for_longer_is_tuned_as_a_baseline_is():
    """Catches a longer run with the short one's schedule, or left at its preset's rate where baselines are tuned."""
    how = words.Settings(steps=600, longer=(3000, 1000, 3000), evaluations=4)
    made = [entry for entry in words.entries(how) if entry.group]
    assert [(e.label, e.baseline) for e in made] == [
        ("cross-entropy, 1,000 steps", True),
        ("cross-entropy, 3,000 steps", True),
    ]
    configs = [built(e.preset, settings_of(e, how)) for e in made]
    assert [(c.train.steps, c.optim.warmup_steps, c.eval.every) for c in configs] == [
        (1000, 100, 250),
        (3000, 100, 750),
    ]
    assert [knob.name for knob in tuning(how, how.dropouts, how.decays)] == ["rate"]


def test_what_is_said_of_longer_runs():
    """Catches times or losses divided the wrong way round, and AvataRL compared with itself."""
    base = row("cross-entropy", [[3.9]], baseline=True)
    ours = row("ours", [[3.8, 3.7, 3.7, 3.6]])
    later = row("later", [[3.8, 3.5]], group="900 steps", baseline=True)
    said = words.against_longer([base, ours, later])
    assert said == ["- ours − later = +0.1000; in 2.00 times the time, at 1.00 times the calibration error."]


@pytest.mark.parametrize("size", ["4", "x128", "0x64", "2x0", "2x50", "two x 64"])
def test_a_size_that_is_none(size):
    """Catches a ladder that fails at its last rung."""
    with pytest.raises(ConfigError, match="sizes"):
        sizes.Settings(sizes=("2x64", size))


@pytest.mark.parametrize(
    ("study", "settings"),
    [
        (compare, {"optimizers": ("sgd",)}),
        (protocol, {"optimizers": ()}),
        (tokens, {"fractions": (0.0, 1.0)}),
        (repeated, {"share": 0.0}),
        (repeated, {"pace": 0.0}),
        (repeated, {"fall": "0.9"}),
        (repeated, {"dropouts": (1.0,)}),
        (repeated, {"dropouts": ()}),
        (repeated, {"decays": ()}),
        (repeated, {"decays": (0.0,)}),
        (repeated, {"windows": 0}),
        (words, {"judges": ("model",)}),
        (words, {"windows": (-1,)}),
        (words, {"top_k": 0}),
        (words, {"dropouts": (-0.1,)}),
        (words, {"longer": (2000, 3000)}),
        (words, {"falls": ("0.9",)}),
        (words, {"falls": ("0.9:1.2",)}),
        (words, {"falls": ("0.9:0.6/0.1",)}),
        (words, {"falls": ("0.9:0.6/0.1:0.4/0.1:0.4",)}),
    ],
)
def test_bad_input(study, settings):
    """Catches a study that fails late for what it was told."""
    with pytest.raises(ConfigError, match=next(iter(settings)).replace("_", "-")):
        study.Settings(**settings)


def test_imagination_is_what_differs():
    """Catches imagined windows compared with runs of another critic or with fewer windows a step."""
    entries, how = STUDIES["imagined"]
    configs = {e.label: built(e.preset, settings_of(e, how)) for e in entries}
    plain, ours = configs["AvataRL, none imagined"], configs["AvataRL, 3 imagined"]
    hand_over = {"method.critic_weight_schedule", "method.reality_weight_schedule"}  # each has its own
    assert differences(plain, ours).keys() == {"method.imagined_windows", "method.top_k"} | hand_over
    many, one = configs["cross-entropy, 4 times the corpus's tokens"], configs["cross-entropy"]
    assert differences(one, many).keys() == {"train.batch_size", "optim.lr", "optim.muon_lr"}
    assert many.train.batch_size == (1 + ours.method.imagined_windows) * plain.train.batch_size


@pytest.mark.parametrize(
    ("fall", "label", "critic", "reality"),
    [
        ("0.9:0.6", "w_c 0.9 → 0.6", "0:0.9,1:0.6", "0:0.1,1:0.4"),
        ("0.93:0.7/0.1:0.4", "w_c 0.93 → 0.7, w_r 0.1 → 0.4", "0:0.93,1:0.7", "0:0.1,1:0.4"),
    ],
)
def test_words_hand_over_as_told(fall, label, critic, reality):
    """Catches reality's weights taken for the critic's, or thrown away and made to sum to 1."""
    _, ours = words.entries(words.Settings(falls=(fall,), windows=(0,)))
    assert ours.label == f"AvataRL, mixed, {label}"
    assert ours.settings["method.critic-weight-schedule"] == critic
    assert ours.settings["method.reality-weight-schedule"] == reality
