"""Attention over a mesh: rows over data and fsdp, heads over tensor, and along the sequence axis an exchange.

Outside, the sequence axis splits the tokens of a row. Inside, each of its devices takes some of the heads and sees whole
rows (as in DeepSpeed Ulysses, arXiv:2309.14509): one all-to-all before the kernel and one after it, so the kernel is
that of a single device. Key/value heads that do not divide are gathered, and each device picks those that its query heads
read. Query heads that do not divide are padded. Left out: ring attention, which pays off only where a row has fewer heads
than devices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from sqlrl_jax.mesh import platform_of, split_axes
from sqlrl_jax.model.kernels import kernel_for


def sharded_attention(
    q: Float[Array, "B S H h"],
    k: Float[Array, "B S KV h"],
    v: Float[Array, "B S KV h"],
    reach: Int[Array, "B S"],
    mesh: Mesh | None,
    shared: bool,
) -> Float[Array, "B S H h"]:
    """Each token of a packed row attends to itself and to those before it that reach beyond it. `shared`: sequences of a row
    may share a beginning."""
    kernel = kernel_for(platform_of(mesh), q.dtype, q.shape[-1], shared)
    if mesh is None or mesh.size == 1:
        return kernel(q, k, v, reach)
    rows, tokens = split_axes(mesh, "batch", q.shape[0]), split_axes(mesh, "sequence", q.shape[1])
    heads, kv_heads = split_axes(mesh, "heads", q.shape[2]), split_axes(mesh, "kv_heads", k.shape[2])
    shards = int(np.prod([mesh.shape[axis] for axis in tokens]))
    tensor = int(np.prod([mesh.shape[axis] for axis in heads]))
    kv_local = k.shape[2] // int(np.prod([mesh.shape[axis] for axis in kv_heads]))
    table, exchanged = kv_table(q.shape[2], k.shape[2], tensor, shards, kv_local)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, reach: jax.Array) -> jax.Array:
        own = q.shape[2]
        if tokens:
            q = jnp.pad(q, ((0, 0), (0, 0), (0, -own % shards), (0, 0)))
            q = jax.lax.all_to_all(q, tokens, split_axis=2, concat_axis=1, tiled=True)
        if tokens and exchanged:
            k, v = (jax.lax.all_to_all(x, tokens, split_axis=2, concat_axis=1, tiled=True) for x in (k, v))
        elif tokens:
            k, v = (jax.lax.all_gather(x, tokens, axis=1, tiled=True) for x in (k, v))
        if not exchanged:
            place = _index(heads), _index(tokens)
            k, v = (jnp.take(x, jnp.asarray(table)[place], axis=2) for x in (k, v))
        out = kernel(q, k, v, reach)
        if tokens:
            out = jax.lax.all_to_all(out, tokens, split_axis=1, concat_axis=2, tiled=True)
        return out[:, :, :own]

    split = PartitionSpec(rows, tokens, heads), PartitionSpec(rows, tokens, kv_heads)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split[0], split[1], split[1], PartitionSpec(rows)),
        out_specs=split[0],
        check_vma=False,
    )(q, k, v, reach)


def _index(axes: tuple[str, ...]) -> jax.Array | int:
    return jax.lax.axis_index(axes) if axes else 0


def kv_table(
    heads: int, kv_heads: int, tensor: int, shards: int, kv_local: int
) -> tuple[Int[np.ndarray, "tensor shards n"], bool]:
    """Which of its `kv_local` key/value heads a device needs, one for each group of its query heads, by its place on the
    tensor and sequence axes; and whether splitting the key/value heads as the query heads are gives just these."""
    own = heads // tensor
    each = -(-own // shards)  # query heads of a device, the last of them perhaps padding
    groups = heads // kv_heads
    part, shard, head = np.ogrid[:tensor, :shards, :each]
    wanted = np.minimum(part * own + np.minimum(shard * each + head, own - 1), heads - 1) // groups
    if kv_local < kv_heads:  # split over tensor as the query heads are
        wanted = wanted - part * kv_local
    runs = [n for n in range(1, each + 1) if each % n == 0]
    same = [n for n in runs if (wanted.reshape(tensor, shards, -1, n) == wanted[:, :, ::n, None]).all()]
    picked = wanted[:, :, :: max(same)]
    divided = np.arange(kv_local).reshape(shards, -1) if kv_local % shards == 0 else np.zeros((shards, 0), int)
    return picked, picked.shape[2] == divided.shape[1] and bool((picked == divided).all())
