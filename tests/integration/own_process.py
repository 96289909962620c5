"""Runs a function of a test module in a process of its own: the number of emulated devices is fixed before jax starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def printed_by(module: str, function: str) -> str:
    """What `module.function()` prints; fails with the end of its traceback where it raises."""
    paths = [str(TESTS.parent), str(TESTS / "unit"), str(TESTS / "integration")]
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}; {module}.{function}()"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
