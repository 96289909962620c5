"""Compiled programs kept on disk between runs, because a run on a laptop would spend its first minute compiling.

Left out: cleaning the folder up; JAX's own `jax_compilation_cache_max_size` does that for whoever sets it.
"""

from __future__ import annotations

from pathlib import Path

import jax

# JAX's default of a second would leave out most of a tiny model's programs.
_WORTH_KEEPING_SECONDS = 0.3


def enable(folder: str) -> None:
    """Reads and writes compiled programs in `folder` (`trainer.compile_cache`; ~ is expanded); "" changes nothing."""
    if not folder:
        return
    jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING_SECONDS)
