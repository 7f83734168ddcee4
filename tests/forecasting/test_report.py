"""What --dry-run prints, and that it reads and writes nothing."""

import builtins
import re
import socket
from pathlib import Path

import pytest

from config import PRESETS, override, preset
from forecasting import report
from forecasting.probe import Probe
from forecasting.report import counted, forecast, measured, parts_of
from forecasting.speed import Speed
from forecasting.workload import count
from tests.tiny_train import PRESET, files_below, flags, here
from training.distributed import World
from training.hardware import choose

PARTS = ("parameters", "tokens", "FLOPs", "hardware", "measured", "step", "memory", "training", "evaluation", "total")
SPEED = Speed("as a test says", step=0.5, evaluation=1e-4, memory=3.21e9)


@pytest.fixture
def canned(monkeypatch) -> list[str]:
    """Measurements are made up: half a second a step. Returns the names of what was to be measured."""
    asked: list[str] = []

    def measure(config, hardware, world, peak):
        asked.append(config.train.objective)
        return SPEED

    monkeypatch.setattr(report, "measure", measure)
    monkeypatch.setattr(report, "matmul_peak", lambda device, dtype: 1e12)
    monkeypatch.setattr(report, "caching_seconds", lambda *_: 0.25)
    return asked


def lines_of(config, world: World | None = None) -> dict[str, str]:
    """The forecast's lines by their first word."""
    hardware = choose(config.run)
    return {line.split()[0]: line for line in forecast(config, hardware, world or World())}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_its_forecast(place, canned, name):
    """Catches a preset without a part of its forecast, one whose counting fails, and writing left out unsaid."""
    before = files_below(place)
    outcome = here(name, "--dry-run")
    assert outcome.code == 0 and outcome.err == ""
    assert outcome.out.startswith(f"{name}: a forecast; nothing was read or written\n")
    for what in (*PARTS, "H100 SXM"):
        assert f"\n{what} " in outcome.out
    assert ("\ncritic " in outcome.out) == (preset(name).critic.kind == "model" and name.startswith("avatarl-"))
    assert len(re.findall(r"^ +(?:1|2|4|8|16|32|64) ", outcome.out, re.MULTILINE)) == 7
    assert ("imagined windows" in outcome.out) == (preset(name).method.imagined_windows > 0)
    assert max(map(len, outcome.out.splitlines())) < 180
    assert files_below(place) == before


def test_the_parts_add_up(canned):
    """Catches a total that forgets evaluations or the critic, and a critic without evaluations of its own."""
    config = preset("avatarl-classic")
    said = lines_of(config)
    training, evaluation = 2000 * 0.5, 5 * 111_500 * 1e-4
    assert canned == ["avatarl", "cross-entropy"]
    assert "about 17 min" in said["training"] and "about 56 s: 5 times" in said["evaluation"]
    assert "about 18 min first, where it is missing: pretrain-char, 1.54 M tokens" in said["critic"]
    assert list(parts_of(count(config), SPEED)) == pytest.approx([training, evaluation])
    assert "about 35 min;" in said["total"]
    twice = lines_of(override(config, critic={"cross_fit": True}))
    assert "about 35 min first" in twice["critic"] and "pretrain-char twice" in twice["critic"]
    there = lines_of(override(config, critic={"run": "runs/critic"}))
    assert "critic" not in there and "about 18 min;" in there["total"]


def test_a_cache_is_made_first(canned):
    """Catches a cached critic that is forecast as asked in every step, and one whose size nobody hears of."""
    config = override(preset("avatarl-char"), critic={"cache": True})
    windows = int(0.9 * 1.115e6 - 128) // 128
    said = lines_of(config)["cache"]
    assert f"{windows:,} x 128 positions" in said and "32 likeliest" in said
    assert f"{windows * 128 * 32 * 3 / 1e6:.3g} MB on disk" in said and "about 33 min first" in said
    assert "cache" not in lines_of(preset("avatarl-char"))
    web = override(preset("avatarl-250m"), critic={"cache": True})
    assert " 0  for its critic" in counted(web, count(web))[2].replace("0 for", " 0  for")
    live = next(line for line in forecast(preset("avatarl-250m"), choose(web.run), World()) if line.split()[0] == "1")
    cached = next(line for line in forecast(web, choose(web.run), World()) if line.split()[0] == "1")
    assert live != cached


def test_what_cannot_be_known_is_not_made_up(canned):
    """Catches evaluations of a text of unknown length, priced as if they were none."""
    said = lines_of(override(preset("avatarl-char"), data={"corpus": "unheard-of"}))
    assert "not counted" in said["evaluation"] and "besides evaluations" in said["total"]
    assert "unknown" in said["1"] and "epochs" not in said["tokens"]


def test_numbers_have_two_digits(canned):
    """Catches a forecast that pretends to know more than it measured."""
    said = lines_of(preset("avatarl-char"))
    # 5.7 GFLOP a step
    assert "about 500 ms: 4,100 tokens/s, 1% of the measured matmul peak of 1 TFLOP/s" in said["step"]
    assert "about 3.2 GB per process" in said["memory"] and "more than" not in said["memory"]


def test_too_little_memory_is_said(canned):
    """Catches a run that is started and killed although its forecast knew."""
    config = preset("avatarl-char")
    (line,) = (
        line
        for line in measured(count(config), SPEED._replace(memory=1e15), choose(config.run), World(), 1e12)
        if line.startswith("memory")
    )
    assert "more than the" in line and "--train.grad-accum" in line and "--eval.batch-size" in line


def test_processes_share_the_batch(canned, place, monkeypatch):
    """Catches a batch that torchrun's processes cannot share, and a forecast printed by each of them."""
    config = preset("avatarl-char")
    assert "on 2 processes" in lines_of(config, World(size=2))["step"]
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "3"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    outcome = here("avatarl-char", "--dry-run")
    assert outcome.code == 2
    assert outcome.errors == [
        "error: train.batch-size = 16: does not divide among 3 processes, as 15 or 18 would; change it, or use other "
        "numbers of processes"
    ]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    outcome = here("avatarl-char", "--dry-run")
    assert outcome.code == 0 and outcome.out == ""


def test_settings_that_cannot_run_are_refused(place):
    """Catches a forecast for a run that cannot start: the error, its exit code, and nothing on the way to it."""
    outcome = here(PRESET, *flags(method_top_k=66), "--dry-run")
    assert outcome.code == 2 and outcome.errors and "method.top-k = 66" in outcome.errors[0]


def test_a_dry_run_reads_and_writes_nothing(place, monkeypatch):
    """Catches a forecast that downloads, opens a corpus, trains a critic or makes a folder: a real one, measured."""
    touched: list[str] = []
    opened = builtins.open

    def watched(file, *rest, **options):
        name = str(file)
        if not name.startswith(("/proc", "/sys", "/usr", "/dev")) and ".venv" not in name and not name.endswith(".py"):
            touched.append(name)
        return opened(file, *rest, **options)

    def no_network(*_):
        raise AssertionError("a dry run stays offline")

    monkeypatch.setattr(builtins, "open", watched)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(Path, "read_text", guarded(Path.read_text, touched))
    monkeypatch.setattr(Path, "read_bytes", guarded(Path.read_bytes, touched))
    cost = Probe.cost
    monkeypatch.setattr(Probe, "cost", lambda self, rows, **_: cost(self, rows, seconds=0))
    before = files_below(place)
    outcome = here(PRESET, *flags(critic_kind="model", critic_preset="pretrain-char"), "--dry-run")
    assert outcome.code == 0 and outcome.err == ""
    assert re.search(r"^measured    \d+ whole steps$", outcome.out, re.MULTILINE)
    assert touched == [] and files_below(place) == before


def guarded(read, touched):
    """A method of Path that notes whom it reads, unless that is the system."""

    def watched(path, *rest, **options):
        if not str(path).startswith(("/proc", "/sys", "/usr", "/dev")):
            touched.append(str(path))
        return read(path, *rest, **options)

    return watched


def test_the_disk_that_a_large_corpus_takes_is_said(canned):
    """Catches 18 GB that nobody was told of, and half of it because a critic trains on a half."""
    config = preset("avatarl-250m")
    for data in ({}, {"train_stop": 0.5}):
        said = lines_of(override(config, data=data))["disk"]
        assert "18.1 GB" in said and "python -m data.prepare openwebtext" in said
    assert "disk" not in lines_of(preset("avatarl-char"))


def test_the_price_reaches_the_table(canned, place):
    """Catches a --price that is parsed and forgotten, and one that makes a run cheaper than nothing."""
    outcome = here("avatarl-250m", "--dry-run", "--price", "2.5")
    assert outcome.code == 0 and "$2.50 per GPU-hour as given with --price" in outcome.out
    assert "$3.95" in here("avatarl-250m", "--dry-run").out
    outcome = here("avatarl-250m", "--dry-run", "--price", "-1")
    assert outcome.code == 2 and outcome.errors == ["error: price = -1.0: use dollars, such as 2.5"]
