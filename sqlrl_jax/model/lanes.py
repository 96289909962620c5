"""How rows are laid for the TPU's attention kernels: heads before tokens, in whole lanes of 128 tokens."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LANES = 128
# What remat "attention" keeps of a layer goes by this name.
KEPT = "attention"


def block_length(length: int, most: int) -> int:
    """The largest multiple of the lanes up to `most` that divides `length`."""
    return max(size for size in range(LANES, most + 1, LANES) if length % size == 0)


def in_lanes(
    q: Float[Array, "B S H h"], k: Float[Array, "B S KV h"], v: Float[Array, "B S KV h"], reach: Int[Array, "B S"]
) -> tuple[Float[Array, "B H T h"], Float[Array, "B KV T h"], Float[Array, "B KV T h"], Int[Array, "B T"]]:
    """The same with heads first, queries divided by sqrt(h), and S padded to T, a multiple of the lanes. Padding reaches the
    end, as no sequence then does, so that it sees itself alone."""
    length, dim = q.shape[1], q.shape[3]
    padding = -length % LANES
    if padding:
        q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
        reach = jnp.pad(reach, ((0, 0), (0, padding)), constant_values=length + padding)
    q, k, v = (x.swapaxes(1, 2) for x in (q * jnp.asarray(dim**-0.5, q.dtype), k, v))
    return q, k, v, reach
