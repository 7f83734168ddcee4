"""What is timed as a training step is one."""

import pytest
import torch

from benchmarks import step, trainers
from benchmarks.step import Case, compare, step_arms
from benchmarks.timing import settle
from benchmarks.trainers import PlainLoop, read_text, trainer
from config import ConfigError, override
from tests.benchmarks.conditions import TINY, conditions
from train_core import fit, learn


@pytest.fixture
def text(corpus):
    """The generated text in characters."""
    return read_text(str(corpus), "char", TINY.block)


def test_a_step_is_what_a_run_does(text, tmp_path, monkeypatch, place):
    """Catches a timed step that leaves out or adds something: rate, batch, clipping, the student's past."""
    c = conditions(tmp_path)
    config = TINY.config(
        c, train={"objective": "avatarl", "steps": 6}, critic={"kind": "self"}, optim={"warmup_steps": 2}
    )
    config = override(config, eval={"sample_tokens": 0, "every": 0}, method={"top_k": 4})
    hardware, _ = settle(c)
    ours, whole = (trainer(config, text, hardware, c) for _ in range(2))
    for _ in range(6):
        ours.step()
    assert fit(whole.job) == 0
    mine, theirs = (t.job.objective.state_dict() for t in (ours, whole))
    assert any(name.startswith("past.") for name in mine)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_the_plain_loop_trains_the_same_model_on_the_same_text(text, tmp_path):
    """Catches a baseline with other weights, batches, rates or loss, whose speed would compare nothing."""
    c = conditions(tmp_path)
    config, (hardware, _) = TINY.config(c), settle(c, dtype="float32")
    ours, plain = trainer(config, text, hardware, c), PlainLoop(config, text, c.device)
    losses = [(ours.step().item(), plain.step().item()) for _ in range(8)]
    assert losses[-1][0] != losses[0][0]
    for mine, theirs in losses:
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert ours.flops == plain.flops > 0


def test_every_arm_trains_a_model_of_its_own(quick, corpus, text, tmp_path, monkeypatch):
    """Catches an arm that does nothing, trains its neighbour's model, or is compared with an arm that is not there."""
    arms = step_arms(Case(TINY, critic=TINY, corpus=str(corpus)), text, conditions(tmp_path))
    names = [arm.name for arm in arms]
    assert len(set(names)) == len(arms) >= 9
    assert {b for arm in arms for b in arm.baselines} <= set(names)
    for kind in ("n-gram", "cached", "past", "model"):
        assert any(kind in name for name in names)
    trained = []

    def watched(job, *rest, **options):
        before = job.objective.student.wte.weight.clone()
        outcome = learn(job, *rest, **options)
        trained.append(job)
        assert not torch.equal(job.objective.student.wte.weight, before)
        return outcome

    monkeypatch.setattr(trainers, "learn", watched)
    for arm in arms:
        assert arm.flops > 0
        arm.run()
    assert (
        len(trained) == len({id(job.objective.student) for job in trained}) == len(arms) - 1
    )  # all but the plain loop


def test_the_cached_arm_reads_its_cache(corpus, text, tmp_path):
    """Catches a cached critic that is asked live, or a live one under the cached one's name."""
    arms = {a.name: a for a in step_arms(Case(TINY, TINY, str(corpus)), text, conditions(tmp_path))}
    for name, judged in (("AvataRL, cached critic", True), ("AvataRL, n-gram critic", False)):
        made = arms[name].run.__self__  # type: ignore[attr-defined]
        made.step()
        assert (made.micros[0].judged is not None) == judged


def test_a_step_that_was_skipped_is_no_timing(text, tmp_path):
    """Catches NaN weights that make every later step a fast one."""
    c = conditions(tmp_path)
    made = trainer(TINY.config(c), text, settle(c)[0], c)
    with torch.no_grad():
        made.job.objective.student.wte.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        made.step()


def test_a_table_of_steps(quick, corpus, text, tmp_path):
    """Catches rates without tokens, and speeds relative to another arm than the plain loop."""
    table = compare(Case(TINY, TINY, str(corpus)), text, conditions(tmp_path), 1.0)
    assert all(len(row.seconds) == 3 and not row.failed for row in table.rows)
    assert (table.unit, table.work, table.reference) == ("tokens", 64, "plain loop")
    assert table.facts["vocab_size"] == text.tokenizer.vocab_size


def test_no_text_stands_in_for_a_missing_one(monkeypatch, tmp_path):
    """Catches a benchmark that silently runs on the embedded corpus (DESIGN section 10)."""
    monkeypatch.setenv("AVATARL_DATA", str(tmp_path))
    with pytest.raises(ConfigError, match=r"nowhere-to-be-found.*real text.*AVATARL_DATA"):
        read_text("nowhere-to-be-found", "char", 8)
    with pytest.raises(ConfigError, match="refuse"):
        read_text("pydoc", "char", 8)


def test_only_an_optional_text_may_be_missing(monkeypatch, tmp_path, corpus):
    """Catches a lost table that nobody is told of, and a missing tinyshakespeare that is skipped."""
    monkeypatch.setenv("AVATARL_DATA", str(tmp_path))
    (table,) = step.tables(conditions(tmp_path), [Case(TINY, TINY, "no-such-corpus", optional=True)])
    assert table.rows == [] and "skipped" in table.notes[0] and "no-such-corpus" in table.notes[0]
    with pytest.raises(ConfigError, match="no-such-corpus"):
        list(step.tables(conditions(tmp_path), [Case(TINY, TINY, "no-such-corpus")]))
