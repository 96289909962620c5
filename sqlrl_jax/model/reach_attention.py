"""Flash attention on TPUs for rows in which several sequences go on from one beginning: a Pallas kernel.

Splash attention tells sequences apart by equality of their ids, which cannot say that a prompt belongs to several. Here a
query sees the keys before it that reach beyond it (attention.py). Whole blocks that no query of a block may see are not
visited: from the reaches of a batch comes a list of the pairs of blocks that meet, the grid is as long as the longest
list, and the list, in scalar memory, says which blocks to fetch. So a row of many short sequences costs what they cost.
Forward and backward are as in FlashAttention-2 (arXiv:2307.08691): two passes backward, one that sums over the keys of a
block of queries and one over the queries of a block of keys.

It has been compiled for TPUs and run in Pallas's interpreter, never on a TPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from sqlrl_jax.model.attention import MASKED
from sqlrl_jax.model.lanes import KEPT, LANES, block_length, in_lanes

BLOCK = 512  # tokens at most


class Steps(NamedTuple):
    """Pairs of blocks that meet, in the order of their visit: for each row the block whose results are summed and the block
    that is added to it, flat [B * most]; how many pairs each row has [B]; and how many the longest has."""

    own: Int[Array, " n"]
    other: Int[Array, " n"]
    counts: Int[Array, " B"]
    longest: Int[Array, ""]


def meeting_blocks(reach: Int[Array, "B S"], block: int) -> tuple[Steps, Steps]:
    """The steps by blocks of queries, and those by blocks of keys."""
    starts = jnp.arange(0, reach.shape[1], block)
    farthest = reach.reshape(reach.shape[0], -1, block).max(-1)
    meet = (farthest[:, None, :] > starts[:, None]) & (starts <= starts[:, None])  # [row, queries, keys]
    return _steps(meet), _steps(meet.swapaxes(1, 2))


def _steps(meet: Array) -> Steps:
    batch, blocks = meet.shape[:2]
    flat = meet.reshape(batch, -1)
    counts = flat.sum(-1, dtype=jnp.int32)
    order = jnp.argsort(~flat, axis=-1, stable=True)
    last = jnp.take_along_axis(order, jnp.maximum(counts - 1, 0)[:, None], 1)  # fetched again, so nothing is
    order = jnp.where(jnp.arange(flat.shape[1]) < counts[:, None], order, last).astype(jnp.int32).ravel()
    return Steps(order // blocks, order % blocks, counts, counts.max())


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q: Array, k: Array, v: Array, reach: Array, interpret: bool) -> Array:
    return _forward(q, k, v, reach, interpret)[0]


def reach_attention(
    q: Float[Array, "B S H h"],
    k: Float[Array, "B S KV h"],
    v: Float[Array, "B S KV h"],
    reach: Int[Array, "B S"],
    *,
    interpret: bool = False,
) -> Float[Array, "B S H h"]:
    """Each token attends to itself and to those before it that reach beyond it. `interpret` runs the kernel without a TPU,
    slowly."""
    return _attention(*in_lanes(q, k, v, reach), interpret).swapaxes(1, 2)[:, : q.shape[1]]


_Saved = tuple[Array, Array, Array, Array, Array, Array]


def _forward(q: Array, k: Array, v: Array, reach: Array, interpret: bool) -> tuple[Array, _Saved]:
    """Heads before tokens: q [B H S h], k and v [B KV S h]. The scores' log-sum-exp is [B H 1 S]."""
    block = block_length(q.shape[2], BLOCK)
    by_query, _ = meeting_blocks(reach, block)
    call = _Call(by_query, q.shape, k.shape[1], block, interpret)
    out, lse = call(
        _forward_kernel,
        inputs=[("q", q), ("k", k), ("v", v), ("reach", reach[:, None])],
        outputs=[("q", jax.ShapeDtypeStruct(q.shape, q.dtype)), ("row", _statistics(q))],
        scratch=[(block, q.shape[3]), (block, LANES), (block, LANES)],
    )
    out, lse = checkpoint_name(out, KEPT), checkpoint_name(lse, KEPT)
    return out, (q, k, v, reach, out, lse)


def _backward(interpret: bool, saved: _Saved, gradient: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, reach, out, lse = saved
    block, dim = block_length(q.shape[2], BLOCK), q.shape[3]
    along = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, :, None]
    inputs = [("q", q), ("k", k), ("v", v), ("reach", reach[:, None]), ("q", gradient), ("row", lse), ("row", along)]
    by_query, by_key = meeting_blocks(reach, block)
    (to_q,) = _Call(by_query, q.shape, k.shape[1], block, interpret)(
        _to_queries_kernel,
        inputs=inputs,
        outputs=[("q", jax.ShapeDtypeStruct(q.shape, q.dtype))],
        scratch=[(block, dim), (block, LANES), (block, LANES)],
    )
    to_k, to_v = _Call(by_key, q.shape, k.shape[1], block, interpret, by_key=True)(
        _to_keys_kernel,
        inputs=inputs,
        outputs=[("k", jax.ShapeDtypeStruct(k.shape, k.dtype)), ("k", jax.ShapeDtypeStruct(v.shape, v.dtype))],
        scratch=[(block, dim), (block, dim), (block, LANES)],
    )
    return to_q, to_k, to_v, None


_attention.defvjp(_forward, _backward)


def _statistics(q: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*q.shape[:2], 1, q.shape[2]), jnp.float32)


class _Call(NamedTuple):
    """A pallas_call over (row, head, step), or by keys over (row, key head, step, query head of the group)."""

    steps: Steps
    shape: tuple[int, ...]  # of the queries, [B H S h]
    kv_heads: int
    block: int
    interpret: bool
    by_key: bool = False

    @property
    def most(self) -> int:
        """Steps that the lists have room for in a row."""
        return (self.shape[2] // self.block) ** 2

    def __call__(
        self,
        kernel: Any,
        inputs: Sequence[tuple[str, Array]],
        outputs: Sequence[tuple[str, jax.ShapeDtypeStruct]],
        scratch: Sequence[tuple[int, int]],
    ) -> Sequence[Array]:
        batch, heads = self.shape[:2]
        groups = heads // self.kv_heads
        grid = (batch, self.kv_heads, self.steps.longest, groups) if self.by_key else (batch, heads, self.steps.longest)
        semantics = [pltpu.PARALLEL] * 2 + [pltpu.ARBITRARY] * (len(grid) - 2)
        return pl.pallas_call(
            lambda own, other, counts, *refs: kernel(_here(self.most, self.block, own, other, counts), *refs),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=grid,
                in_specs=[self._spec(kind) for kind, _ in inputs],
                out_specs=[self._spec(kind) for kind, _ in outputs],
                scratch_shapes=[pltpu.VMEM(size, jnp.float32) for size in scratch],
            ),
            out_shape=[shape for _, shape in outputs],
            compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
            interpret=self.interpret,
        )(*self.steps[:3], *(array for _, array in inputs))

    def _spec(self, kind: str) -> pl.BlockSpec:
        """How an array is cut: "q" and "row" by blocks of queries, "k", "v" and "reach" by those of keys."""
        groups, most, dim = self.shape[1] // self.kv_heads, self.most, self.shape[3]
        of_queries = kind in ("q", "row")

        def place(b: Any, h: Any, n: Any, *rest: Any) -> tuple[Any, ...]:
            group, (own, other, _) = (rest[0] if self.by_key else None), rest[-3:]
            at = (own if of_queries != self.by_key else other)[b * most + n]
            if kind == "reach":
                return b, 0, at
            queries, keys = (h * groups + group, h) if self.by_key else (h, h // groups)
            head = queries if of_queries else keys
            return (b, head, 0, at) if kind == "row" else (b, head, at, 0)

        sizes = {"reach": (None, 1, self.block), "row": (None, None, 1, self.block)}
        return pl.BlockSpec(sizes.get(kind, (None, None, self.block, dim)), place)


class _Here(NamedTuple):
    """The present step: where its two blocks begin in the row, whether it is the first and the last of its own block, and
    whether there is a step: other rows may have more."""

    own: Array
    other: Array
    first: Array
    last: Array
    live: Array


def _here(most: int, block: int, own: Any, other: Any, counts: Any) -> _Here:
    n, b = pl.program_id(2), pl.program_id(0)
    at, end = b * most + n, counts[b]
    first = (n == 0) | (own[at] != own[at - jnp.minimum(n, 1)])
    last = (n == end - 1) | (own[at] != own[at + jnp.where(n < most - 1, 1, 0)])
    live = n < end
    return _Here(own[at] * block, other[at] * block, first & live, last & live, live)


def _times(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """a product that sums over one axis of each, in float32."""
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)


def _column(row: Array) -> Array:
    """[1, n] → [n, lanes], the same in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _masked(scores: Array, queries: Array, keys: Array, reach: Array, axis: int) -> Array:
    """Scores, MASKED where a query does not see a key. The queries lie along `axis`, the keys and their reaches along the
    other; `queries` and `keys` are their first places."""
    query = queries + jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis)
    key = keys + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1 - axis)
    return jnp.where((query >= key) & (query < reach), scores, MASKED)


def _forward_kernel(
    here: _Here,
    q: Any,
    k: Any,
    v: Any,
    reach: Any,
    out: Any,
    lse: Any,
    summed: Any,
    largest: Any,
    total: Any,
) -> None:
    @pl.when(here.first)
    def _() -> None:
        summed[...] = jnp.zeros_like(summed)
        total[...] = jnp.zeros_like(total)
        largest[...] = jnp.full_like(largest, MASKED)

    @pl.when(here.live)
    def _() -> None:
        scores = _masked(_times(q[...], k[...], (1, 1)), here.own, here.other, reach[...], 0)
        before = largest[...]
        largest[...] = jnp.maximum(before, scores.max(axis=1, keepdims=True))
        kept = jnp.exp(before - largest[...])
        weights = jnp.exp(scores - largest[:, :1])
        total[...] = total[...] * kept + weights.sum(axis=1, keepdims=True)
        summed[...] = summed[...] * kept[:, :1] + _times(weights.astype(v.dtype), v[...], (1, 0))

    @pl.when(here.last)
    def _() -> None:
        out[...] = (summed[...] / total[:, :1]).astype(out.dtype)
        lse[...] = (largest[...] + jnp.log(total[...])).T[:1]


def _to_queries_kernel(
    here: _Here,
    q: Any,
    k: Any,
    v: Any,
    reach: Any,
    gradient: Any,
    lse: Any,
    along: Any,
    to_q: Any,
    summed: Any,
    lse_column: Any,
    along_column: Any,
) -> None:
    """The gradient of the scores is w (g v^T - g · out) with the weights w = exp(score - lse); `along` is g · out."""

    @pl.when(here.first)
    def _() -> None:
        summed[...] = jnp.zeros_like(summed)
        lse_column[...] = _column(lse[...])
        along_column[...] = _column(along[...])

    @pl.when(here.live)
    def _() -> None:
        scores = _masked(_times(q[...], k[...], (1, 1)), here.own, here.other, reach[...], 0)
        weights = jnp.exp(scores - lse_column[:, :1])
        to_scores = weights * (_times(gradient[...], v[...], (1, 1)) - along_column[:, :1])
        summed[...] += _times(to_scores.astype(k.dtype), k[...], (1, 0))

    @pl.when(here.last)
    def _() -> None:
        to_q[...] = summed[...].astype(to_q.dtype)


def _to_keys_kernel(
    here: _Here,
    q: Any,
    k: Any,
    v: Any,
    reach: Any,
    gradient: Any,
    lse: Any,
    along: Any,
    to_k: Any,
    to_v: Any,
    summed_k: Any,
    summed_v: Any,
    reach_column: Any,
) -> None:
    """As above with keys down and queries across, so that the statistics lie across."""
    group, groups = pl.program_id(3), pl.num_programs(3)

    @pl.when(here.first & (group == 0))
    def _() -> None:
        summed_k[...] = jnp.zeros_like(summed_k)
        summed_v[...] = jnp.zeros_like(summed_v)
        reach_column[...] = _column(reach[...].astype(jnp.float32))  # exact to 2^24

    @pl.when(here.live)
    def _() -> None:
        scores = _masked(_times(k[...], q[...], (1, 1)), here.other, here.own, reach_column[:, :1], 1)
        weights = jnp.exp(scores - lse[...])
        summed_v[...] += _times(weights.astype(gradient.dtype), gradient[...], (1, 0))
        to_scores = weights * (_times(v[...], gradient[...], (1, 1)) - along[...])
        summed_k[...] += _times(to_scores.astype(q.dtype), q[...], (1, 0))

    @pl.when(here.last & (group == groups - 1))
    def _() -> None:
        to_k[...] = summed_k[...].astype(to_k.dtype)
        to_v[...] = summed_v[...].astype(to_v.dtype)
