"""Attention of whole packed rows on one device: the kernel that suits the platform.

CPU: the plain XLA blocks of attention.py. TPU: splash attention (Pallas), which skips what the causal mask hides and never
holds the scores, or where sequences of a row share a beginning the kernel of reach_attention.py. GPU: cuDNN's flash
attention, block by block, because through jax's public function it takes what a row's sequences may see as a mask only. Left
out: the fused backward pass of splash attention, which holds a partial gradient of the queries for each block of keys: too
much for long rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from sqlrl_jax.model.attention import reach_mask, row_attention
from sqlrl_jax.model.lanes import KEPT, LANES, block_length, in_lanes
from sqlrl_jax.model.reach_attention import reach_attention

# (q, k, v, reach) of whole rows → attended; H is a multiple of KV.
Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

_QUERY_BLOCK, _KEY_BLOCK = 512, 1024
_CUDNN_BLOCKS = 8


def kernel_for(platform: str, dtype: jnp.dtype, head_dim: int, shared: bool) -> Kernel:
    """The kernel for devices of `platform` ("cpu", "gpu", "tpu"); XLA blocks for what the fast ones do not take. `shared`:
    sequences of a row may share a beginning."""
    if platform == "tpu" and head_dim % 64 == 0:
        return reach_attention if shared else splash_attention
    if platform == "gpu" and dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128:
        return partial(_kept, cudnn_attention)
    return partial(_kept, row_attention)


def _kept(kernel: Kernel, q: jax.Array, k: jax.Array, v: jax.Array, reach: jax.Array) -> jax.Array:
    return checkpoint_name(kernel(q, k, v, reach), KEPT)


def splash_attention(
    q: Float[Array, "B S H h"],
    k: Float[Array, "B S KV h"],
    v: Float[Array, "B S KV h"],
    reach: Int[Array, "B S"],
    *,
    interpret: bool = False,
) -> Float[Array, "B S H h"]:
    """Each token attends to itself and to those before it with its reach: its sequence, where no two share a beginning (the
    kernel compares for equality alone). `interpret` runs it without a TPU, slowly."""
    length = q.shape[1]
    q, k, v, reach = in_lanes(q, k, v, reach)
    heads, whole = q.shape[1:3]
    queries, keys = block_length(whole, _QUERY_BLOCK), block_length(whole, _KEY_BLOCK)
    compute = block_length(keys, _QUERY_BLOCK)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((whole, whole))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=queries,
            block_kv=keys,
            block_kv_compute=compute,
            block_q_dkv=queries,
            block_kv_dkv=keys,
            block_kv_dkv_compute=compute,
            block_q_dq=queries,
            block_kv_dq=keys,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
    out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(reach, reach))
    return out.swapaxes(1, 2)[:, :length]


def cudnn_attention(
    q: Float[Array, "B S H h"],
    k: Float[Array, "B S KV h"],
    v: Float[Array, "B S KV h"],
    reach: Int[Array, "B S"],
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B S H h"]:
    """Each token attends to itself and to those before it that reach beyond it: blocks of queries, each with the keys up to
    its end, so that the masks stay small and almost half of the work is saved. Odd lengths, which cuDNN does not take, go to
    XLA; `implementation` takes everything there, as where there is no GPU."""
    length = q.shape[1]
    if length % 2:
        return row_attention(q, k, v, reach)
    block = max(LANES, 2 * -(-length // (2 * _CUDNN_BLOCKS)))
    parts = []
    for start in range(0, length, block):
        end = min(start + block, length)
        mask = reach_mask(reach[:, :end], start, end - start)[:, None]
        parts.append(
            jax.nn.dot_product_attention(
                q[:, start:end], k[:, :end], v[:, :end], mask=mask, implementation=implementation
            )
        )
    return jnp.concatenate(parts, axis=1)
