"""How the processes of one learner agree on what they read, and that all of them have written: texts that all get.

All processes must call the same functions in the same order. A run gives its own connection between them as the exchange
(distributed.py); the one here needs nothing but jax. Left out: large values, which belong into arrays or files.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

Exchange = Callable[[str], list[str]]
"""Gives every process's text, by process."""


def exchange(text: str) -> list[str]:
    """An Exchange over the devices. With one process: the text."""
    if jax.process_count() == 1:
        return [text]
    raw = np.frombuffer(text.encode("utf-8"), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(raw.size))).reshape(-1)
    padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
    padded[: raw.size] = raw
    gathered = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row[:size]).decode("utf-8") for row, size in zip(gathered, sizes, strict=True)]


def first_fault(fault: str, exchange: Exchange) -> str:
    """The fault of the first process that has one, named; empty when all went well."""
    faults = exchange(fault)
    found = next((i for i, told in enumerate(faults) if told), None)
    if found is None:
        return ""
    return faults[found] if len(set(faults)) == 1 else f"process {found}: {faults[found]}"
