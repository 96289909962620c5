"""Which questions a step trains on: a pure function of the seed and the step, so that a resumed run needs no state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def steps_per_epoch(tasks: int, batch_size: int) -> int:
    """Full batches in one pass; the last partial batch is dropped."""
    return tasks // batch_size


def batch_at(tasks: Sequence[T], batch_size: int, seed: int, step: int) -> list[T]:
    """The questions of a step (from 0): each epoch is another shuffle, and uses each question at most once."""
    epoch, index = divmod(step, steps_per_epoch(len(tasks), batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(len(tasks))
    return [tasks[i] for i in order[index * batch_size : (index + 1) * batch_size]]
