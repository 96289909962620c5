"""Causal attention inside the segments of packed rows, with grouped key/value heads.

Plain XLA, float32 softmax. Keys and values are never repeated for their query heads. Splash attention on TPUs and cuDNN
on GPUs are left out here: the callers pass attention in as a function, so they can be added beside this one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Far below any score, yet finite: a row that is masked everywhere must not turn into NaN.
MASKED = -1e30


def segment_mask(segment_ids: Int[Array, "B S"]) -> Bool[Array, "B S S"]:
    """True where a query (second axis) may see a key (third): the same segment, not later in the row.

    Padding (segment 0) sees padding only, itself at least, so that its rows stay finite."""
    length = segment_ids.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return causal & (segment_ids[:, :, None] == segment_ids[:, None, :])


def attention(
    q: Float[Array, "B S H h"], k: Float[Array, "B T KV h"], v: Float[Array, "B T KV h"], mask: Bool[Array, "B S T"]
) -> Float[Array, "B S H h"]:
    """softmax(q k^T / sqrt(h)) v over the keys that `mask` allows; H is a multiple of KV."""
    batch, length, heads, dim = q.shape
    groups = heads // k.shape[2]
    q = q.reshape(batch, length, k.shape[2], groups, dim)
    scores = jnp.einsum("bskgh,btkh->bkgst", q, k, preferred_element_type=jnp.float32) * dim**-0.5
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgst,btkh->bskgh", weights, v).reshape(batch, length, heads, dim)
