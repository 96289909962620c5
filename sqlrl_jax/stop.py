"""Ctrl-C and SIGTERM ask a run to stop; the run stops between two phases of a step, where its state is whole.

With several processes one signal to any of them is enough: they agree, so that all stop after the same step.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

from sqlrl_jax.distributed import World


class Stopped(Exception):
    """Raised where the run can be left safely after a stop was asked for."""


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a request that `check` raises; a second one ends the process at once."""

    def __init__(self, world: World | None = None) -> None:
        self.asked = ""
        self._signalled = False
        self._world = world or World()
        self._world.hear_stop(self._hear)
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}

    def check(self) -> None:
        """Raises Stopped in all processes when one was asked; all must call it at the same point."""
        asked = next((why for why in self._world.gather("stop", self.asked) if why), "")
        if asked:
            raise Stopped(asked)

    def heed(self) -> None:
        """Raises Stopped when this process knows that one was asked: for waits that its processes leave together."""
        if self.asked:
            raise Stopped(self.asked)

    def close(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _hear(self, why: str) -> None:
        self.asked = self.asked or why

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            os._exit(128 + number)
        self._signalled = True
        if not self.asked:  # a scheduler tells all processes at once: one may hear of another's signal before its own
            self.asked = signal.Signals(number).name
            self._world.tell_stop(f"{self.asked} to process {self._world.index}")
        os.write(2, b"\nstopping: saving first; press Ctrl-C again to leave without saving\n")
