"""What is left of the memory, by the machine and by its container, and who asks."""

from pathlib import Path

import pytest

from avatarl import memory, mixed
from config import ConfigError


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of which a test says what it tells."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUPS", ((tmp_path / "max", tmp_path / "current"),))
    return tmp_path


def test_the_tighter_limit_counts(machine):
    """Catches a container's limit that nobody reads, kibibytes taken for bytes, and a limit without what is used."""
    assert memory.memory_left() is None
    (machine / "meminfo").write_text("MemTotal: 90 kB\nMemAvailable:       50 kB\n")
    assert memory.memory_left() == 50 * 1024
    (machine / "max").write_text("max\n")
    (machine / "current").write_text("7\n")
    assert memory.memory_left() == 50 * 1024
    (machine / "max").write_text("107\n")
    assert memory.memory_left() == 100


def test_a_text_that_memory_cannot_hold_is_refused(machine):
    """Catches a critic that the system kills without a word, and one that is refused where there is room."""
    (machine / "meminfo").write_text(f"MemAvailable: {8 * 2**20} kB\n")
    mixed.require_memory(10_000_000)
    with pytest.raises(ConfigError, match=r"20,000,000 tokens takes about 12 GB and 9 GB are left; use"):
        mixed.require_memory(20_000_000)
