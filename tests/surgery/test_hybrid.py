"""The whole experiment, tiny: phases in their order, arms that are comparable, resumed bit for bit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import hybrid
import surgery.phases
import train_core
from config import ConfigError
from launch import load_data
from surgery.commits import undo
from surgery.companion import Surgeries, read_trials
from surgery.phases import stagnated
from surgery.run import judge_of
from surgery.settings import HybridConfig, PhaseConfig, SurgeryConfig, student_config
from surgery.student import newest
from surgery.surgeon import Surgeon
from tests.surgery.test_commits import CPU
from tests.tiny_train import CLOCKS, Outcome, here, same, weights
from training.distributed import World
from training.run_folder import load_run

TINY: dict[str, Any] = {
    "data.corpus": "corpus.txt",
    "run.device": "cpu",
    "run.dtype": "float32",
    "run.compile": "off",
    "run.threads": 1,
    "model.n-layer": 1,
    "model.n-head": 2,
    "model.n-embd": 16,
    "model.block-size": 16,
    "critic.ngram-context": 2,
    "method.top-k": 4,
    "train.batch-size": 4,
    "train.checkpoint-every": 3,
    "optim.warmup-steps": 2,
    "eval.every": 6,
    "eval.ladder": 0,
    "eval.sample-tokens": 5,
    "log.every": 1,
    "phases.grpo-steps": 6,
    "phases.both-steps": 7,
    "phases.surgeon-rounds": 5,
    "surgery.candidates": 4,
    "surgery.prompts": 2,
    "surgery.prompt-tokens": 4,
    "surgery.new-tokens": 6,
    "surgery.rank": 2,
    "accept.every": 2,
    "accept.windows": 8,
    "accept.held-out": 0.1,
    "accept.z": 0,  # so that some edits are kept
    "agent.learning-starts": 8,
    "agent.batch-size": 8,
    "agent.gradient-steps": 2,
    "agent.width": 8,
    "agent.buffer-size": 64,
}
END = 13  # steps of phases 1 and 3
DATED = CLOCKS | {"surgery/seconds"}


def words(**settings: Any) -> list[str]:
    """TINY with changes as flags: phases_both_steps=4 is --phases.both-steps 4; same_time=False is --no-same-time."""
    found = []
    changed = {k.replace("_", ".", 1).replace("_", "-") if "_" in k else k: v for k, v in settings.items()}
    for name, value in (TINY | changed).items():
        found += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return found


def run(name: str, *more: str, **settings: Any) -> Path:
    """A finished hybrid run of that name."""
    outcome = here(*words(run_name=name, **settings), *more, main=hybrid.main)
    assert outcome.code == 0, outcome.err
    return Path("runs") / name


def metrics(part: Path) -> list[dict[str, Any]]:
    """A part's metrics.jsonl without what the clock decides."""
    found = [json.loads(line) for line in (part / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in DATED} for line in found]


@pytest.fixture
def quick(place, monkeypatch):
    """A place for tiny runs, where nobody is given more time."""
    return place


def test_the_whole_experiment(quick):
    """Catches phases in another order, parts that sample.py could not read, a report that leaves an arm out."""
    outcome = here(*words(run_name="all", train_checkpoint_every=50, eval_every=50), main=hybrid.main)
    assert outcome.code == 0, outcome.err
    said = [line for line in outcome.out.splitlines() if line.startswith("phase ")]
    told = ["the student alone", "ends at step 6", "the surgeon alone", "surgeon", "none", "random", "none-same-time"]
    assert len(said) == 7 and all(part in line for part, line in zip(told, said, strict=True)), said
    assert [line[:7] for line in said] == ["phase 1"] * 2 + ["phase 2"] + ["phase 3"] * 4
    folder = Path("runs/all")
    for part, step in {"grpo": 6, "surgeon": END, "none": END, "random": END}.items():
        assert weights(folder / part, step) and (folder / part / "samples.txt").is_file()
        assert json.loads((folder / part / "result.json").read_text())["steps"] == step
    lines = metrics(folder / "practice")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5] and "surgery/alpha" in lines[-1]
    trials = read_trials(folder / "surgeon")
    assert [t["step"] for t in trials] == [8, 10, 12]
    assert all(t["accepted"] == (t["gain"] > 0) == ("unseen_gain" in t) for t in trials)
    edits = sorted(p.name for p in (folder / "surgeon" / "surgeries").glob("*"))
    assert edits == [f"step-{t['step']:06d}.safetensors" for t in trials if t["accepted"]] and edits
    assert {"surgery/gain", "surgery/accepted", "surgery/q_value"} <= set().union(*metrics(folder / "surgeon"))
    assert same_time_steps(folder) == json.loads((folder / "none-same-time" / "result.json").read_text())["steps"]
    report, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    for arm in ("surgeon", "nobody, same tokens", "nobody, same wall time", "random edits"):
        assert f"| {arm} |" in report
    assert "against nobody operating" in report and "against nobody operating" in page
    assert "surgery/gain" in page and "none-same-time" in page


def same_time_steps(folder: Path) -> int:
    """Where the arm of equal wall time must end, by the clocks of the others."""
    lines = [json.loads(line) for line in (folder / "surgeon" / "metrics.jsonl").read_text().splitlines()]
    operating = sum(line.get("surgery/seconds", 0) for line in lines)
    (practice,) = (folder / "practice").glob("round-*/seconds.json")
    begun, plain = (json.loads((folder / p / "result.json").read_text())["seconds"] for p in ("grpo", "none"))
    assert operating > 0 and float(practice.read_text()) > 0
    return END + round((operating + float(practice.read_text())) / ((plain - begun) / (END - 6)))


def test_phase_2_leaves_the_student_alone_and_the_arms_start_where_it_stood(quick):
    """Catches a practising surgeon that edits, and an arm that starts from other weights than phase 1's last."""
    folder = run("one", arms=("surgeon", "none"), phases_both_steps=1, accept_every=50)
    grpo = weights(folder / "grpo", 6)
    assert same(grpo, weights(folder / "surgeon", 6)) and same(grpo, weights(folder / "none", 6))
    assert same(weights(folder / "surgeon", 7), weights(folder / "none", 7)), "nobody operated"


def test_nobody_operating_is_a_plain_training_run(quick):
    """Catches a control that is no control: other batches, another rate, a generator that surgery moved on."""
    folder = run("one", "--no-same-time", arms=("surgeon", "none"), train_checkpoint_every=0)
    config = json.loads((folder / "none" / "config.json").read_text())["config"]
    settings = [
        word
        for group, fields in config.items()
        if group != "bootstrap"
        for name, value in fields.items()
        if value not in (None, "") and not isinstance(value, bool) and (group, name) != ("run", "name")
        for word in (f"--{group}.{name.replace('_', '-')}", str(value))
    ]
    outcome = here("protocol-avatarl", *settings, "--run.name", "plain", *flags_of_schedules())
    assert outcome.code == 0, outcome.err
    assert same(weights(Path("runs/plain"), END), weights(folder / "none", END))
    assert not same(weights(folder / "none", END), weights(folder / "surgeon", END))


def flags_of_schedules() -> list[str]:
    """The preset's schedules, taken away."""
    return ["--method.critic-weight-schedule", "", "--method.reality-weight-schedule", ""]


class Died(RuntimeError):
    """The lights went out: nothing is saved."""


def dies(where: Any, name: str, at: int) -> Any:
    """A patch: the method `name` raises at its call number `at` (from 1)."""
    real, calls = getattr(where, name), []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise Died
        return real(*args, **options)

    return mock.patch.object(where, name, counted)


MOMENTS = {
    "in phase 1": (train_core, "learn", 5),
    "before phase 2": (surgery.phases, "surgeon_alone", 1),
    "in phase 2": (Surgeon, "round", 4),
    "before phase 3": (surgery.phases, "fork", 1),
    "in phase 3": (train_core, "learn", 6 + 5),
    "while operating": (Surgeries, "_line", 3),
    "between two arms": (surgery.phases, "fork", 2),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An undisturbed run with a surgeon and chance."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train_core, "matmul_peak", lambda device, dtype: 1e11)
        write(folder)
        return (run("run", "--no-same-time", arms=("surgeon", "random", "none"))).resolve()


def write(folder: Path) -> None:
    from tests.tiny_train import write_corpus

    write_corpus(folder / "corpus.txt")


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS.keys())
def test_resumed_equals_uninterrupted(quick, whole, moment, monkeypatch):
    """Catches a replay buffer, an optimiser or a count that is not saved, rounds that are repeated or lost, and edits

    that are made twice.
    """
    monkeypatch.setattr(surgery.phases, "ROUNDS_BETWEEN_SAVES", 2)
    arms = ("surgeon", "random", "none") if moment[-1] == 2 else ("surgeon", "none")
    with dies(*moment):
        assert here("--no-same-time", *words(run_name="run", arms=arms), main=hybrid.main).code == 1
    outcome = here("--resume", "runs/run", main=hybrid.main)
    assert outcome.code == 0, outcome.err
    for part in ("grpo", *arms):
        step = 6 if part == "grpo" else END
        assert same(weights(whole / part, step), weights(Path("runs/run") / part, step)), part
        assert metrics(whole / part) == metrics(Path("runs/run") / part)
        logs = [folder / part / "surgeries.jsonl" for folder in (whole, Path("runs/run"))]
        assert part in ("grpo", "none") or logs[0].read_text() == logs[1].read_text()
    assert metrics(whole / "practice") == metrics(Path("runs/run/practice"))


def test_an_edit_is_taken_out_of_a_finished_run(whole):
    """Catches commits that are logged and cannot be undone where they are: in the checkpoints of a run."""
    part, kept = whole / "surgeon", [t["step"] for t in read_trials(whole / "surgeon") if t["accepted"]]
    run = load_run(part, "latest")
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    assert undo(run.model, part / "surgeries" / f"step-{kept[-1]:06d}.safetensors") is (kept[-1] == END)
    changed = {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"blocks.0.attn.qkv.weight"}
    edit = load_file(part / "surgeries" / f"step-{kept[-1]:06d}.safetensors")
    taken = before["blocks.0.attn.qkv.weight"] - run.model.state_dict()["blocks.0.attn.qkv.weight"]
    assert torch.allclose(taken, edit["after.0"] - edit["before.0"], atol=1e-6)


def test_other_judges(quick):
    """Catches a judge that is only a name in --help, and one that has learnt the text on which arms are compared."""
    plain = {k: v for k, v in TINY.items() if k.partition(".")[0] not in ("phases", "surgery", "accept", "agent")}
    train = [w for k, v in plain.items() if k != "critic.ngram-context" for w in (f"--{k}", str(v))]
    for name, share, stop in (("fair", "0.1", 0.9), ("knows", "0.05", 1.0), ("decided", "0.1", 1.0)):
        cut = ["--data.val-fraction", share, "--data.train-stop", str(stop)]
        outcome = here("pretrain-char", *train, "--train.steps", "2", *cut, "--run.name", name)
        assert outcome.code == 0, outcome.err
    config = hybrid.read_command(words(critic_mixed_context=2)).config
    dataset = load_data(config, World(), None)
    prompts, texts = torch.from_numpy(dataset.train[:100].astype("int64")).view(10, 10).split([4, 6], dim=1)
    found = set()
    settings = SurgeryConfig(prompt_tokens=4, new_tokens=6)
    model = replace(settings, judge="model", judge_run="runs/fair")
    for asked in (replace(settings, judge="ngram"), replace(settings, judge="mixed"), model):
        one = judge_of(asked, config, dataset, CPU)
        assert one is not None
        found.add(round(float(one.quality(prompts, texts).likelihood.mean()), 4))
    assert len(found) == 3 and max(found) < 0, "each has its own opinion of the same texts"
    outcome = here(*words(), "--surgery.judge", "model", "--surgery.judge-run", "runs/knows", main=hybrid.main)
    assert outcome.code == 2 and "trained on validation text" in outcome.errors[0]
    outcome = here(*words(), "--surgery.judge", "model", "--surgery.judge-run", "runs/decided", main=hybrid.main)
    assert outcome.code == 2 and "trained on text that decides on edits" in outcome.errors[0]
    critic = ["--critic.kind", "model", "--critic.run", "runs/decided"]
    outcome = here(*words(), *critic, main=hybrid.main)
    assert outcome.code == 2 and "critic.run = 'runs/decided'" in outcome.errors[0]


def stopped(where: Any, name: str, at: int, **settings: Any) -> Outcome:
    """A run that gets Ctrl-C in the method `name`'s call number `at`."""
    import signal

    real, calls = getattr(where, name), []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **options)

    with mock.patch.object(where, name, interrupted):
        return here(*words(run_name="run", **settings), main=hybrid.main)


@pytest.mark.parametrize("where, name, at", [(train_core, "learn", 2), (Surgeon, "round", 3), (train_core, "learn", 9)])
def test_an_interrupt_saves_and_names_the_way_on(quick, where, name, at):
    """Catches Ctrl-C that loses a phase, an exit code that looks complete, no hint how to continue."""
    outcome = stopped(where, name, at, arms=("surgeon", "none"))
    assert outcome.code == 130 and "python hybrid.py --resume runs/run" in outcome.err
    if where is Surgeon:
        assert len(list(Path("runs/run/practice").glob("round-000003"))) == 1
    else:
        part = "grpo" if at == 2 else "surgeon"
        assert newest(Path("runs/run") / part).name == f"step-{at:06d}"  # type: ignore[union-attr]
    assert here("--resume", "runs/run", main=hybrid.main).code == 0


def test_stagnation():
    """Catches a plateau seen too soon, one that a single good value hides, and noise that counts as progress."""
    phases = PhaseConfig(plateau_window=2, plateau_tolerance=0.1)
    assert not stagnated([], phases) and not stagnated([3, 3, 3], phases)
    assert stagnated([3.0, 3.0, 2.95, 2.92], phases)
    assert not stagnated([3.0, 3.2, 2.8, 2.9], phases)
    assert not stagnated([3.0, 2.7, 2.72, 2.65], phases), "one lucky evaluation, and progress goes on"
    assert stagnated([2.0, 2.1, 2.9, 2.8], phases), "worse than before is no progress"
    assert stagnated([9.0, 9.0, 3.0, 3.0, 3.0, 3.0], phases), "what was long ago is no progress now"


def test_phase_1_ends_when_it_stagnates(quick):
    """Catches a plateau that is detected and not acted on, and arms whose phase 3 is cut short by it."""
    settings = {"phases_grpo_steps": 40, "eval_every": 2, "phases_plateau_window": 1}
    folder = run("one", "--no-same-time", arms=("none",), phases_plateau_tolerance=9, **settings)
    record = json.loads((folder / "grpo" / "config.json").read_text())
    assert record["stagnated"] and record["until"] == 2
    assert json.loads((folder / "none" / "result.json").read_text())["steps"] == 2 + 7
    assert "stagnated" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--surgeon", "sacc"], "did you mean sac"),
        (["--preset", "avatar-char"], "did you mean avatarl-char"),
        (["--train.steps", "99"], "use --phases.grpo-steps"),
        (["--surgery.layers", "5"], "surgery.layers = 5"),
        (["--surgery.new-tokens", "60"], "fit into the model's context"),
        (["--accept.windows", "999"], "accept.windows = 999"),
        (["--accept.held-out", "0.9"], "accept.held-out"),
        (["--surgery.judge", "model"], "surgery.judge-run"),
        (["--run.parallel", "fsdp"], "run.parallel = 'fsdp'"),
        (["--agent.entropy", "much"], "agent.entropy"),
        (["--arms", "surgeon", "random"], "add none"),
        (["--surgeon", "ppo", "--surgery.candidates", "1"], "at least 2 candidates"),
        (["--resume", "nowhere"], "no run of hybrid.py"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_made(quick, flags, said):
    """Catches settings that die an hour later, with a trace, and folders of runs that never were."""
    more = flags if "--resume" in flags else [*words(), *flags]
    outcome = here(*more, main=hybrid.main)
    assert outcome.code == 2 and len(outcome.errors) == 1 and said in outcome.errors[0], outcome.err
    assert not Path("runs").exists()


def test_resume_refuses_another_experiment(quick):
    """Catches a resumed run that goes on under other rules, and an arm that train.py continues without its surgeon."""
    folder = run("one", "--no-same-time", arms=("none",))
    for flags in (["--accept.z", "3"], ["--optim.lr", "1"], ["--preset", "avatarl-char"]):
        outcome = here("--resume", str(folder), *flags, main=hybrid.main)
        assert outcome.code == 2, flags
    outcome = here("--resume", str(folder / "none"))
    assert outcome.code == 2 and "hybrid.py --resume" in outcome.err


def test_settings_survive_json():
    """Catches a config.json that cannot be read back into the settings it was."""
    one = HybridConfig(surgery=SurgeryConfig(layers=(1, 0)), arms=("none",), surgeon="td3")
    assert HybridConfig.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    with pytest.raises(ConfigError, match="not this version's"):
        HybridConfig.from_dict({"surgery": {"scalpel": 1}})


def test_the_students_settings_come_from_any_preset():
    """Catches a --preset that is not listened to, and a default that is not GRPO."""
    assert student_config("").method.advantage == "group"
    assert student_config("avatarl-char").method.advantage == "none"
    assert torch.is_grad_enabled()
