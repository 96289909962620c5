"""Contenders of a benchmark that take turns, each a process with an interpreter of its own, so that no framework's
threads, allocator settings or versions touch another's. Needs nothing but Python: TRL and Tunix have environments of
their own.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence


def serve(update: Callable[[], tuple[float, float]]) -> None:
    """In a contender's process: one update for each line on standard input, one JSON line of measurements for each. `update`
    returns loss and gradient norm; what it prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for _ in sys.stdin:
        started, cpu = time.perf_counter(), time.process_time()
        loss, norm = update()
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        answers.write(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak, "loss": loss, "norm": norm}) + "\n")
        answers.flush()


class Contender:
    """A process that serves."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | dict(environment or {}),
        )

    def update(self) -> dict[str, float]:
        """Seconds, CPU seconds, peak RSS in GB, loss and gradient norm of one update."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline() or sys.exit("a contender's process died"))

    def end(self) -> None:
        self.process.communicate()
