"""The table for H100s, against numbers worked out by hand."""

import dataclasses

import pytest

from config import preset
from forecasting import h100
from forecasting.workload import count

WORK = count(preset("avatarl-250m"))
# 100 M parameters, 48 sequences of 1,000 tokens a step, 1 GFLOP a token: 4.8e13 FLOP a step.
PLAIN = dataclasses.replace(
    WORK,
    parameters=100_000_000,
    steps=1000,
    batch_size=48,
    micro_batch=6,
    tokens_per_step=48_000,
    student_flops=0.8e9,
    critic_flops=0.2e9,
    forward_flops=0.3e9,
    evaluations=3,
    val_tokens=1e6,
)


def test_a_step_is_compute_and_one_exchange():
    """Catches a forgotten utilisation, GPU count, ring factor, optimiser, or the slower links between nodes."""
    step = 4.8e13 / (989e12 * 0.4)  # 121.3 ms
    adamw = 28e8 / 3.35e12  # 0.8 ms
    assert h100.predict(PLAIN, 1).training == pytest.approx(1000 * (step + adamw))
    ring = 2 * 7 / 8 * 4e8 / 450e9 + 14 * 3e-6  # 1.598 ms
    assert h100.predict(PLAIN, 8).training == pytest.approx(1000 * (step / 8 + ring + adamw))
    across = 2 * 1 / 2 * 4e8 / 8 / 50e9 + 2 * 10e-6  # 1.02 ms: an eighth through each of eight ports
    assert h100.predict(PLAIN, 16).training == pytest.approx(1000 * (step / 16 + ring + across + adamw))
    assert h100.predict(PLAIN, 8).evaluation == pytest.approx(3 * 1e6 * 0.3e9 / (8 * 989e12 * 0.4))


def test_no_micro_batch_is_faster_than_its_launches():
    """Catches a toy model that an H100 trains in milliseconds."""
    toy = dataclasses.replace(PLAIN, student_flops=1e3, critic_flops=0.0, parameters=0)
    assert h100.predict(toy, 1).training == pytest.approx(1000 * 8 * 5e-3)  # 48 sequences in micro-batches of 6


def test_batches_that_cannot_be_shared_are_named():
    """Catches a prediction for a run that launch refuses."""
    assert h100.obstacle(PLAIN, 16) == ""
    assert h100.obstacle(PLAIN, 32) == "48 sequences do not divide among 32 GPUs; 32 or 64 would"
    assert h100.obstacle(PLAIN, 64) == "48 sequences are less than one for each of 64 GPUs; use at least 64"
    text = h100.table(PLAIN)
    assert [line.split()[0] for line in text[4:]] == ["1", "2", "4", "8", "16", "32", "64"]
    assert text[-2].endswith(h100.obstacle(PLAIN, 32)) and text[-1].endswith(h100.obstacle(PLAIN, 64))
    critic = dataclasses.replace(PLAIN, batch_size=12)
    assert h100.table(PLAIN, [critic])[7].endswith(
        "the critic's 12 sequences do not divide among 8 GPUs; 8 or 16 would"
    )


@pytest.mark.parametrize(("gpus", "accumulated"), [(1, 8), (2, 4), (4, 2), (8, 1), (16, 1)])
def test_accumulation_keeps_the_micro_batch(gpus, accumulated):
    """Catches a micro-batch that outgrows the memory the preset was made for."""
    assert h100.accumulation(PLAIN, gpus) == accumulated


def test_accumulation_finds_a_divisor():
    """Catches 60 sequences in micro-batches of at most 24 split into 2.5 parts."""
    assert h100.accumulation(WORK, 8) == 3 and h100.accumulation(WORK, 1) == 20


def test_the_table_adds_up():
    """Catches a total without evaluation, critic or cache, and dollars of one GPU where eight are paid."""
    lines = h100.table(PLAIN, [PLAIN, PLAIN], extra_flops=989e12 * 0.4 * 3600)
    run = 122.171  # training; an evaluation of three times a million tokens takes 2.275 s
    total = 3 * (run + 2.275) + 3600
    assert lines[4] == (f"{1:>6} {48:>10} {8:>13} {'2 min':>9} {'2.3 s':>11} {'64 min':>13} {'66 min':>9} {'$4':>9}")
    assert total / 3600 * 3.95 == pytest.approx(4.36, abs=0.01)
    alone = h100.table(dataclasses.replace(PLAIN, val_tokens=None))[4].split()
    assert alone[5:7] == ["unknown", "-"]


@pytest.mark.parametrize(
    ("seconds", "gpus", "text"), [(3600, 1, "$4"), (3600, 8, "$32"), (36000, 64, "$2,500"), (60, 1, "< $1")]
)
def test_dollars_have_two_digits(seconds, gpus, text):
    """Catches an estimate to the cent."""
    assert h100.dollars(seconds, gpus) == text


def test_the_price_can_be_replaced():
    """Catches a price that is printed and not used, and an assumed one that passes for the user's."""
    assert h100.dollars(36000, 8, price=10.0) == "$800"
    before, after = h100.table(PLAIN), h100.table(PLAIN, price=10 * 3.95)
    assert "$39.50 per GPU-hour as given with --price" in after[2] and "list price" not in after[2]
    assert "--price sets another" in before[2]
    single = h100.table(dataclasses.replace(PLAIN, steps=100_000))[4].split()[-1]
    tenfold = h100.table(dataclasses.replace(PLAIN, steps=100_000), price=39.5)[4].split()[-1]
    assert float(tenfold.strip("$").replace(",", "")) == pytest.approx(10 * float(single.strip("$")), rel=0.05)


def test_everything_assumed_is_said():
    """Catches a table that could be taken for a measurement."""
    head = " ".join(h100.table(WORK)[:3])
    for what in ("predicted", "never measured", "989 TFLOP/s", "assumed 40%", "450 GB/s", "50 GB/s", "$3.95", "5 ms"):
        assert what in head
    assert "after the backward pass" in head and "May 2026" in head and "both assumed" in head
