"""Compiled programs: kept on disk between runs, because a run on a laptop would spend its first minute compiling, and
counted, because a run whose shapes change would spend its hours so.

Left out: cleaning the folder up; JAX's own `jax_compilation_cache_max_size` does that for whoever sets it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jax

# JAX's default of a second would leave out most of a tiny model's programs.
_WORTH_KEEPING_SECONDS = 0.3


def enable(folder: str) -> None:
    """Reads and writes compiled programs in `folder` (`trainer.compile_cache`; ~ is expanded); "" changes nothing."""
    if not folder:
        return
    jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING_SECONDS)


class Counter:
    """How many programs this process has compiled, or read from disk, since the counter was made: all of them, also
    where JAX compiles again without tracing again, for another sharding."""

    def __init__(self) -> None:
        self.programs = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        self.programs += event == "/jax/core/compile/backend_compile_duration"


@cache
def counter() -> Counter:
    """The process's one counter; it counts from the first call."""
    return Counter()
