"""Signals that ask training to stop at the next step boundary."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

ECHO_SECONDS = 5.0
"""Under torchrun, which passes on what Ctrl-C or a scheduler sent to all processes, a signal comes twice."""


class StopRequest:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a request that the loop answers between two steps.

    A second signal ends the process at once with 128 + its number; under torchrun, one that comes ECHO_SECONDS after
    the first or later. Without `catch()` nothing is ever requested.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        self._since = 0.0

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return bool(self.signal_name)

    @contextmanager
    def catch(self) -> Iterator[Self]:
        """Handle the signals while the block runs; the handlers before are put back."""
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, self._receive) for number in signals}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self._since < ECHO_SECONDS:
                return
            os._exit(128 + number)
        self._since = time.monotonic()
        self.signal_name = signal.Signals(number).name
