"""The health monitor: what it measures, when it speaks, and that it catches the collapse which it is there for."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

import train_core
from avatarl.objective import CrossEntropy
from bootstrap.health import MEMORY, HealthMonitor, measure
from bootstrap.thresholds import SIGNS, Sign
from tests.tiny_train import before_step, crash, flags, here, lines, trained
from training.evaluation import Tally

WELL = {"health/ece": 0.05, "health/confidence_gap": 0.01, "health/entropy": 1.5, "train/grad_norm": 1.0}


def test_measured_on_a_batch_is_what_validation_measures():
    """Catches other bins, or a gap with the wrong sign, than val/ece has; and an entropy that is NaN at certainty."""
    logits = 3 * torch.randn(4000, 20, generator=torch.Generator().manual_seed(0))
    gold = torch.randint(20, (4000,), generator=torch.Generator().manual_seed(1))
    found = measure(logits.log_softmax(-1), gold)
    tally = Tally.zero(15)
    tally.add(logits, gold)
    assert found["health/ece"].item() == pytest.approx(tally.metrics(1)["val/ece"], abs=1e-5)
    confidence, right = logits.softmax(-1).max(-1).values.mean(), (logits.argmax(-1) == gold).float().mean()
    torch.testing.assert_close(found["health/confidence_gap"], confidence - right)
    torch.testing.assert_close(found["health/entropy"], torch.distributions.Categorical(logits=logits).entropy().mean())
    sure = torch.full((3, 4), -math.inf).index_fill_(1, torch.tensor([2]), 0.0)
    assert [v.item() for v in measure(sure, torch.tensor([2, 2, 0])).values()] == pytest.approx([1 / 3, 1 / 3, 0])


@pytest.mark.parametrize("decisions", [64, 256, 2048])
def test_small_batches_are_no_illness(decisions):
    """Catches a calibration error that is chance: of a calibrated policy the median of three must stay below the
    threshold (false alarm below 1 in 10^6)."""
    draw = torch.Generator().manual_seed(decisions)
    log_pi = torch.randn(decisions, 65, generator=draw).mul(1.5).log_softmax(-1)
    errors = [
        measure(log_pi, torch.multinomial(log_pi.exp(), 1, generator=draw)[:, 0])["health/ece"].item()
        for _ in range(60)
    ]
    assert max(errors) < SIGNS["health/ece"].warn


def lasting(monitor: HealthMonitor, times: int = 3, **changed: float) -> list[str]:
    """What the monitor says when a line comes several times; ece=… stands for health/ece."""
    line = WELL | {(f"health/{k}" if k != "norm" else "train/grad_norm"): v for k, v in changed.items()}
    return [text for _ in range(times) for text in monitor.observe(line).warnings]


def test_each_change_is_said_once():
    """Catches a warning at every line, none when it gets worse, and silence when all is well again."""
    monitor = HealthMonitor()
    assert lasting(monitor, 6) == []
    said = lasting(monitor, 6, ece=0.25)
    assert len(said) == 1 and "calibration error is 0.25, above 0.2 (warn)" in said[0]
    seen = monitor.observe(WELL | {"health/ece": 0.25})
    assert seen.metrics["health/status"] == 1 and seen.shown == "warn: calibration error"
    said = lasting(monitor, 6, ece=0.5, entropy=0.01)
    assert len(said) == 2 and "above 0.35 (bad)" in said[0] and "entropy is 0.01, below 0.1 (bad)" in said[1]
    assert monitor.observe(WELL | {"health/ece": 0.5, "health/entropy": 0.01}).metrics["health/status"] == 2
    said = lasting(monitor, 6)
    assert len(said) == 2 and all("well again" in text for text in said)
    assert monitor.observe(WELL).shown == "ok"


def test_one_odd_batch_is_no_illness():
    """Catches a state that flickers with the noise of single batches."""
    monitor = HealthMonitor()
    lasting(monitor, 3)
    for i in range(9):
        assert lasting(monitor, 1, ece=0.9 if i % 3 == 0 else 0.1) == []


def test_gradients_are_compared_with_their_own_past():
    """Catches a spike that is judged against itself, and thresholds that depend on the model's size."""
    for scale in (1e-3, 1e4):
        monitor = HealthMonitor()
        first = [monitor.observe({"train/grad_norm": scale * x}).metrics for x in (1, 2, 1, 2, 1)]
        assert all("health/grad_spike" not in metrics for metrics in first)
        assert monitor.observe({"train/grad_norm": scale * 4}).metrics["health/grad_spike"] == pytest.approx(4)
        seen = monitor.observe({"train/grad_norm": scale * 30})
        assert seen.metrics == {"health/grad_spike": pytest.approx(30), "health/status": 2}
        assert "gradient norm over its median is 30, above 20 (bad)" in seen.warnings[0]
        assert "well again" in monitor.observe({"train/grad_norm": scale}).warnings[0]
        for bad in (math.nan, math.inf):
            assert monitor.observe({"train/grad_norm": bad}).metrics["health/grad_spike"] == math.inf
        assert monitor.observe({"train/grad_norm": scale}).metrics["health/grad_spike"] == pytest.approx(1, abs=0.5)


def test_not_a_number_is_bad():
    """Catches a policy of NaN that counts as well, as NaN is above no threshold."""
    monitor = HealthMonitor()
    lasting(monitor, 3)
    assert any("(bad)" in text for text in lasting(monitor, 3, ece=math.nan))
    assert Sign("", 1, 2, 1, "").state(math.nan) == "bad"


@pytest.mark.parametrize("sign", SIGNS.values(), ids=SIGNS)
def test_thresholds_are_edges(sign):
    """Catches an entropy that is judged upside down, and a threshold that belongs to neither side."""
    step = 0.01 if sign.worse == "above" else -0.01
    values = [sign.warn - step, sign.warn, sign.bad - step, sign.bad, sign.bad + step]
    assert [sign.state(v) for v in values] == ["ok", "warn", "warn", "bad", "bad"]


def test_what_is_not_measured_is_not_judged():
    """Catches a missing key that counts as 0, which for an entropy is bad."""
    seen = HealthMonitor().observe({"train/loss": 1.0})
    assert seen.metrics == {"health/status": 0.0} and seen.warnings == []


def test_a_resumed_monitor_goes_on():
    """Catches a resume that warns again, or that has lost the norms to compare with."""
    draw = np.random.default_rng(0)
    story = [{k: v * draw.uniform(0.2, 5) for k, v in WELL.items()} for _ in range(MEMORY + 20)]
    whole, first, second = HealthMonitor(), HealthMonitor(), HealthMonitor()
    told = [whole.observe(line) for line in story]
    again = [first.observe(line) for line in story[:30]]
    second.load_state_dict(first.state_dict())
    assert again + [second.observe(line) for line in story[30:]] == told
    assert len(Counter(seen.metrics["health/status"] for seen in told)) > 1


class Bigrams:
    """A table of logits that learns from pairs of a text: the smallest policy that can collapse."""

    def __init__(self, text: np.ndarray, vocab_size: int) -> None:
        self.text, self.logits = torch.from_numpy(text), torch.zeros(vocab_size, vocab_size, requires_grad=True)
        self.adam = torch.optim.Adam([self.logits], lr=0.3)
        self.draw = torch.Generator().manual_seed(0)

    def step(self, exact_policy_gradient: bool) -> dict[str, float]:
        """Learn from 512 pairs; the line of metrics that a run would write."""
        at = torch.randint(len(self.text) - 1, (512,), generator=self.draw)
        gold = self.text[at + 1]
        log_pi = self.logits[self.text[at]].log_softmax(-1)  # (N, V)
        chosen = log_pi.gather(1, gold[:, None])
        loss: Tensor = -(chosen.exp() if exact_policy_gradient else chosen).mean()
        self.adam.zero_grad()
        loss.backward()
        assert self.logits.grad is not None
        norm = self.logits.grad.norm().item()
        self.adam.step()
        return {"train/grad_norm": norm} | {k: v.item() for k, v in measure(log_pi.detach(), gold).items()}


@pytest.mark.parametrize("collapsing", [True, False])
def test_the_collapse_is_caught_in_time(collapsing, shakespeare):
    """Catches thresholds that the collapse of exhaustive exploration (exact policy gradient, gold alone rewarded)
    does not cross within 200 steps, and ones that healthy learning crosses."""
    text = np.unique(np.frombuffer(shakespeare[:100_000].encode("utf-32-le"), np.uint32), return_inverse=True)[1]
    policy, monitor, worst = Bigrams(text, 65), HealthMonitor(), 0.0
    for step in range(200):
        line = policy.step(collapsing)
        if step % 20 == 19:  # as often as a run logs
            worst = max(worst, monitor.observe(line).metrics["health/status"])
    assert worst == (2 if collapsing else 0)
    assert (line["health/ece"] > 0.4) == collapsing


def test_the_loop_asks_and_says(place, monkeypatch):
    """Catches a monitor that the loop forgets, a state that is lost in a resume, and warnings on the output stream."""
    init = CrossEntropy.__init__

    def watched(self: CrossEntropy, *words, **options) -> None:
        init(self, *words, **options)
        self.monitor = HealthMonitor()

    monkeypatch.setattr(CrossEntropy, "__init__", watched)
    clip, steps = train_core.clip_gradients, Counter[str]()

    def spiking(*words):
        steps["done"] += 1
        return clip(*words) * (100 if steps["done"] == 7 else 1)

    monkeypatch.setattr(train_core, "clip_gradients", spiking)
    run = trained("run", "protocol-pretrain")
    found = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    status = {n["step"]: n["health/status"] for n in found if "health/status" in n}
    assert status == {1: 0, 2: 0, 3: 0, 4: 0, 5: 0, 6: 0, 7: 2, 8: 0}
    assert [n["step"] for n in found if "health/grad_spike" in n] == [6, 7, 8]

    steps["done"] = 0
    settings = flags(data_corpus="corpus.txt", run_name="again", train_checkpoint_every=4)
    with before_step(5, crash):
        assert here("protocol-pretrain", *settings).code == 1
    steps["done"] = 4
    outcome = here("--resume", "runs/again")
    assert outcome.code == 0 and lines(run) == lines(place / "runs" / "again")
    assert "warning: step 7: gradient norm over its median is" in outcome.err and "(bad)" in outcome.err
    assert "gradient norm over" not in outcome.out


def test_what_is_no_number_is_bad_on_either_side():
    """Catches a collapse into NaN that ends the run with an index error, or that is called well again."""
    found = measure(torch.full((64, 5), math.nan), torch.zeros(64, dtype=torch.long))
    assert all(math.isnan(value) for value in found.values())
    monitor = HealthMonitor()
    for _ in range(3):
        seen = monitor.observe({**WELL, **{key: float(value) for key, value in found.items()}})
    assert seen.shown.startswith("bad: ") and all(SIGNS[key].name in seen.shown for key in found)
