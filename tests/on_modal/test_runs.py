"""Runs on the Volume: names that are claimed once, and folders that come back whole or not at all."""

from pathlib import Path

import modal
import pytest
from modal.types import FileEntry, FileEntryType

from config import ConfigError
from on_modal import runs

FILES = {
    "run/config.json": b"{}",
    "run/checkpoints/latest": b"step-000002\n",
    "run/checkpoints/step-000002/model.safetensors": b"weights" * 1000,
    "run/checkpoints/.step-000004/half": b"being written",
    "other/config.json": b"{}",
}


class Volume:
    """A Volume in memory, by modal's own entries. `stale` files do not have the listed size, `gone` ones are gone."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.stale: set[str] = set()
        self.gone: set[str] = set()

    def entry(self, path: str, kind: FileEntryType) -> FileEntry:
        size = len(self.files.get(path, b"")) + (path in self.stale)
        return FileEntry(path, kind, mtime=0, size=size)

    def listdir(self, path: str, *, recursive: bool = False) -> list[FileEntry]:
        inside = path.strip("/")
        found = [p for p in self.files if p.startswith(inside)]
        folders = {str(parent) for p in found for parent in Path(p).parents} - {"."}
        if not recursive:
            return [self.entry(p, FileEntryType.DIRECTORY) for p in sorted(folders) if "/" not in p]
        folders = {p for p in folders if p != inside}
        entries = [self.entry(p, FileEntryType.DIRECTORY) for p in sorted(folders)]
        return entries + [self.entry(p, FileEntryType.FILE) for p in found]

    def read_file(self, path: str):
        if path in self.gone:
            raise FileNotFoundError(path)
        content = self.files[path]
        yield content[:10]
        yield content[10:]


@pytest.fixture
def volume(monkeypatch) -> Volume:
    made = Volume(FILES)
    monkeypatch.setattr(runs, "open_volume", lambda: made)
    return made


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_comes_back_whole(volume, tmp_path, capsys):
    """Catches files that are left out, another run's files, and a checkpoint that was still being written."""
    assert runs.pull("run", tmp_path / "runs") == tmp_path / "runs" / "run"
    expected = {k.removeprefix("run/"): v for k, v in FILES.items() if k.startswith("run/") and ".step" not in k}
    assert files_in(tmp_path / "runs" / "run") == expected
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["run"]
    assert "0.0 MB" in capsys.readouterr().out


def test_absolute_paths_are_understood(volume, tmp_path, monkeypatch):
    """Catches a listing with leading slashes, as some versions give, that copies nothing or outside the folder."""
    plain = volume.entry
    monkeypatch.setattr(
        volume, "entry", lambda path, kind: FileEntry(f"/{path}", kind, mtime=0, size=plain(path, kind).size)
    )
    monkeypatch.setattr(volume, "read_file", lambda path: iter([FILES[path.strip("/")]]))
    runs.pull("run", tmp_path)
    assert "config.json" in files_in(tmp_path / "run")


def test_nothing_is_overwritten(volume, tmp_path):
    """Catches a pull that mixes a run from Modal into one that stands here."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="not overwritten"):
        runs.pull("run", tmp_path)
    assert files_in(tmp_path / "run") == {"mine": b"mine"}


@pytest.mark.parametrize("trouble", ["stale", "gone"])
def test_a_run_that_changes_meanwhile_leaves_nothing(volume, tmp_path, trouble):
    """Catches half a run folder, which looks like a run, after a file grew or went while it was copied."""
    setattr(volume, trouble, {"run/checkpoints/latest"})
    with pytest.raises(RuntimeError, match="checkpoints/latest changed"):
        runs.pull("run", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_not_there_is_named(volume, tmp_path):
    """Catches an empty folder for a mistyped name."""
    with pytest.raises(ConfigError, match=r"pull = 'runn': no such run there; .*modal volume ls avatarl-runs"):
        runs.pull("runn", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_name_is_claimed_once(volume, monkeypatch):
    """Catches two launches within a moment that would train into one folder."""
    claimed = {"run-2"}

    class Claims:
        def put(self, key: str, value: float, *, skip_if_exists: bool) -> bool:
            fresh = key not in claimed
            claimed.add(key)
            assert skip_if_exists
            return fresh

    monkeypatch.setattr(modal.Dict, "from_name", staticmethod(lambda name, create_if_missing: Claims()))
    assert [runs.claim_name("run"), runs.claim_name("new"), runs.claim_name("new")] == ["run-3", "new", "new-2"]


def test_the_real_library_has_what_is_called():
    """Catches a version of modal that renamed what the fakes of these tests stand for."""
    import inspect

    assert "skip_if_exists" in inspect.signature(modal.Dict.put).parameters
    assert "recursive" in inspect.signature(modal.Volume.listdir).parameters
    assert "path" in inspect.signature(modal.Volume.read_file).parameters
    assert "create_if_missing" in inspect.signature(modal.Volume.from_name).parameters
    assert {"FILE", "DIRECTORY"} <= set(FileEntryType.__members__)
