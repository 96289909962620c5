"""Ctrl-C and SIGTERM ask a run to stop; the run stops between two phases of a step, where its state is whole."""

from __future__ import annotations

import os
import signal
from types import FrameType


class Stopped(Exception):
    """Raised where the run can be left safely after a stop was asked for."""


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a request that `check` raises; a second one ends the process at once."""

    def __init__(self) -> None:
        self.asked = ""
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}

    def check(self) -> None:
        if self.asked:
            raise Stopped(self.asked)

    def close(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = signal.Signals(number).name
        os.write(2, b"\nstopping: saving first; press Ctrl-C again to leave without saving\n")
