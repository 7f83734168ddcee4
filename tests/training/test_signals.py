"""Ctrl-C and SIGTERM: the first is a request, an early second the same one, a late second the end."""

import os
import signal

import pytest

from training import signals
from training.signals import PATIENCE, StopRequest, stop_on_signals


class Exited(Exception):
    """Stands in for the process's end."""


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves, and exits that it sees."""
    now = [100.0]

    def leave(code: int) -> None:
        raise Exited(code)

    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "_exit", leave)
    return now


def test_no_signal_no_code():
    """Catches a run that ends by itself and reports a signal."""
    assert StopRequest().signal is None and StopRequest().exit_code == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_a_request(clock, capsys, number, code):
    """Catches an exit that loses the step, the wrong code, and silence while the step is being finished."""
    request = StopRequest()
    request.receive(number, None)
    assert request.signal == number and request.exit_code == code
    assert "finishing this step" in capsys.readouterr().err


def test_the_same_signal_delivered_twice_is_one(clock):
    """Catches torchrun's second delivery of one Ctrl-C being taken for impatience."""
    request = StopRequest()
    request.receive(signal.SIGINT, None)
    clock[0] += PATIENCE
    request.receive(signal.SIGINT, None)
    assert request.exit_code == 130


def test_a_late_second_signal_ends_at_once(clock):
    """Catches a hanging step that nothing but kill -9 could end."""
    request = StopRequest()
    request.receive(signal.SIGINT, None)
    clock[0] += PATIENCE + 0.01
    with pytest.raises(Exited) as end:
        request.receive(signal.SIGTERM, None)
    assert end.value.args == (143,)


def test_the_block_listens_and_gives_back(clock):
    """Catches handlers that outlive the block, and signals that still end the program inside it."""
    old = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), stop_on_signals() as request:
        signal.raise_signal(signal.SIGTERM)
        assert request.exit_code == 143
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) == old
