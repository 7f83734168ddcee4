"""Ctrl-C and SIGTERM: finish the step, save, then leave; a second signal leaves at once.

torchrun and shells may deliver one Ctrl-C twice, so only a signal more than two seconds after the first
counts as the second.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

PATIENCE = 2.0


class StopRequest:
    """Whether, and by which signal, the run was asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM: whoever launched the run then knows that it is incomplete."""
        return 128 + self.signal if self.signal else 0

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; exit at once on a later one."""
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), time.monotonic()
            print(f"\n{self.signal.name}: finishing this step, then saving …", file=sys.stderr, flush=True)
        elif time.monotonic() - self._since > PATIENCE:
            os._exit(128 + number)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the block SIGINT and SIGTERM are requests; afterwards the old handlers are back."""
    request = StopRequest()
    old = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        old[number] = signal.signal(number, request.receive)
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
