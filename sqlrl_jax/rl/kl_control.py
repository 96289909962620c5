"""The weight of the KL from the reference model, fixed or steered towards a target (Ziegler et al. 2019, arXiv:1909.08593).

Pure arithmetic; the weight itself is the learner's state and goes into its checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sqlrl_jax.config_algorithm import KLControlConfig

_MOST = 0.2
"""Relative error of the KL beyond which the weight changes no faster."""


def episode_mean(kls: Sequence[np.ndarray]) -> float:
    """Mean over episodes of the mean over their tokens; episodes without tokens do not count, none at all give 0."""
    means = [float(np.mean(kl)) for kl in kls if len(kl)]
    return float(np.mean(means)) if means else 0.0


def next_coefficient(coefficient: float, kl: float, episodes: int, settings: KLControlConfig) -> float:
    """The weight after a batch of `episodes` whose KL was `kl`: times 1 + clip(kl / kl_target - 1, ±0.2) episodes / horizon,
    if adaptive. Never below 0, which a batch of more than five horizons would ask for."""
    if settings.type == "fixed":
        return coefficient
    error = min(max(kl / settings.kl_target - 1.0, -_MOST), _MOST)
    return coefficient * max(1.0 + error * episodes / settings.horizon, 0.0)
