"""Which tokens clip_cov and kl_cov treat apart (arXiv:2505.22617): those whose log-probability and advantage covary most.

Covariance of a token = (log-probability - mean) (advantage - mean), means over the trained tokens of the whole minibatch.
So it is computed on the host, from a forward pass with the weights of the step, and not in each micro-batch. Plain NumPy
over flat arrays in the order of the episodes: how they were packed changes nothing.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from sqlrl_jax.config_algorithm import AlgorithmConfig


def covariances(
    logprobs: Float[np.ndarray, " tokens"], advantages: Float[np.ndarray, " tokens"]
) -> Float[np.ndarray, " tokens"]:
    """Each token's part of the covariance, in float64; empty for no tokens."""
    if not len(logprobs):
        return np.zeros(0)
    new, advantage = np.asarray(logprobs, np.float64), np.asarray(advantages, np.float64)
    return (new - new.mean()) * (advantage - advantage.mean())


def select_clip_cov(
    logprobs: Float[np.ndarray, " tokens"],
    old_logprobs: Float[np.ndarray, " tokens"],
    advantages: Float[np.ndarray, " tokens"],
    settings: AlgorithmConfig,
    rng: np.random.Generator,
) -> Bool[np.ndarray, " tokens"]:
    """max(1, floor(clip_ratio x tokens)) tokens drawn from those with a covariance inside the bounds, or all of these if
    they are fewer. Tokens that the ratio's clip has already are not drawn."""
    values = covariances(logprobs, advantages)
    ratio = np.exp(np.clip(np.asarray(logprobs, np.float64) - old_logprobs, -20.0, 20.0))
    clipped = ((advantages > 0) & (ratio > 1 + settings.eps_clip_high)) | (
        (advantages < 0) & (ratio < 1 - settings.eps_clip_low)
    )
    inside = (values > settings.clip_cov.clip_cov_lb) & (values < settings.clip_cov.clip_cov_ub) & ~clipped
    candidates = np.flatnonzero(inside)
    count = min(max(int(settings.clip_cov.clip_ratio * len(values)), 1), len(candidates))
    out = np.zeros(len(values), bool)
    out[rng.permutation(candidates)[:count]] = True
    return out


def select_kl_cov(
    logprobs: Float[np.ndarray, " tokens"], advantages: Float[np.ndarray, " tokens"], settings: AlgorithmConfig
) -> Bool[np.ndarray, " tokens"]:
    """The max(1, floor(kl_cov_frac x tokens)) tokens of largest covariance; of equal ones the first."""
    values = covariances(logprobs, advantages)
    count = min(max(int(settings.kl_cov.kl_cov_frac * len(values)), 1), len(values))
    out = np.zeros(len(values), bool)
    out[np.argsort(-values, kind="stable")[:count]] = True
    return out
