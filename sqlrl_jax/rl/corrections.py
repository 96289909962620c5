"""Corrections where the engine that sampled and the learner that trains disagree on a token's probability.

rho = exp(old - rollout): `old` are the learner's log-probabilities before the update, `rollout` the engine's, both at the
sampling temperature. Truncated importance sampling multiplies a token's loss by min(rho, cap) (as IMPALA's, arXiv:1802.01561;
for language models Yao et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025); masks drop
tokens or whole episodes. What is dropped still counts in the divisor of the loss: dropping makes a step smaller, never
the rest of it larger. All of it is pure, and a constant to the gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sqlrl_jax.config_algorithm import OffPolicyCorrectionConfig
from sqlrl_jax.rl.losses import Sums
from sqlrl_jax.rl.tokens import LOG_RATIO_LIMIT, Tokens, episode_sums, of_episode, only

PER_EPISODE = "episodes/"
"""Prefix of sums that count episodes; others count tokens."""


def _ratio(log_ratio: Array) -> Array:
    return jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def _beyond(ratio: Array, low: float | None, high: float | None) -> tuple[Array, Array]:
    """Where the ratio is above `high` and where it is below `low`; None is no bound."""
    never = jnp.zeros(ratio.shape, bool)
    return (ratio > high if high is not None else never), (ratio < low if low is not None else never)


class _Sums:
    """Collects sums over tokens and over episodes (entries of episode_sums that have tokens)."""

    def __init__(self, tokens: Tokens) -> None:
        self.mask = tokens.mask
        self.present = episode_sums(tokens.mask.astype(jnp.float32), tokens.episodes) > 0
        self.values: Sums = {}

    def tokens(self, name: str, where: Array) -> None:
        self.values[name] = jnp.sum((where & self.mask).astype(jnp.float32))

    def episodes(self, name: str, where: Array) -> None:
        self.values[PER_EPISODE + name] = jnp.sum((where & self.present).astype(jnp.float32))


def correct(tokens: Tokens, settings: OffPolicyCorrectionConfig) -> tuple[Float[Array, "shards slots"], Sums]:
    """What each token's loss is multiplied by, and sums behind the metrics. Sequence ratios are over all trained tokens of
    an episode, whichever of them a mask drops."""
    ids, sums = tokens.episodes, _Sums(tokens)
    log_rho = jax.lax.stop_gradient(tokens.old_logprobs) - tokens.rollout_logprobs  # 0 in masked places
    rho = _ratio(log_rho)
    log_product = episode_sums(log_rho, ids)
    factor = only(tokens.mask, jnp.ones_like(rho))
    if settings.tis_ratio_type == "token":
        sums.tokens("tis_token_clip_high_ratio", rho > settings.token_tis_ratio_clip_high)
        factor *= jnp.minimum(rho, settings.token_tis_ratio_clip_high)
    elif settings.tis_ratio_type == "sequence":
        product = _ratio(log_product)
        sums.episodes("tis_seq_clip_high_ratio", product > settings.sequence_tis_ratio_clip_high)
        factor *= jnp.minimum(of_episode(product, ids), settings.sequence_tis_ratio_clip_high)
    for name, over, under in _masked_episodes(tokens, settings, rho, log_product):
        sums.episodes(f"{name}_masked_ratio", over | under)
        sums.episodes(f"{name}_over_high_ratio", over)
        sums.episodes(f"{name}_under_low_ratio", under)
        factor = only(~of_episode(over | under, ids), factor)
    low, high = settings.token_mask_is_threshold_low, settings.token_mask_is_threshold_high
    if low is not None or high is not None:
        over, under = _beyond(rho, low, high)
        sums.tokens("token_mask_masked_ratio", over | under)
        sums.tokens("token_mask_over_high_ratio", over)
        sums.tokens("token_mask_under_low_ratio", under)
        factor = only(~(over | under), factor)
    sums.values["is_ratio_mean"] = jnp.sum(only(tokens.mask, rho))
    sums.values["is_ratio_max"] = jnp.max(only(tokens.mask, rho), initial=0.0)
    return factor, sums.values


def _masked_episodes(
    tokens: Tokens, settings: OffPolicyCorrectionConfig, rho: Array, log_product: Array
) -> list[tuple[str, Array, Array]]:
    """Of each mask over episodes: its metric's name, the episodes over the upper bound, those under the lower."""
    out: list[tuple[str, Array, Array]] = []
    low, high = settings.outlier_token_is_threshold_low, settings.outlier_token_is_threshold_high
    if low is not None or high is not None:
        over, under = (
            episode_sums((part & tokens.mask).astype(jnp.float32), tokens.episodes) > 0
            for part in _beyond(rho, low, high)
        )
        out.append(("outlier_seq", over, under))
    if settings.sequence_mask_metric == "geometric":
        counts = episode_sums(tokens.mask.astype(jnp.float32), tokens.episodes)
        mean = _ratio(log_product / jnp.maximum(counts, 1.0))
        out.append(("geo_sequence_mask", *_beyond(mean, settings.geo_mask_low, settings.geo_mask_high)))
    elif settings.sequence_mask_metric == "product":
        bounds = settings.product_mask_low, settings.product_mask_high
        out.append(("product_sequence_mask", *_beyond(_ratio(log_product), *bounds)))
    return out
