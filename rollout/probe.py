"""Whether an engine computes what the learner does: log-probabilities of a few sequences, compared after every push.

Checksums show that the bytes arrived; only this shows that they are used: that no derived copy is stale, no tensor was loaded
to another's place, no scale differs. Kernels and rounding differ too, so what is compared is the mean over all tokens, which
wrong weights move by far more than rounding does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Probe:
    """Token ids, and what the learner gives for every id but the first of each: natural log-probabilities at temperature 1.

    `tolerance` is the largest mean difference, in nats a token, with which the weights count as the learner's.
    """

    sequences: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[float]]
    tolerance: float


@dataclass(frozen=True)
class Gap:
    """Mean and largest absolute difference over all tokens; not finite where a log-probability is not."""

    mean: float = 0.0
    largest: float = 0.0
    tokens: int = 0


def gap(expected: Sequence[Sequence[float]], found: Sequence[Sequence[float]]) -> Gap:
    """Raises ValueError when the two differ in length anywhere."""
    pairs = zip(expected, found, strict=True)
    parts = [np.subtract(np.array(a, np.float64), np.array(b, np.float64)) for a, b in pairs if _same(a, b)]
    every = np.abs(np.concatenate(parts)) if parts else np.zeros(0)
    return Gap(float(every.mean()), float(every.max()), every.size) if every.size else Gap()


def _same(a: Sequence[float], b: Sequence[float]) -> bool:
    if len(a) != len(b):
        raise ValueError(f"{len(a)} log-probabilities against {len(b)}")
    return True
