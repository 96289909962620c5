"""Distance of the present policy from the reference model, token by token.

With d = log pi - log pi_ref of a sampled token (http://joschu.net/blog/kl-approx.html): each is 0 where the two agree and
estimates KL(pi, pi_ref) for tokens drawn from pi. As a loss only k2 and k3 pull towards the reference on policy: the
expected gradient of k1 is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from sqlrl_jax.rl.tokens import LOG_RATIO_LIMIT

Estimator = Callable[[Any, ModuleType], Any]


def k1(d: Any, _: ModuleType) -> Any:
    """d: unbiased, of either sign."""
    return d


def k2(d: Any, _: ModuleType) -> Any:
    """d^2 / 2: biased, its gradient is that of the KL."""
    return 0.5 * d * d


def k3(d: Any, xp: ModuleType) -> Any:
    """exp(-d) - 1 + d: unbiased and never negative."""
    return xp.expm1(-d) + d


def absolute(d: Any, xp: ModuleType) -> Any:
    """|d|."""
    return xp.abs(d)


ESTIMATORS: dict[str, Estimator] = {"k1": k1, "k2": k2, "k3": k3, "abs": absolute}


def approximate_kl(logprobs: Any, reference: Any, estimator: str, xp: ModuleType = np) -> Any:
    """The estimator of each token; `xp` is numpy or jax.numpy. d is held within ±20."""
    return ESTIMATORS[estimator](xp.clip(logprobs - reference, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), xp)
