"""Batched decoding over a KV cache: the computation behind the embedded engine.

Pure functions, jitted; who decodes when is the engine's business. The cache holds one row ("slot") for each sequence. A
call works on a copy of the rows it needs, cut to a bucket of the longest of them (`take`), computes the keys and values of
some new tokens (`extend` for many known ones at once, `decode` for sampled ones, one after the other) and gives those back
in a small buffer that `put` writes into the cache. So nothing is scattered inside the decoding loop, calls on different
rows can run side by side, and the number of compiled shapes does not depend on the size of the cache.

A token's noise comes from its sequence's seed and its position alone. It is drawn by inverting the cumulative
distribution, which needs one random number a token instead of one for each word of the vocabulary, and is accepted if it
lies inside the top-p set, otherwise drawn again: the same distribution as sorting, without a sort.

Left out: top-k and penalties (no recipe uses them), paged attention (an accelerator's rollouts run on SGLang).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Float, Int, UInt32

from sqlrl_jax.model.attention import MASKED
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.decoder import Compute, embed, final_norm, rope_table, run_layers, unembedding
from sqlrl_jax.model.params import Params

_MAX_DRAWS = 256  # a row that never hits its top-p set in so many draws takes the likeliest token


class Cache(NamedTuple):
    """Keys and values of every slot; positions beyond a sequence's length hold anything finite."""

    k: Float[Array, "L slots KV T h"]
    v: Float[Array, "L slots KV T h"]


class Rows(NamedTuple):
    """What one decoding call needs to know of each sequence."""

    token: Int[Array, " B"]
    """The last token so far: it is not in the cache yet."""
    length: Int[Array, " B"]
    """Tokens in the cache, that is the position of `token`."""
    limit: Int[Array, " B"]
    """Tokens that may still be sampled; 0 for a row that only fills up the batch."""
    seed: UInt32[Array, "B 2"]
    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]


class Decoded(NamedTuple):
    """`count[b]` tokens of row b are valid; `new` are the keys and values of the tokens that were fed in."""

    tokens: Int[Array, "K B"]
    logprobs: Float[Array, "K B"]
    count: Int[Array, " B"]
    new: Cache


def make_cache(config: ModelConfig, slots: int, length: int, dtype: str) -> Cache:
    """An empty cache."""
    shape = (config.num_hidden_layers, slots, config.num_key_value_heads, length, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


@partial(jax.jit, static_argnames="length")
def take(cache: Cache, slots: Int[Array, " B"], length: int) -> Cache:
    """Copies of the first `length` positions of these slots. Row by row, because XLA's gather is slow on a CPU."""

    def one(source: jax.Array) -> jax.Array:
        layers, _, heads, _, dim = source.shape
        out = jnp.zeros((layers, slots.shape[0], heads, length, dim), source.dtype)

        def copy(row: int, out: jax.Array) -> jax.Array:
            part = jax.lax.dynamic_slice(source, (0, slots[row], 0, 0, 0), (layers, 1, heads, length, dim))
            return jax.lax.dynamic_update_slice(out, part, (0, row, 0, 0, 0))

        return jax.lax.fori_loop(0, slots.shape[0], copy, out)

    return Cache(one(cache.k), one(cache.v))


@partial(jax.jit, donate_argnums=0)
def put(cache: Cache, new: Cache, slots: Int[Array, " B"], starts: Int[Array, " B"], rows: Int[Array, ""]) -> Cache:
    """Writes the first `rows` rows of `new` into their slots, from position `starts` on.

    What would lie beyond the end of the cache is padding and is dropped.
    """
    length, size = cache.k.shape[3], new.k.shape[3]
    if size > length:
        new = Cache(new.k[:, :, :, :length], new.v[:, :, :, :length])
        size = length

    def one(target: jax.Array, source: jax.Array) -> jax.Array:
        window = (target.shape[0], 1, target.shape[2], size, target.shape[4])

        def write(row: int, target: jax.Array) -> jax.Array:
            start = jnp.minimum(starts[row], length - size)
            shift = starts[row] - start
            part = jax.lax.dynamic_slice(source, (0, row, 0, 0, 0), window)
            old = jax.lax.dynamic_slice(target, (0, slots[row], 0, start, 0), window)
            keep = jnp.arange(size)[:, None] < shift
            return jax.lax.dynamic_update_slice(
                target, jnp.where(keep, old, jnp.roll(part, shift, axis=3)), (0, slots[row], 0, start, 0)
            )

        return jax.lax.fori_loop(0, rows, write, target)

    return Cache(one(cache.k, new.k), one(cache.v, new.v))


@partial(jax.jit, donate_argnums=0)
def copy_rows(cache: Cache, sources: Int[Array, " N"], targets: Int[Array, " N"], rows: Int[Array, ""]) -> Cache:
    """Copies whole slots, the first `rows` pairs: what samples of one prompt share."""

    def one(buffer: jax.Array) -> jax.Array:
        window = (buffer.shape[0], 1, *buffer.shape[2:])

        def copy(row: int, buffer: jax.Array) -> jax.Array:
            part = jax.lax.dynamic_slice(buffer, (0, sources[row], 0, 0, 0), window)
            return jax.lax.dynamic_update_slice(buffer, part, (0, targets[row], 0, 0, 0))

        return jax.lax.fori_loop(0, rows, copy, buffer)

    return Cache(one(cache.k), one(cache.v))


@partial(jax.jit, static_argnames=("config", "compute"))
def extend(
    config: ModelConfig,
    compute: Compute,
    params: Params,
    view: Cache,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, " B"],
) -> Cache:
    """Keys and values of `tokens`, which follow the first `lengths` positions of each row of `view`."""
    batch, size = tokens.shape
    heads, dim = config.num_key_value_heads, config.head_dim
    cached = jnp.arange(view.k.shape[3])[None, :] < lengths[:, None]
    causal = jnp.tril(jnp.ones((size, size), bool))
    mask = jnp.concatenate(
        [jnp.broadcast_to(cached[:, None], (batch, size, cached.shape[1])), jnp.broadcast_to(causal, (batch, size, size))],
        axis=-1,
    )

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, slot: Cache) -> tuple[jax.Array, Cache]:
        new = Cache(k.swapaxes(1, 2), v.swapaxes(1, 2))  # [B KV S h]
        keys = jnp.concatenate([slot.k, new.k.astype(slot.k.dtype)], axis=2)
        values = jnp.concatenate([slot.v, new.v.astype(slot.v.dtype)], axis=2)
        q = q.reshape(batch, size, heads, -1, dim)
        scores = jnp.einsum("bskgh,bkth->bkgst", q, keys, preferred_element_type=jnp.float32) * dim**-0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1).astype(values.dtype)
        return jnp.einsum("bkgst,bkth->bskgh", weights, values).reshape(batch, size, -1, dim), new

    positions = lengths[:, None] + jnp.arange(size)
    x = embed(params, tokens, compute)
    _, new = run_layers(config, params["layers"], x, rope_table(config, positions), attend, view, compute)
    return new


@partial(jax.jit, static_argnames=("config", "compute", "chunk"))
def decode(
    config: ModelConfig,
    compute: Compute,
    params: Params,
    view: Cache,
    rows: Rows,
    end_ids: Int[Array, " E"],
    chunk: int,
) -> Decoded:
    """Samples up to `chunk` tokens for every row, in one compiled loop.

    A row is done at its limit or after one of `end_ids` (-1 fills the array up); the loop ends when all rows are.
    """
    layers, batch, heads, length, dim = view.k.shape
    cached = jnp.arange(length)[None, :] < rows.length[:, None]
    head = unembedding(params).astype(compute.dtype)
    buffer = jnp.zeros((layers, batch, heads, chunk, dim), view.k.dtype)

    def step(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        i, token, done, count, tokens, logprobs, k_new, v_new = state
        position = rows.length + i
        fresh = jnp.arange(chunk) <= i

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, slot: tuple[Cache, Cache]) -> tuple[jax.Array, Cache]:
            old, new = slot
            new = Cache(
                jax.lax.dynamic_update_slice(new.k, k.swapaxes(1, 2).astype(new.k.dtype), (0, 0, i, 0)),
                jax.lax.dynamic_update_slice(new.v, v.swapaxes(1, 2).astype(new.v.dtype), (0, 0, i, 0)),
            )
            q = q.reshape(batch, heads, -1, dim) * dim**-0.5
            return _attend_two(q, old, new, cached, fresh).reshape(batch, 1, -1, dim), new

        x = embed(params, token[:, None], compute)
        rope = rope_table(config, position[:, None])
        carried = (view, Cache(k_new, v_new))
        x, new = run_layers(config, params["layers"], x, rope, attend, carried, compute)
        logits = (final_norm(config, params, x[:, 0]) @ head).astype(jnp.float32)
        sampled, logprob = sample(logits, rows.seed, (position + 1).astype(jnp.uint32), rows.temperature, rows.top_p)
        token = jnp.where(done, token, sampled)
        count = count + ~done
        done = done | (count >= rows.limit) | jnp.any(sampled[:, None] == end_ids, axis=-1)
        return i + 1, token, done, count, tokens.at[i].set(token), logprobs.at[i].set(logprob), new.k, new.v

    start = (
        jnp.int32(0),
        rows.token,
        rows.limit <= 0,
        jnp.zeros(batch, jnp.int32),
        jnp.zeros((chunk, batch), jnp.int32),
        jnp.zeros((chunk, batch), jnp.float32),
        buffer,
        buffer,
    )
    end = jax.lax.while_loop(lambda s: (s[0] < chunk) & ~jnp.all(s[2]), step, start)
    return Decoded(end[4], end[5], end[3], Cache(end[6], end[7]))


def _attend_two(
    q: Float[Array, "B KV G h"], old: Cache, new: Cache, cached: Array, fresh: Array
) -> Float[Array, "B KV G h"]:
    """One softmax over the cached positions and the fresh ones, as products and sums: tiny batched matrix products are
    slower on a CPU, and concatenating would copy the cache."""

    def scores(keys: jax.Array, mask: jax.Array) -> jax.Array:
        products = q[:, :, :, None, :].astype(jnp.float32) * keys[:, :, None].astype(jnp.float32)
        return jnp.where(mask, jnp.sum(products, axis=-1), MASKED)

    def weighted(weights: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.sum(weights[..., None] * values[:, :, None].astype(jnp.float32), axis=-2)

    s_old, s_new = scores(old.k, cached[:, None, None]), scores(new.k, fresh)
    top = jnp.maximum(jnp.max(s_old, axis=-1), jnp.max(s_new, axis=-1))[..., None]
    e_old, e_new = jnp.exp(s_old - top), jnp.exp(s_new - top)
    total = jnp.sum(e_old, axis=-1) + jnp.sum(e_new, axis=-1)
    return ((weighted(e_old, old.v) + weighted(e_new, new.v)) / total[..., None]).astype(q.dtype)


def sample(
    logits: Float[Array, "B V"],
    seed: UInt32[Array, "B 2"],
    position: UInt32[Array, " B"],
    temperature: Float[Array, " B"],
    top_p: Float[Array, " B"],
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """One token for each row and its natural log-probability under the tempered distribution, before top-p cuts it.

    Temperature 0 takes the likeliest token (the first of equals), with its log-probability at temperature 1. The top-p set
    is every token before which, in order of falling probability, less than top_p has accumulated.
    """
    greedy = temperature <= 0
    scaled = logits / jnp.where(greedy, 1.0, temperature)[:, None]
    shifted = scaled - jnp.max(scaled, axis=-1, keepdims=True)
    weights = jnp.exp(shifted)
    total = jnp.sum(weights, axis=-1)
    blocks, cumulative = _blocks(weights)
    likeliest = jnp.argmax(logits, axis=-1)

    def draw(attempt: jax.Array) -> tuple[jax.Array, jax.Array]:
        bits, _ = threefry2x32_p.bind(seed[:, 0], seed[:, 1], position, jnp.full_like(position, attempt))
        uniform = (bits >> 8).astype(jnp.float32) * 2.0**-24
        token = _invert(blocks, cumulative, uniform * cumulative[:, -1])
        weight = jnp.take_along_axis(weights, jnp.minimum(token, weights.shape[1] - 1)[:, None], axis=1)
        before = jnp.sum(jnp.where(weights > weight, weights, 0.0), axis=-1)
        inside = (top_p >= 1.0) | (before < top_p * total)
        return token, inside & (weight[:, 0] > 0.0) & (token < weights.shape[1])

    def again(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        attempt, token, found = state
        fresh, inside = draw(attempt)
        return attempt + 1, jnp.where(found, token, fresh), found | inside

    first, inside = draw(jnp.uint32(0))
    state = (jnp.uint32(1), first, inside | greedy)
    _, token, found = jax.lax.while_loop(lambda s: (s[0] < _MAX_DRAWS) & ~jnp.all(s[2]), again, state)
    token = jnp.where(found & ~greedy, token, likeliest).astype(jnp.int32)
    return token, jnp.take_along_axis(shifted, token[:, None], axis=1)[:, 0] - jnp.log(total)


def _blocks(weights: Float[Array, "B V"]) -> tuple[Float[Array, "B N W"], Float[Array, "B N"]]:
    """The vocabulary in about sqrt(V) blocks, and the running sums of the blocks (a cumulative sum is slow on a CPU, a
    product with a triangle of ones is not)."""
    batch, vocabulary = weights.shape
    width = 1 << max(0, (vocabulary - 1).bit_length() // 2)
    count = -(-vocabulary // width)
    blocks = jnp.pad(weights, ((0, 0), (0, count * width - vocabulary))).reshape(batch, count, width)
    return blocks, _running_sum(jnp.sum(blocks, axis=-1))


def _running_sum(x: Float[Array, "B N"]) -> Float[Array, "B N"]:
    return jnp.matmul(x, jnp.triu(jnp.ones((x.shape[1], x.shape[1]), x.dtype)), precision=jax.lax.Precision.HIGHEST)


def _invert(
    blocks: Float[Array, "B N W"], cumulative: Float[Array, "B N"], target: Float[Array, " B"]
) -> Int[Array, " B"]:
    """The first token at which the running sum of the weights passes `target`."""
    count, width = blocks.shape[1:]
    block = jnp.minimum(jnp.sum(cumulative <= target[:, None], axis=-1), count - 1)[:, None]
    inside = jnp.take_along_axis(blocks, block[:, :, None], axis=1)[:, 0]
    start = jnp.take_along_axis(cumulative, block, axis=1)[:, 0] - jnp.sum(inside, axis=-1)
    offset = jnp.sum(_running_sum(inside) <= (target - start)[:, None], axis=-1)
    return block[:, 0] * width + jnp.minimum(offset, width - 1)
