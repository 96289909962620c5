"""The trained tokens of a micro-batch as policy losses see them, and sums over episodes.

An episode lies in one row, a row in one shard and one micro-batch (data/packing.py), so a sum over an episode's tokens
needs nothing from another device or another micro-batch: it is right however a minibatch is split.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LOG_RATIO_LIMIT = 20.0


class Tokens(NamedTuple):
    """Places where `mask` is False hold zeros in every array of numbers.

    `logprobs` are the present policy's and carry the gradient; `old_logprobs` those before the update, `rollout_logprobs`
    those the token was drawn with, all at the sampling temperature. `episodes` numbers the episode of each token inside
    its shard. `selected` marks the tokens that clip_cov and kl_cov treat apart. `reference_logprobs` are the reference
    model's, where a KL term needs them.
    """

    logprobs: Float[Array, "shards slots"]
    old_logprobs: Float[Array, "shards slots"]
    rollout_logprobs: Float[Array, "shards slots"]
    advantages: Float[Array, "shards slots"]
    weights: Float[Array, "shards slots"]
    mask: Bool[Array, "shards slots"]
    episodes: Int[Array, "shards slots"]
    selected: Bool[Array, "shards slots"]
    reference_logprobs: Float[Array, "shards slots"]

    @property
    def log_ratio(self) -> Float[Array, "shards slots"]:
        """log(present / old), held within ±20 so that the ratio is finite."""
        return jnp.clip(self.logprobs - self.old_logprobs, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def only(mask: Array, values: Array) -> Array:
    """`values` where `mask`, zero elsewhere, in value and gradient, whatever is there."""
    return jnp.where(mask, values, jnp.zeros((), values.dtype))


def make_tokens(
    logprobs: Array,
    rollout_logprobs: Array,
    advantages: Array,
    weights: Array,
    mask: Array,
    episodes: Array,
    *,
    old_logprobs: Array | None = None,
    selected: Array | None = None,
    reference_logprobs: Array | None = None,
) -> Tokens:
    """Tokens with zeros in all masked places, so that a NaN or a huge number there reaches nothing.

    Without `old_logprobs` or `reference_logprobs` the rollout's stand for them; without `selected` nothing is selected.
    """
    rollout = only(mask, rollout_logprobs)

    def fixed(values: Array | None) -> Array:
        return rollout if values is None else jax.lax.stop_gradient(only(mask, values))

    return Tokens(
        logprobs=only(mask, logprobs),
        old_logprobs=fixed(old_logprobs),
        rollout_logprobs=rollout,
        advantages=only(mask, advantages),
        weights=only(mask, weights),
        mask=mask,
        episodes=episodes,
        selected=jnp.zeros_like(mask) if selected is None else selected & mask,
        reference_logprobs=fixed(reference_logprobs),
    )


def episode_sums(
    values: Float[Array, "shards slots"], episodes: Int[Array, "shards slots"]
) -> Float[Array, "shards slots"]:
    """Entry e of a shard is the sum of `values` over its episode e. There are never more episodes than slots."""
    slots = values.shape[-1]
    return jax.vmap(lambda v, e: jax.ops.segment_sum(v, e, num_segments=slots))(values, episodes)


def of_episode(
    sums: Float[Array, "shards slots"], episodes: Int[Array, "shards slots"]
) -> Float[Array, "shards slots"]:
    """For each token the entry of its episode."""
    return jnp.take_along_axis(sums, episodes, axis=-1)
