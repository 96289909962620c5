"""Lets integration tests share helper modules, by name in the tests and as `tests.integration.…` in child processes."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [p for p in (str(HERE), str(HERE.parents[1])) if p not in sys.path]
