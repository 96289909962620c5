"""Whether a running Rollout call still lives: when it was last heard, and when it last got on.

Left out: what to do about one that does not, which is the caller's business.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from rollout import bridge_pb2 as pb


@dataclass
class Pulse:
    """Times are time.monotonic()'s. `note` is called as an event arrives, whenever it is looked at."""

    heard: float = field(default_factory=time.monotonic)
    progressed: float = field(default_factory=time.monotonic)
    last: tuple[int, int] = (0, 0)

    def note(self, event: pb.RolloutEvent) -> None:
        self.heard = time.monotonic()
        counts = (event.progress.finished, event.progress.tokens)
        if event.WhichOneof("event") != "progress" or counts != self.last:
            self.progressed = self.heard
        if event.WhichOneof("event") == "progress":
            self.last = counts

    def overdue(self, silence: float, stall: float) -> str:
        """Why the call counts as dead after so many seconds without a word, or without getting on; else empty."""
        now = time.monotonic()
        if now - self.heard > silence:
            return f"has been silent for {now - self.heard:.0f} s, heartbeat included"
        if now - self.progressed > stall:
            return (
                f"has brought neither an episode nor a token for {now - self.progressed:.0f} s (bridge.stall_timeout)"
            )
        return ""
