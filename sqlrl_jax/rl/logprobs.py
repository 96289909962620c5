"""Log-probabilities of given tokens without ever holding [batch, sequence, vocabulary].

Only the hidden states that predict a trained token are gathered (prompts, observations and padding never meet the
vocabulary), and of those only `chunk` at a time have logits, forward and backward: the backward pass computes each
chunk's logits again from the saved normaliser. The number of chunks is a loop bound known at run time, so batches with
more or fewer trained tokens run in one compiled program and pay for what they have.

On a mesh every collective stands outside the loop over chunks, but for the sums over a split vocabulary: the output matrix
is gathered once in the compute dtype, the hidden states once over the sequence axis, whose devices then share the slots
of each chunk, and the matrix's gradient is summed on each device in float32 and reduce-scattered once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from sqlrl_jax.config import ConfigError
from sqlrl_jax.mesh import split_axes

# Two computations of one logit may be rounded apart by this much of its size.
_ROUNDING = 1e-6


class TokenLogprobs(NamedTuple):
    """Of each trained token: its log-probability, the entropy of its distribution (nats), and whether no other token is
    more likely, up to rounding."""

    logprobs: Float[Array, "shards slots"]
    entropy: Float[Array, "shards slots"]
    greedy: Bool[Array, "shards slots"]


def token_logprobs(
    hidden: Float[Array, "rows tokens dim"],
    unembed: Float[Array, "dim vocab"],
    index: Int[Array, "shards slots"],
    targets: Int[Array, "shards slots"],
    count: Int[Array, ""],
    *,
    temperature: float,
    chunk: int,
    mesh: Mesh | None = None,
) -> TokenLogprobs:
    """Log-probabilities of `targets` given the hidden states at `index`, under softmax(hidden @ unembed / temperature).

    A shard is an equal part of the rows, its places all their tokens in order. The slots are trained tokens, padded at the
    end to a multiple of `chunk`; `count` is how many are used in the fullest shard. Later slots give zeros and take no
    time. One place may predict several tokens: the first of each episode that begins alike. On a mesh the shards are those
    of the batch over devices. Differentiable in hidden and unembed through logprobs and entropy. `unembed` is used in the
    dtype of `hidden`; its gradient is summed in float32. float32 results whatever the inputs.
    """
    slots = index.shape[1]
    if slots % chunk:
        raise ValueError(f"{slots} slots of trained tokens must be a multiple of the chunk {chunk}: pad them")
    how = _layout(hidden, unembed, mesh, 1.0 / temperature, chunk)
    logprobs, entropy, greedy = _head(hidden, unembed, index, targets, count, how)
    return TokenLogprobs(logprobs, entropy, greedy)


class _Layout(NamedTuple):
    """How the work is divided: mesh axes over which rows, tokens of a row, and the matrix's two sides are split, and those
    whose devices share the slots of a chunk. All empty without a mesh."""

    scale: float
    chunk: int
    mesh: Mesh | None = None
    rows: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    share: tuple[str, ...] = ()

    @property
    def sharers(self) -> int:
        return math.prod(self.mesh.shape[axis] for axis in self.share) if self.mesh is not None else 1

    @property
    def slots(self) -> int:
        """Slots of a chunk that one device computes."""
        return self.chunk // self.sharers


def _layout(hidden: Array, unembed: Array, mesh: Mesh | None, scale: float, chunk: int) -> _Layout:
    if mesh is None or mesh.size == 1:
        return _Layout(scale, chunk)
    vocab = split_axes(mesh, "vocab", unembed.shape[1])
    share = tuple(axis for axis in ("sequence", "tensor") if mesh.shape[axis] > 1 and axis not in vocab)
    how = _Layout(
        scale,
        chunk,
        mesh,
        split_axes(mesh, "batch", hidden.shape[0]),
        split_axes(mesh, "sequence", hidden.shape[1]),
        split_axes(mesh, "embed", unembed.shape[0]),
        vocab,
        share,
    )
    if chunk % how.sharers:
        raise ConfigError(
            f"trainer.policy.logprob_chunk = {chunk} must be a multiple of {how.sharers}, the devices along"
            f" {' and '.join(share)} that share a chunk"
        )
    return how


def _run(how: _Layout, local: Callable[..., Any], ins: str, outs: str) -> Callable[..., Any]:
    """`local` on each device's part: h hidden states, w the matrix, g slots by shard, s shared slots, c the count."""
    if how.mesh is None:
        return local
    specs = {
        "h": PartitionSpec(how.rows, how.tokens),
        "w": PartitionSpec(how.width, how.vocab),
        "g": PartitionSpec(how.rows),
        "s": PartitionSpec(how.rows, how.share),
        "c": PartitionSpec(),
    }
    return jax.shard_map(
        local,
        mesh=how.mesh,
        in_specs=tuple(specs[letter] for letter in ins),
        out_specs=tuple(specs[letter] for letter in outs),
        check_vma=False,
    )


def _whole_rows(how: _Layout, hidden: Array, shards: int) -> Array:
    """[shards, places, dim]: all tokens of this device's rows."""
    if how.tokens:
        hidden = jax.lax.all_gather(hidden, how.tokens, axis=1, tiled=True)
    return hidden.reshape(shards, -1, hidden.shape[-1])


def _whole_width(how: _Layout, unembed: Array, dtype: jnp.dtype) -> Array:
    """The matrix for this device's part of the vocabulary."""
    unembed = unembed.astype(dtype)
    return jax.lax.all_gather(unembed, how.width, axis=0, tiled=True) if how.width else unembed


def _shared(how: _Layout, values: Array) -> Array:
    """This device's share of the slots: a part of each chunk, so that all have equally much however many are used."""
    if not how.share:
        return values
    parts = values.reshape(values.shape[0], -1, how.sharers, how.slots)
    mine = jax.lax.dynamic_index_in_dim(parts, jax.lax.axis_index(how.share), axis=2, keepdims=False)
    return mine.reshape(values.shape[0], -1)


def _together(how: _Layout, values: Array) -> Array:
    """The inverse of `_shared`."""
    if not how.share:
        return values
    parts = values.reshape(values.shape[0], -1, 1, how.slots)
    return jax.lax.all_gather(parts, how.share, axis=2, tiled=True).reshape(values.shape[0], -1)


def _sum(values: Array, axes: tuple[str, ...]) -> Array:
    return jax.lax.psum(values, axes) if axes else values


def _chunks(how: _Layout, count: Array) -> Array:
    return (count + how.chunk - 1) // how.chunk


def _slice(how: _Layout, values: Array, i: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(values, i * how.slots, how.slots, axis=1)


def _put(how: _Layout, values: Array, part: Array, i: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(values, part, i * how.slots, axis=1)


def _logits(hidden: Array, unembed: Array, index: Array, scale: float) -> tuple[Array, Array]:
    picked = jnp.take_along_axis(hidden, index[..., None], axis=1, mode="clip")
    return picked, jnp.einsum("gcd,dv->gcv", picked, unembed, preferred_element_type=jnp.float32) * scale


def _own_targets(how: _Layout, targets: Array, vocab: int) -> Array:
    """The targets as columns of this device's part of the matrix; those of other parts lie outside it."""
    return targets - jax.lax.axis_index(how.vocab) * vocab if how.vocab else targets


Outputs = tuple[Array, Array, Array]
Saved = tuple[Array, Array, Array, Array, Array, Array, Array]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _head(hidden: Array, unembed: Array, index: Array, targets: Array, count: Array, how: _Layout) -> Outputs:
    return _forward(hidden, unembed, index, targets, count, how)[0]


def _forward(
    hidden: Array, unembed: Array, index: Array, targets: Array, count: Array, how: _Layout
) -> tuple[Outputs, Saved]:
    run = _run(how, partial(_forward_local, how), "hwggc", "gggss")
    *outputs, entropy, normaliser = run(hidden, unembed, index, targets, count)
    logprobs, all_entropy, greedy = outputs
    return (logprobs, all_entropy, greedy), (hidden, unembed, index, targets, count, entropy, normaliser)


def _forward_local(
    how: _Layout, hidden: Array, unembed: Array, index: Array, targets: Array, count: Array
) -> tuple[Array, ...]:
    matrix = _whole_width(how, unembed, hidden.dtype)
    hidden = _whole_rows(how, hidden, index.shape[0])
    index, targets = _shared(how, index), _own_targets(how, _shared(how, targets), matrix.shape[1])

    def step(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        _, logits = _logits(hidden, matrix, _slice(how, index, i), how.scale)
        largest = jnp.max(logits, axis=-1)
        if how.vocab:
            largest = jax.lax.pmax(largest, how.vocab)
        shifted = logits - largest[..., None]
        exponent = jnp.exp(shifted)
        target = _slice(how, targets, i)
        chosen = jnp.take_along_axis(shifted, target[..., None], axis=-1, mode="clip")[..., 0]
        weighted = jnp.einsum("gcv,gcv->gc", exponent, shifted)  # on a CPU several times faster than a sum of products
        sums = jnp.sum(exponent, axis=-1), weighted
        if how.vocab:
            chosen = jnp.where((target >= 0) & (target < logits.shape[-1]), chosen, 0.0)
            *sums, chosen = jax.lax.psum((*sums, chosen), how.vocab)
        total, weighted = sums
        log_total = jnp.log(total)
        entropy = log_total - weighted / total
        parts = (chosen - log_total, entropy, chosen >= -_ROUNDING * (1.0 + jnp.abs(largest)), largest + log_total)
        return tuple(_put(how, whole, part, i) for whole, part in zip(carry, parts, strict=True))

    zeros = jnp.zeros(index.shape, jnp.float32)
    start = (zeros, zeros, jnp.zeros(index.shape, bool), zeros)
    logprobs, entropy, greedy, normaliser = jax.lax.fori_loop(0, _chunks(how, count), step, start)
    return *(_together(how, part) for part in (logprobs, entropy, greedy)), entropy, normaliser


def _backward(how: _Layout, saved: Saved, gradients: Outputs) -> tuple[Array | None, ...]:
    run = _run(how, partial(_backward_local, how), "hwggcssgg", "hw")
    d_hidden, d_unembed = run(*saved, *gradients[:2])
    return d_hidden, d_unembed, None, None, None


def _backward_local(
    how: _Layout,
    hidden: Array,
    unembed: Array,
    index: Array,
    targets: Array,
    count: Array,
    entropy: Array,
    normaliser: Array,
    to_logprob: Array,
    to_entropy: Array,
) -> tuple[Array, Array]:
    matrix, shape = _whole_width(how, unembed, hidden.dtype), hidden.shape
    hidden = _whole_rows(how, hidden, index.shape[0])
    index, to_logprob, to_entropy = (_shared(how, values) for values in (index, to_logprob, to_entropy))
    targets = _own_targets(how, _shared(how, targets), matrix.shape[1])

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        d_hidden, d_matrix = carry
        at = _slice(how, index, i)
        picked, logits = _logits(hidden, matrix, at, how.scale)
        logprobs = logits - _slice(how, normaliser, i)[..., None]
        g_logprob, g_entropy = _slice(how, to_logprob, i)[..., None], _slice(how, to_entropy, i)[..., None]
        is_target = jnp.arange(logits.shape[-1]) == _slice(how, targets, i)[..., None]
        surprise = logprobs + _slice(how, entropy, i)[..., None]
        d_logits = jnp.where(is_target, g_logprob, 0.0) - jnp.exp(logprobs) * (g_logprob + g_entropy * surprise)
        d_logits = (d_logits * how.scale).astype(matrix.dtype)
        d_picked = jnp.einsum("gcv,dv->gcd", d_logits, matrix)
        d_matrix += jnp.einsum("gcd,gcv->dv", picked, d_logits, preferred_element_type=jnp.float32)
        shard = jnp.arange(index.shape[0])[:, None]
        return d_hidden.at[shard, at].add(d_picked.astype(d_hidden.dtype), mode="drop"), d_matrix

    start = (jnp.zeros_like(hidden), jnp.zeros(matrix.shape, jnp.float32))
    d_hidden, d_matrix = jax.lax.fori_loop(0, _chunks(how, count), step, start)
    return _own_places(how, d_hidden, shape), _own_width(how, d_matrix).astype(unembed.dtype)


def _own_places(how: _Layout, d_hidden: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of this device's tokens, summed over the devices that share slots or hold other columns."""
    d_hidden = d_hidden.reshape(shape[0], -1, shape[2])
    d_hidden = _sum(d_hidden, tuple(axis for axis in (*how.share, *how.vocab) if axis not in how.tokens))
    return jax.lax.psum_scatter(d_hidden, how.tokens, scatter_dimension=1, tiled=True) if how.tokens else d_hidden


def _own_width(how: _Layout, d_matrix: Array) -> Array:
    """The gradient of this device's part of the matrix, summed over the devices with other rows or slots."""
    if how.width:
        d_matrix = jax.lax.psum_scatter(d_matrix, how.width, scatter_dimension=0, tiled=True)
    return _sum(d_matrix, tuple(axis for axis in (*how.rows, *how.share) if axis not in how.width))


_head.defvjp(_forward, _backward)
