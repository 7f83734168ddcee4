"""Caches of critics: what is stored comes back, a killed pass continues, and nothing foreign or broken is read."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from config import ConfigError
from data import critic_cache
from data.critic_cache import BrokenCache, CacheLayout, CacheWriter, CriticCache, cache_folder
from tests.tiny_train import ROOT, environment

LAYOUT = CacheLayout(windows=7, block_size=4, top=3, vocab_size=300)
MADE_FOR = {"corpus": "abc", "critic.kind": "ngram"}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows a part: LAYOUT then has four, the last with one window."""
    monkeypatch.setattr(critic_cache, "PART_BYTES", 2 * LAYOUT.window_bytes)


def content(layout: CacheLayout) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities to store, the same every time."""
    draws = np.random.default_rng(0)
    shape = (layout.windows, layout.block_size, layout.top)
    return draws.integers(layout.vocab_size, size=shape), -draws.random(shape).astype(np.float16)


def written(folder: Path, layout: CacheLayout = LAYOUT) -> tuple[CriticCache, np.ndarray, np.ndarray]:
    """A finished cache and what it holds."""
    write(folder, layout)
    return CriticCache(folder, layout, MADE_FOR), *content(layout)


def write(folder: Path, layout: CacheLayout = LAYOUT, until: int | None = None) -> list[int]:
    """Complete a cache, or go on up to a part; the parts that were missing or broken."""
    writer, (ids, log_probs) = CacheWriter(folder, layout, MADE_FOR), content(layout)
    writer.begin()
    made = [part for part in range(len(layout.parts))[:until] if not writer.holds(part)]
    for part in made:
        windows = layout.parts[part]
        writer.write(part, ids[windows.start : windows.stop], log_probs[windows.start : windows.stop])
    return made


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("vocab_size", "size"), [(2, 1), (256, 1), (257, 2), (65_536, 2), (65_537, 4)])
def test_what_is_stored_comes_back(tmp_path, vocab_size, size):
    """Catches ids cut to fewer bits than V needs or wider than that, a shifted window, and a wrong prediction."""
    layout = CacheLayout(windows=7, block_size=4, top=2, vocab_size=vocab_size)
    cache, ids, log_probs = written(tmp_path / "cache", layout)
    found = cache.read(np.array([20, 0, 24, 0]))
    assert found[0].dtype == np.int32 and found[1].dtype == np.float16
    assert np.array_equal(found[0], ids[[5, 0, 6, 0]]) and np.array_equal(found[1], log_probs[[5, 0, 6, 0]])
    assert (tmp_path / "cache/ids.bin").stat().st_size == 7 * 4 * 2 * size
    files = [tmp_path / "cache" / name for name in ("ids.bin", "log_probs.bin")]
    assert layout.total_bytes == sum(path.stat().st_size for path in files)


@pytest.mark.parametrize("positions", [[0, 3], [28], [-4]])
def test_other_positions_are_refused(tmp_path, positions):
    """Catches what was said of one window passed off as another's."""
    cache, _, _ = written(tmp_path / "cache")
    with pytest.raises(ValueError, match="holds windows at multiples of 4 below 28"):
        cache.read(np.array(positions))


@pytest.mark.parametrize("until", [0, 1, 3])
def test_a_pass_continues_where_it_stopped(tmp_path, small_parts, until):
    """Catches a pass that begins again, leaves a hole, or ends with other bytes."""
    write(tmp_path / "whole")
    write(tmp_path / "cache", until=until)
    if until:
        with pytest.raises(BrokenCache, match=f"only {until} of its 4 parts are written; give the command"):
            CriticCache(tmp_path / "cache", LAYOUT, MADE_FOR)
    assert write(tmp_path / "cache") == list(range(until, 4))
    assert bytes_of(tmp_path / "cache") == bytes_of(tmp_path / "whole")


def test_a_killed_pass_continues(tmp_path, small_parts):
    """Catches a part that is recorded before it is on the disk: the kill falls between its two files."""
    script = (
        "import os, signal\nfrom pathlib import Path\nfrom data import critic_cache\n"
        "from tests.data.test_critic_cache import LAYOUT, write\n"
        "critic_cache.PART_BYTES = 2 * LAYOUT.window_bytes\n"
        "sync, calls = os.fsync, []\n"
        "def killed(descriptor):\n    calls.append(sync(descriptor))\n"
        "    if len(calls) == 7: os.kill(os.getpid(), signal.SIGKILL)\n"  # three synced files a part
        "os.fsync = killed\nwrite(Path('cache'))\n"
    )
    environ = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environ, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert write(tmp_path / "cache") == [2, 3]
    write(tmp_path / "whole")
    assert bytes_of(tmp_path / "cache") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize(("name", "place", "part"), [("ids.bin", 0, 1), ("log_probs.bin", 7 * 4 * 3 * 2 - 1, 4)])
def test_a_broken_byte_is_found_and_mended(tmp_path, small_parts, capsys, name, place, part):
    """Catches rewards from bits that fell over, a check of the first part alone, and a cache lost for one byte."""
    write(tmp_path / "cache")
    before = bytes_of(tmp_path / "cache")
    path = tmp_path / "cache" / name
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    with pytest.raises(BrokenCache, match=f"cache: part {part} of 4 does not match its checksum; delete the folder"):
        CriticCache(tmp_path / "cache", LAYOUT, MADE_FOR)
    CriticCache(tmp_path / "cache", LAYOUT, MADE_FOR, verify=False)
    assert write(tmp_path / "cache") == [part - 1]
    assert f"part {part} of 4 does not match its checksum; it is made again" in capsys.readouterr().err
    assert bytes_of(tmp_path / "cache") == before


@pytest.mark.parametrize("size", [0, 10])
def test_a_short_file_is_found(tmp_path, size):
    """Catches a memory map past the end of a file that a copy cut short."""
    write(tmp_path / "cache")
    os.truncate(tmp_path / "cache/ids.bin", size)
    with pytest.raises(BrokenCache, match=rf"ids.bin has {size} of 168 bytes; delete the folder"):
        CriticCache(tmp_path / "cache", LAYOUT, MADE_FOR, verify=False)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"made_for": 1}'])
def test_an_unreadable_record_is_one_line(tmp_path, text):
    """Catches a traceback, and a pass over the files of nobody knows what."""
    write(tmp_path / "cache")
    (tmp_path / "cache/meta.json").write_text(text)
    with pytest.raises(BrokenCache, match=r"cache: meta.json is missing or unreadable .*; delete the folder"):
        CriticCache(tmp_path / "cache", LAYOUT, MADE_FOR)
    with pytest.raises(BrokenCache, match="unreadable"):
        write(tmp_path / "cache")


@pytest.mark.parametrize(
    ("layout", "made_for", "message"),
    [
        (CacheLayout(7, 4, 3, 301), MADE_FOR, "made for vocab_size = 300, not for 301"),
        (CacheLayout(7, 5, 3, 300), MADE_FOR, "made for block_size = 4, not for 5"),
        (CacheLayout(7, 4, 2, 300), MADE_FOR, "made for top = 3, not for 2"),
        (CacheLayout(8, 4, 3, 300), MADE_FOR, "made for windows = 7, not for 8"),
        (LAYOUT, {"corpus": "xyz", "critic.kind": "ngram"}, "made for corpus = 'abc', not for 'xyz'"),
        (LAYOUT, {"corpus": "abc", "critic.kind": "ngram", "seed": 1}, "made for seed = None, not for 1"),
    ],
    ids=str,
)
def test_what_it_was_not_made_for_is_refused(tmp_path, layout, made_for, message):
    """Catches a folder that was copied or renamed and passes for another's; every fact also makes another name."""
    write(tmp_path / "cache")
    with pytest.raises(ConfigError, match=message):
        CriticCache(tmp_path / "cache", layout, made_for)
    with pytest.raises(ConfigError, match=message):
        CacheWriter(tmp_path / "cache", layout, made_for).begin()
    assert cache_folder(tmp_path, layout, made_for) != cache_folder(tmp_path, LAYOUT, MADE_FOR)
    assert cache_folder(tmp_path, LAYOUT, dict(reversed(MADE_FOR.items()))) == cache_folder(tmp_path, LAYOUT, MADE_FOR)


def test_a_full_disk_is_found_before_the_first_byte(tmp_path, small_parts, monkeypatch):
    """Catches hours of a critic's work for a cache that never fits, and room asked for twice when it continues."""
    usage = namedtuple("usage", "total used free")

    def free(count: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, count))

    free(LAYOUT.total_bytes - 1)
    with pytest.raises(ConfigError, match=r"cache needs 0.000 GB more and its disk .* --run.out-dir or a smaller"):
        write(tmp_path / "below/cache")
    assert list(tmp_path.iterdir()) == []
    free(LAYOUT.total_bytes)
    assert CacheWriter(tmp_path / "cache", LAYOUT, MADE_FOR).begin() == LAYOUT.total_bytes
    write(tmp_path / "cache", until=3)
    free(LAYOUT.window_bytes)  # the last part has one window
    assert write(tmp_path / "cache") == [3]


def test_a_disk_that_fills_up_meanwhile(tmp_path, small_parts, monkeypatch):
    """Catches a traceback after half of the pass, and a record of what was not written."""
    write(tmp_path / "cache", until=2)
    before = json.loads((tmp_path / "cache/meta.json").read_text())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(RuntimeError, match=r"cannot be written \(No space left on device\); make room"):
            write(tmp_path / "cache")
    assert json.loads((tmp_path / "cache/meta.json").read_text()) == before
    assert write(tmp_path / "cache") == [2, 3]


def test_a_part_of_another_shape_is_refused(tmp_path):
    """Catches a pass that stores fewer tokens or windows than the layout says."""
    writer, (ids, log_probs) = CacheWriter(tmp_path / "cache", LAYOUT, MADE_FOR), content(LAYOUT)
    writer.begin()
    for wrong in ((ids[:6], log_probs[:6]), (ids, log_probs[..., :2])):
        with pytest.raises(ValueError, match=r"has shape \(7, 4, 3\)"):
            writer.write(0, *wrong)
