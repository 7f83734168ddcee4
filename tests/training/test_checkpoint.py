"""Checkpoints: whole or not there, the right ones kept, and every kind of damage named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from avatarl.objective import CrossEntropy
from config import ConfigError, ModelConfig, OptimConfig
from data.batches import Batch
from model import GPT
from tests.tiny_train import files_below, same
from training import checkpoint as checkpoints
from training.checkpoint import BrokenCheckpoint, TrainState, find
from training.distributed import World
from training.optim import build_optimizers


class Trainee:
    """A tiny model with its optimisers, which learns from random tokens and saves itself."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.folder = folder
        self.objective = CrossEntropy(GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=4), 5))
        self.optimizers = build_optimizers(self.objective, OptimConfig(name="muon"))
        self.state = TrainState()

    def learn(self) -> None:
        tokens = torch.randint(5, (2, 5), generator=torch.Generator().manual_seed(self.state.step))
        loss, _ = self.objective(Batch(tokens[:, :-1], tokens[:, 1:], None, torch.arange(2)), 0, {}, False)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.objective.zero_grad()
        self.state.step += 1

    def save(self, keep: int = 2) -> Path:
        return checkpoints.save(self.folder, self.objective, self.optimizers, self.state, World(), keep=keep)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.objective.student.state_dict().items()}


@pytest.fixture
def trainee(tmp_path: Path) -> Trainee:
    return Trainee(tmp_path / "checkpoints")


def saved_at(trainee: Trainee, step: int, val_ce: float | None = None, keep: int = 2) -> Path:
    """A checkpoint at `step`, measured there when `val_ce` is given."""
    trainee.learn()
    trainee.state.step = step
    if val_ce is not None:
        trainee.state.val_ce, trainee.state.val_step = val_ce, step
    return trainee.save(keep)


def test_a_loaded_state_goes_on_as_the_saved_one(trainee):
    """Catches weights, momenta, rates or counters that do not come back, on fresh optimisers that never stepped."""
    trainee.learn()
    trainee.state.bad_steps, trainee.state.seconds = 3, 1.5
    place = trainee.save()
    other = Trainee(trainee.folder, seed=1)
    assert not same(trainee.weights(), other.weights())
    other.state = checkpoints.load(place, other.objective, other.optimizers)
    assert other.state == trainee.state
    for _ in range(2):
        trainee.learn()
        other.learn()
    assert same(trainee.weights(), other.weights())


def test_the_weights_are_plain_safetensors(trainee):
    """Catches a head stored twice, or names that only this project's training can read."""
    place = saved_at(trainee, 1)
    stored = load_file(place / "model.safetensors")
    assert same(stored, trainee.weights())
    assert not any("head" in name for name in stored)


def test_pointers_name_the_newest_and_the_best(trainee):
    """Catches a best that follows the newest, or an old loss that is taken for the present one."""
    saved_at(trainee, 1, val_ce=2.0)
    saved_at(trainee, 2, val_ce=1.0)
    saved_at(trainee, 3, val_ce=1.5)
    saved_at(trainee, 4)  # not measured here: the 1.5 belongs to step 3
    pointers = [(trainee.folder / name).read_text() for name in ("latest", "best")]
    assert pointers == ["step-000004\n", "step-000002\n"]
    assert find(trainee.folder).name == "step-000004"
    assert find(trainee.folder, "best").name == "step-000002"
    assert find(trainee.folder, "step-000003").name == "step-000003"


def test_a_loss_that_is_no_number_is_never_the_best(trainee):
    """Catches a first evaluation of NaN, below which no later loss counts as lower."""
    saved_at(trainee, 1, val_ce=float("nan"))
    saved_at(trainee, 2, val_ce=2.0)
    assert find(trainee.folder, "best").name == "step-000002"


def test_best_of_a_run_that_was_never_measured(trainee):
    """Catches a crash of sample.py on a run that was stopped before its first evaluation."""
    saved_at(trainee, 1)
    assert find(trainee.folder, "best").name == "step-000001"


def test_pruning_keeps_the_newest_and_the_best(trainee):
    """Catches a disk that fills up, and a best checkpoint that is deleted."""
    for step, loss in ((1, 1.0), (2, 3.0), (3, 2.5), (4, 2.0), (5, 1.5)):
        saved_at(trainee, step, val_ce=loss, keep=2)
    assert [p.name for p in checkpoints.stored(trainee.folder)] == ["step-000001", "step-000004", "step-000005"]


def test_a_kill_between_a_checkpoint_and_its_pointers_costs_no_best_one(trainee):
    """Catches the best checkpoint pruned because `best` still names the one before, as a kill can leave it."""
    saved_at(trainee, 1, val_ce=3.0, keep=1)
    before = (trainee.folder / "best").read_text()
    saved_at(trainee, 2, val_ce=2.0, keep=2)
    (trainee.folder / "best").write_text(before)
    saved_at(trainee, 3, val_ce=2.5, keep=1)
    assert [p.name for p in checkpoints.stored(trainee.folder)] == ["step-000002", "step-000003"]
    assert find(trainee.folder, "best").name == "step-000002"


def test_steps_past_a_million_are_in_order(trainee):
    """Catches names sorted as text, where step-1000000 comes before step-999999."""
    saved_at(trainee, 999_999, keep=1)
    saved_at(trainee, 1_000_000, keep=1)
    assert [p.name for p in trainee.folder.glob("step-*")] == ["step-1000000"]
    saved_at(trainee, 1_000_001)
    assert find(trainee.folder).name == "step-1000001"


DAMAGE = {
    "truncated weights": (lambda p: (p / "model.safetensors").write_bytes(b"short"), "model.safetensors has 5 of"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "model.safetensors is missing"),
    "state file missing": (lambda p: (p / "state/__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "no meta": (lambda p: (p / "meta.json").unlink(), "meta.json is missing or unreadable"),
    "torn meta": (lambda p: (p / "meta.json").write_text('{"state": '), "meta.json is missing or unreadable"),
    "foreign meta": (lambda p: (p / "meta.json").write_text("[]"), "meta.json is missing or unreadable"),
}


@pytest.mark.parametrize(("damage", "what"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_broken_checkpoint_is_named_and_skipped(trainee, capsys, damage, what):
    """Catches damage that goes unnoticed, is not named, or costs the checkpoint before it."""
    saved_at(trainee, 1)
    newest = saved_at(trainee, 2)
    damage(newest)
    assert find(trainee.folder).name == "step-000001"
    said = capsys.readouterr().err
    assert said.startswith("warning: ") and said.count("\n") == 1
    assert str(newest) in said and what in said
    with pytest.raises(BrokenCheckpoint, match="step-000002"):
        find(trainee.folder, "step-000002")
    damage(trainee.folder / "step-000001")
    with pytest.raises(BrokenCheckpoint, match="none of its 2 checkpoints is whole"):
        find(trainee.folder)


def test_a_best_checkpoint_that_is_broken_is_no_other(trainee):
    """Catches numbers reported for `best` that come from another checkpoint."""
    best = saved_at(trainee, 1, val_ce=1.0)
    saved_at(trainee, 2, val_ce=2.0)
    (best / "model.safetensors").write_bytes(b"")
    with pytest.raises(BrokenCheckpoint, match="step-000001"):
        find(trainee.folder, "best")


@pytest.mark.parametrize("name", ["model.safetensors", "state/__0_0.distcp", "state/.metadata"])
def test_damage_that_keeps_the_size_is_one_line(trainee, name):
    """Catches the libraries' own exceptions (one of them no Exception at all) and their traces of many lines."""
    place = saved_at(trainee, 1)
    (place / name).write_bytes(b"\0" * (place / name).stat().st_size)
    meta = json.loads((place / "meta.json").read_text())
    (place / "meta.json").write_text(json.dumps(meta | {"crc32": {}}))  # as if the checksums had matched
    with pytest.raises(BrokenCheckpoint, match="cannot be loaded") as caught:
        checkpoints.load(place, trainee.objective, trainee.optimizers)
    assert str(place) in str(caught.value) and "\n" not in str(caught.value)


def test_another_shape_is_one_line(trainee):
    """Catches torch's list of every mismatched tensor where one line says it."""
    place = saved_at(trainee, 1)
    with pytest.raises(BrokenCheckpoint, match="cannot be loaded") as caught:
        checkpoints.load_weights(place, GPT(ModelConfig(n_layer=1, n_head=1, n_embd=16, block_size=4), 5))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "part",
    ["training.checkpoint.save_file", "training.checkpoint.write_json", "torch.distributed.checkpoint.save"],
)
def test_a_save_that_fails_leaves_what_was_there(trainee, monkeypatch, part):
    """Catches a full disk that leaves half a checkpoint, or takes the one before with it."""
    saved_at(trainee, 1, val_ce=1.0)
    before = files_below(trainee.folder)

    def full(*rest: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(part, full)
    with pytest.raises(RuntimeError, match=r"step-000002.*No space left"):
        saved_at(trainee, 2, val_ce=0.5)
    assert files_below(trainee.folder) == before
    assert find(trainee.folder).name == "step-000001"


def test_left_overs_of_a_killed_save_are_cleared(trainee):
    """Catches hidden folders that a run leaves at every interruption."""
    (trainee.folder / ".step-000001" / "state").mkdir(parents=True)
    saved_at(trainee, 2)
    assert not (trainee.folder / ".step-000001").exists()


def test_sizes_cover_every_file(trainee):
    """Catches files that are written but not checked, so that their loss is found only at a crash."""
    place = saved_at(trainee, 1)
    listed = set(json.loads((place / "meta.json").read_text())["sizes"])
    assert listed == {str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()} - {"meta.json"}


def test_altered_bytes_are_found_and_skipped(trainee, capsys):
    """Catches a checkpoint that has its size and not its content, which would be resumed from."""
    saved_at(trainee, 1)
    newest = saved_at(trainee, 2) / checkpoints.WEIGHTS
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    assert find(trainee.folder).name == "step-000001"
    assert "step-000002: model.safetensors does not match its checksum" in capsys.readouterr().err


def test_no_checkpoint_there(tmp_path):
    """Catches a traceback on a folder that is empty, absent, or lacks the step that was asked for."""
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="no checkpoint there yet"):
            find(folder)
    trainee = Trainee(tmp_path)
    saved_at(trainee, 1)
    with pytest.raises(ConfigError, match=r"'step-9'.*there are step-000001"):
        find(tmp_path, "step-9")


def test_generators_are_keyed_by_seed_step_and_rank():
    """Catches keys that collide between neighbours: rank 1 of a step must not draw what rank 0 of the next does."""
    drawn = set()
    for seed in (1337, 1338):
        for step in (0, 1, 2):
            for rank in (0, 1, 7):
                checkpoints.seed_everything(seed, step, rank, torch.device("cpu"))
                drawn.add(tuple(torch.rand(4).tolist()))
    assert len(drawn) == 18
