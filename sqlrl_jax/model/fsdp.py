"""Weights that are split over fsdp (and sequence) are gathered where they are used, and their gradients summed into
parts again.

Left to itself the compiler chooses what to move: sometimes the activations, sometimes float32 where the compute dtype
would do. Here the collectives of a layer's weights are stated: an all-gather in the compute dtype for the forward pass,
another for the backward pass that recomputes the layer, a reduce-scatter of the gradient. The embedding is never gathered
at all: each device looks up its columns for the tokens of all, and an all-to-all brings them where the tokens are.
Without a mesh, or on one device, this is the plain lookup and nothing else.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from sqlrl_jax.mesh import partition_spec, split_axes
from sqlrl_jax.model.layout import joined_spec
from sqlrl_jax.model.params import Params, ParamSpec

_GATHERED = ("fsdp", "sequence")


def gather_layer(specs: dict[str, ParamSpec], layer: Params, mesh: Mesh | None, dtype: str) -> Params:
    """One layer's parameters, and its adapters, with those that are split over fsdp whole, in `dtype`. `specs` are those
    of the stacked parameters."""
    if mesh is None or all(mesh.shape[axis] == 1 for axis in _GATHERED):
        return layer
    return {name: _gather(*_layout(specs, name, value), value, mesh, dtype) for name, value in layer.items()}


def _layout(specs: dict[str, ParamSpec], name: str, value: jax.Array) -> tuple[list[str | None], list[int]]:
    """Logical axes and their whole parts. An adapter's A [in, rank] and B [rank, out] lie as their matrix [in, out]."""
    spec = joined_spec(specs, name) or specs.get(f"layers.{name}")
    if spec is not None:
        return list(spec.axes[1:]), list(spec.units[1:])
    matrix = specs[f"layers.{name[:-2]}"]
    outer = int(name.endswith("_b"))
    axes: list[str | None] = [None, None]
    axes[outer] = matrix.axes[1 + outer]
    units = list(value.shape)
    units[outer] = matrix.units[1 + outer]
    return axes, units


def _gather(axes: list[str | None], units: list[int], value: jax.Array, mesh: Mesh, dtype: str) -> jax.Array:
    parts = partition_spec(mesh, axes, units)
    whole = PartitionSpec(*(None if _is_gathered(entry) else entry for entry in parts))
    if whole == parts:
        return value
    return _gathered(value, dtype, NamedSharding(mesh, parts), NamedSharding(mesh, whole))


def _is_gathered(entry: Any) -> bool:
    return any(axis in _GATHERED for axis in ((entry,) if isinstance(entry, str) else entry or ()))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(value: jax.Array, dtype: str, parts: NamedSharding, whole: NamedSharding) -> jax.Array:
    cast = jax.lax.with_sharding_constraint(value.astype(dtype), parts)
    return jax.lax.with_sharding_constraint(cast, whole)


def _gathered_forward(
    value: jax.Array, dtype: str, parts: NamedSharding, whole: NamedSharding
) -> tuple[jax.Array, jax.Array]:
    return _gathered(value, dtype, parts, whole), jnp.zeros((0,), value.dtype)


def _gathered_backward(
    dtype: str, parts: NamedSharding, whole: NamedSharding, like: jax.Array, gradient: jax.Array
) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, parts).astype(like.dtype),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


class _Lookup(NamedTuple):
    """How the table [vocabulary, width] and the tokens [rows, length] of a lookup are split."""

    mesh: Mesh
    rows: tuple[str, ...]
    tokens: tuple[str, ...]
    vocab: tuple[str, ...]
    width: tuple[str, ...]
    dtype: str

    @property
    def table(self) -> PartitionSpec:
        return PartitionSpec(self.vocab, self.width)

    @property
    def ids(self) -> PartitionSpec:
        return PartitionSpec(self.rows, self.tokens)

    @property
    def out(self) -> PartitionSpec:
        return PartitionSpec(self.rows, self.tokens, None)

    def side(self, axis: str) -> int | None:
        """Which side of the tokens a mesh axis splits that splits the table's width."""
        return 0 if axis in self.rows else 1 if axis in self.tokens else None


def lookup(
    table: Float[Array, "V D"], tokens: Int[Array, "B S"], mesh: Mesh | None, dtype: str
) -> Float[Array, "B S D"]:
    """The rows of `table` that `tokens` name, in `dtype`. The gradient of the table is summed in float32."""
    if mesh is None or mesh.size == 1:
        return jnp.take(table, tokens, axis=0).astype(dtype)
    how = _Lookup(
        mesh,
        split_axes(mesh, "batch", tokens.shape[0]),
        split_axes(mesh, "sequence", tokens.shape[1]),
        split_axes(mesh, "vocab", table.shape[0]),
        split_axes(mesh, "embed", table.shape[1]),
        dtype,
    )
    return _lookup(table, tokens, how)


def _own(how: _Lookup, tokens: Array, size: int) -> tuple[Array, Array]:
    """The tokens of all devices that hold other columns, by their places in this device's part of the vocabulary, and
    which of them are in it."""
    for axis in how.width:
        side = how.side(axis)
        if side is not None:
            tokens = jax.lax.all_gather(tokens, axis, axis=side, tiled=True)
    if not how.vocab:
        return tokens, jnp.ones(tokens.shape, bool)
    tokens = tokens - jax.lax.axis_index(how.vocab) * size
    return tokens, (tokens >= 0) & (tokens < size)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup(table: Array, tokens: Array, how: _Lookup) -> Array:
    def local(table: Array, tokens: Array) -> Array:
        at, here = _own(how, tokens, table.shape[0])
        out = jnp.take(table, at, axis=0, mode="clip").astype(how.dtype)
        if how.vocab:
            out = jax.lax.psum(jnp.where(here[..., None], out, 0), how.vocab)
        for axis in reversed(how.width):
            side = how.side(axis)
            if side is not None:
                out = jax.lax.all_to_all(out, axis, split_axis=side, concat_axis=2, tiled=True)
            else:
                out = jax.lax.all_gather(out, axis, axis=2, tiled=True)
        return out

    return jax.shard_map(local, mesh=how.mesh, in_specs=(how.table, how.ids), out_specs=how.out, check_vma=False)(
        table, tokens
    )


def _lookup_forward(table: Array, tokens: Array, how: _Lookup) -> tuple[Array, tuple[Array, Array]]:
    return _lookup(table, tokens, how), (tokens, table)


def _lookup_backward(how: _Lookup, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    tokens, table = saved
    summed = tuple(axis for axis in (*how.rows, *how.tokens) if axis not in how.width)

    def local(gradient: Array, tokens: Array, table: Array) -> Array:
        at, here = _own(how, tokens, table.shape[0])
        for axis in how.width:
            side = how.side(axis)
            if side is not None:
                gradient = jax.lax.all_to_all(gradient, axis, split_axis=2, concat_axis=side, tiled=True)
            else:
                width = gradient.shape[2] // how.mesh.shape[axis]
                gradient = jax.lax.dynamic_slice_in_dim(gradient, jax.lax.axis_index(axis) * width, width, axis=2)
        at = jnp.where(here, at, table.shape[0])  # past the end: dropped
        out = jnp.zeros(table.shape, jnp.float32).at[at].add(gradient.astype(jnp.float32), mode="drop")
        return (jax.lax.psum(out, summed) if summed else out).astype(table.dtype)

    spread = jax.shard_map(
        local, mesh=how.mesh, in_specs=(how.out, how.ids, how.table), out_specs=how.table, check_vma=False
    )
    return spread(gradient, tokens, table), None


_lookup.defvjp(_lookup_forward, _lookup_backward)
