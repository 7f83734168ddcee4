"""train_modal.py against the real modal package: everything but the cloud."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modal
import pytest
from click.testing import CliRunner, Result
from modal._image import _Image
from modal.cli import run as modal_run
from modal.cli.entry_point import entrypoint_cli
from modal.types import FileEntry, FileEntryType

import train_modal
from config import ConfigError
from on_modal import app as modal_app
from on_modal.app import Resources, make_app, stays_here
from on_modal.container import ROOT, VOLUMES, Job
from tests.test_house import sources
from tests.tiny_train import here

BIG = Resources("H100", 8, 1, 23.0, 10)


class Cloud:
    """What would have reached Modal."""

    def __init__(self) -> None:
        self.runs: list[tuple[Any, bool]] = []
        self.calls: list[Any] = []
        self.functions: list[Any] = []
        self.answer: Any = 0
        self.has_secret = True


@pytest.fixture
def cloud(monkeypatch) -> Cloud:
    """An account with an empty Volume; apps that run call their functions on no machine."""
    seen = Cloud()

    def hydrate(self: modal.Secret, *_: Any) -> modal.Secret:
        if not seen.has_secret:
            raise modal.exception.NotFoundError("no such secret")
        return self

    class Call:
        object_id = "fc-1"

        def get(self) -> Any:
            if isinstance(seen.answer, Exception):
                raise seen.answer
            return seen.answer

    def spawn(self: modal.Function, *arguments: Any) -> Call:
        seen.calls.append(arguments)
        seen.functions.append(self)
        return Call()

    @contextlib.contextmanager
    def run_app(app: modal.App, *, detach: bool = False, **_: Any) -> Iterator[modal.App]:
        seen.runs.append((app, detach))
        yield app

    class Names:
        def put(self, name: str, when: float, *, skip_if_exists: bool) -> bool:
            return True

    monkeypatch.setattr(modal.Secret, "hydrate", hydrate)
    monkeypatch.setattr(modal.Volume, "listdir", lambda self, path, recursive=False: [])
    monkeypatch.setattr(modal.Dict, "from_name", staticmethod(lambda name, create_if_missing: Names()))
    monkeypatch.setattr(modal.Function, "spawn", spawn)
    monkeypatch.setattr(modal_run, "run_app", run_app)
    monkeypatch.setattr(modal.App, "run", run_app)
    return seen


def by_modal(monkeypatch, *words: str, before: tuple[str, ...] = ()) -> Result:
    """`modal run train_modal.py WORDS` in this process."""
    line = ["run", *before, str(ROOT / "train_modal.py"), *words]
    monkeypatch.setattr(sys, "argv", ["modal", *line])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "train_modal", train_modal)  # Modal puts a fresh one there
    return CliRunner().invoke(entrypoint_cli, line)


def info(function: Any) -> Any:
    """What the function would be created with."""
    return function.info()


# ---- what Modal is asked for


def test_the_function_asks_for_the_gpus_retries_time_and_volumes():
    """Catches a wrong GPU string, an attempt that Modal ends before it has saved, and runs on a disk that goes."""
    asked = info(make_app(BIG)[1])
    assert asked.gpus == [("H100", 8)]
    assert asked.max_retries == 10
    assert 23 * 3600 + 600 <= asked.timeout <= 24 * 3600
    assert {mount.name for mount in asked.volumes.values()} == set(VOLUMES.values())
    assert set(asked.volumes) == {"/store/data", "/store/runs", "/store/cache"}
    assert asked.cluster_info is None


def test_containers_import_the_function_by_name():
    """Catches a function that only exists inside another, which no container can import."""
    source = make_app(BIG)[1]._source_info_
    assert (source.module_name, source.implementation_name) == ("on_modal.container", "train_on_modal")
    assert not source.is_serialized()


def test_nodes_make_a_cluster():
    """Catches --nodes 2 that rents two machines which train the same model twice."""
    asked = info(make_app(Resources("H200", 8, 2, 23.0, 10))[1])
    assert (asked.cluster_info.size, asked.cluster_info.rdma, asked.gpus) == (2, True, [("H200", 8)])


def test_preparing_a_corpus_rents_no_gpu():
    """Catches hours of tokenising beside eight idle GPUs."""
    function = make_app(Resources("H100", 0, 1, 23.0, 10))[1]
    assert info(function).gpus == []
    assert function._source_info_.implementation_name == "prepare_on_modal"


def test_the_image_has_the_tested_versions(monkeypatch):
    """Catches an image that takes the newest of everything, or torch's CPU build."""
    commands: list[str] = []
    original = _Image._from_args

    def spy(*, dockerfile_function: Any = None, **options: Any) -> Any:
        if dockerfile_function is not None:
            commands.extend(dockerfile_function("2025.06").commands)
        return original(dockerfile_function=dockerfile_function, **options)

    monkeypatch.setattr(_Image, "_from_args", spy)
    modal_app.make_image()
    text = "\n".join(commands)
    (install,) = [line for line in commands if "torch" in line]
    assert "--constraint /constraints.txt" in install and "wandb" in install and "index-url" not in install
    assert commands.index("COPY . /") < commands.index(install)  # constraints.txt
    assert "ENV AVATARL_DATA=" in text and "WORKDIR /root" in text
    assert "ENV PYTHONUNBUFFERED=" in text  # logs stream as they are written
    assert f"python:{modal_app.PYTHON}" in text


def test_containers_see_the_project_and_nothing_else():
    """Catches a module that is missing over there, and gigabytes of runs, of .venv or of .git that are uploaded."""
    assert [p for p in sources() if stays_here(p.relative_to(ROOT))] == []
    assert not stays_here(Path("reporting/page.css")) and not stays_here(Path("on_modal/container.py"))
    for path in (".git/config.py", ".venv/lib/x.py", "runs/a/report.js", "tests/test_house.py", "data/cache/t.npy"):
        assert stays_here(Path(path)), path


def test_the_secret_is_passed_on_where_it_exists(cloud, capsys):
    """Catches an account without Weights & Biases that can train nothing."""
    found = modal_app.find_secrets("wandb-secret")
    assert len(info(make_app(BIG, found)[1]).secrets) == 1
    cloud.has_secret = False
    assert modal_app.find_secrets("wandb-secret") == []
    assert "no secret wandb-secret" in capsys.readouterr().err


# ---- modal run


def test_modal_run_starts_the_job(cloud, monkeypatch):
    """Catches a local entrypoint that Modal's command line does not find, or that forgets its words."""
    done = by_modal(monkeypatch, "--preset", "avatarl-char", "--gpus", "2", "--train.steps", "500", "--run.name", "try")
    assert done.exit_code == 0, done.output
    ((job,),) = cloud.calls
    assert isinstance(job, Job)
    words = ("avatarl-char", "--train.steps", "500", "--run.name", "try")
    assert (job.folder, job.words, job.gpus, job.nodes, job.resume) == ("try", words, 2, 1, False)
    ((_, detached),) = cloud.runs
    assert [info(f).gpus for f in cloud.functions] == [[("H100", 2)]] and not detached
    assert "modal run train_modal.py --pull try" in done.output


@pytest.mark.parametrize("before", [(), ("--detach",)], ids=["ours", "Modal's"])
def test_detach_outlives_the_terminal(cloud, monkeypatch, before):
    """Catches --detach behind the file's name, which Modal itself does not know, being read and forgotten."""
    done = by_modal(monkeypatch, *(() if before else ("--detach",)), before=before)
    assert done.exit_code == 0, done.output
    assert [detached for _, detached in cloud.runs] == [True]


def test_an_incomplete_run_ends_non_zero(cloud, monkeypatch):
    """Catches a failed training that `modal run … && …` takes for a complete one."""
    cloud.answer = 1
    done = by_modal(monkeypatch, "--gpus", "2")
    assert done.exit_code == 1 and "--resume avatarl-char-gpu" in done.output + done.stderr
    cloud.answer = RuntimeError("stands at step 7")
    done = by_modal(monkeypatch, "--gpus", "2")
    assert done.exit_code == 1 and "stands at step 7" in done.output + done.stderr


def test_resume_wants_a_run_that_is_there(cloud, monkeypatch):
    """Catches eight GPUs that are rented to find out that a name was mistyped."""
    done = by_modal(monkeypatch, "--resume", "nobody")
    assert done.exit_code == 2 and cloud.calls == []
    entry = FileEntry("somebody", FileEntryType.DIRECTORY, 0, 0)
    monkeypatch.setattr(modal.Volume, "listdir", lambda self, path, recursive=False: [entry])
    assert by_modal(monkeypatch, "--resume", "somebody", "--train.steps", "9").exit_code == 0
    ((job,),) = cloud.calls
    assert (job.folder, job.words, job.resume) == ("somebody", ("--train.steps", "9"), True)


def test_python_does_what_modal_run_does(cloud):
    """Catches two command lines that drift apart."""
    outcome = here("--preset", "avatarl-char", "--gpus", "4", "--detach", main=train_modal.main)
    assert outcome.code == 0, outcome.err
    ((job,),) = cloud.calls
    assert (job.folder, job.gpus) == ("avatarl-char", 4)
    assert [detached for _, detached in cloud.runs] == [True]
    assert here("--prepare", "openwebtext", main=train_modal.main).code == 0
    assert cloud.calls[1] == ("openwebtext",)


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--gpus", "0"], "gpus = 0: a node has 1 to 8 H100"),
        (["--gpus", "9"], "gpus = 9: a node has 1 to 8 H100"),
        (["--gpus", "8", "--gpu", "A10"], "gpus = 8: a node has 1 to 4 A10"),
        (["--preset", "avatarl-900m"], "unknown preset 'avatarl-900m'"),
        (["--nodes", "2", "--gpus", "4"], "nodes = 2: several nodes take all 8 GPUs of each: --gpus 8"),
        (["--nodes", "2", "--gpus", "8", "--gpu", "L4"], "and --gpu H100 or H200 or B200"),
        (["--nodes", "0"], "nodes = 0"),
        (["--hours", "30"], "hours = 30"),
        (["--retries", "99"], "retries = 99"),
        (["--train.steps", "0"], "train.steps = 0"),
        (["--preset", "pretrain-char", "--gpus", "5"], "train.batch-size = 12: does not divide among 5 processes"),
        (
            ["--preset", "avatarl-classic", "--gpus", "5", "--train.batch-size", "10"],
            "gpus = 5: its critic's batch of 12 does not divide among them; first --preset pretrain-char on fewer",
        ),
        (
            ["--preset", "avatarl-250m", "--nodes", "2", "--gpus", "8"],
            "first --preset pretrain-30m on one node, then this with --critic.run /store/runs/pretrain-30m",
        ),
        (["--run.out-dir", "/tmp/x"], "run.out-dir = '/tmp/x'"),
        (["--run.device", "cpu"], "run.device = 'cpu'"),
        (["--data.corpus", "texts/mine.txt"], "modal volume put avatarl-data texts/mine.txt NAME/input.txt"),
        (["--nodes", "2", "--gpus", "8", "--run.parallel", "fsdp"], "run.parallel = 'fsdp'"),
        (["--pull", "a", "--resume", "b"], "one at a time"),
        (["--pull", "../a"], "pull = '../a'"),
        (["--pull", "a", "--train.steps", "5"], "means nothing here"),
    ],
)
def test_bad_settings_cost_nothing(cloud, words, complaint):
    """Catches a setting that only fails once the machines are rented."""
    outcome = here(*words, main=train_modal.main)
    assert outcome.code == 2 and complaint in outcome.err, outcome.err
    assert len(outcome.errors) == 1 and cloud.runs == []


def test_two_nodes_with_their_critic_at_hand_pass():
    """Catches a critic that is asked for though it is on the Volume, and settings made for one GPU that refuse 16."""
    nodes = ["--nodes", "2", "--gpus", "8"]
    critic = ["--critic.run", "/store/runs/pretrain-30m"]
    assert train_modal.read_command(["--preset", "avatarl-250m", *nodes, *critic])[0].nodes == 2
    assert train_modal.read_command(["--preset", "avatarl-250m", "--gpus", "8"])[0].gpus == 8


def test_without_an_account_it_says_so(monkeypatch):
    """Catches a traceback of Modal's client as the first thing that a newcomer sees."""
    monkeypatch.setattr(modal.Secret, "hydrate", lambda self: (_ for _ in ()).throw(modal.exception.AuthError("None.")))
    outcome = here(main=train_modal.main)
    assert outcome.code == 1 and outcome.errors == ["error: Modal knows no account here; run `modal setup` (None.)"]


def test_without_modal_it_says_what_to_install(monkeypatch):
    """Catches an ImportError's traceback, and a --dry-run that needs Modal."""
    monkeypatch.setitem(sys.modules, "modal", None)
    outcome = here(main=train_modal.main)
    assert outcome.code == 2 and "pip install modal" in outcome.err
    outcome = here("--prepare", "openwebtext", "--dry-run", main=train_modal.main)
    assert outcome.code == 0 and "-m data.prepare openwebtext" in outcome.out


def test_dry_run_says_what_would_start(cloud, monkeypatch):
    """Catches a plan that is not what the container runs, and one that rents something."""
    forecasts: list[list[str]] = []

    def forecast(words: list[str]) -> int:
        forecasts.append(words)
        return 0

    monkeypatch.setattr("train.main", forecast)
    outcome = here(
        "--preset", "avatarl-250m", "--gpus", "8", "--train.steps", "900", "--dry-run", main=train_modal.main
    )
    assert outcome.code == 0 and cloud.runs == []
    torchrun = "python -m torch.distributed.run --standalone --max-restarts=2 --nproc-per-node=8 train.py"
    place = "--run.name avatarl-250m --run.out-dir /store/runs"
    assert f"{torchrun} avatarl-250m --train.steps 900 {place}\n" in outcome.out
    assert "1 x H100:8" in outcome.out and "avatarl-runs at /store/runs" in outcome.out
    assert forecasts == [["avatarl-250m", "--train.steps", "900", "--dry-run"]]


def test_modal_itself_finds_the_help(tmp_path):
    """Catches a version of modal whose command line no longer looks for the app as we offer it."""
    done = subprocess.run(
        [sys.executable, "-m", "modal", "run", str(ROOT / "train_modal.py"), "--help"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env=os.environ | {"MODAL_CONFIG_PATH": str(tmp_path / "none.toml"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--gpus INT" in done.stdout and "--wandb-secret" in done.stdout


def test_other_names_stay_unknown():
    """Catches a module that answers to every name, so that a typing error looks like an app."""
    with pytest.raises(AttributeError):
        train_modal.ap  # noqa: B018
    assert "app" in dir(train_modal)


def test_words_are_told_apart():
    """Catches a value of train.py's flag that is taken for ours."""
    ours, theirs = train_modal.split_words(["--gpus", "2", "--train.steps=5", "--model.bias", "--detach"])
    assert (ours, theirs) == (["--gpus", "2", "--detach"], ["--train.steps=5", "--model.bias"])
    with pytest.raises(ConfigError, match="unknown preset"):
        train_modal.read_command(["--preset", "x"])
