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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Bool, Float, Int, UInt32

from sqlrl_jax.model.attention import MASKED
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.decoder import final_norm, finish_block, project_qkv, rope_table, unembedding
from sqlrl_jax.model.layout import unstack_layers
from sqlrl_jax.model.params import Params

_SCORED = 32  # positions whose logits exist at a time when given tokens are scored
_MAX_DRAWS = 256  # a row that never hits its top-p set in so many draws takes the likeliest token


class LayerCache(NamedTuple):
    """One layer's keys and values of every slot; positions beyond a sequence's length hold anything finite."""

    k: Float[Array, "slots KV T h"]
    v: Float[Array, "slots KV T h"]


Cache = tuple[LayerCache, ...]


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
    """`counts[b]` tokens of row b are valid; `new` are the keys and values of the tokens that were fed in."""

    tokens: Int[Array, "K B"]
    logprobs: Float[Array, "K B"]
    counts: Int[Array, " B"]
    new: Cache


@partial(jax.jit, static_argnames=("config", "dtype"))
def prepare(config: ModelConfig, params: Params, dtype: str) -> Params:
    """The parameters as decoding wants them: a list of layers and an output matrix of its own, in `dtype`.

    Slices of stacked layers would be copied in every step of the decoding loop. (Joining q, k and v into one matrix was
    tried and is slower on a CPU: taking the product apart costs more than it saves.)
    """
    cast = jax.tree.map(lambda x: x.astype(dtype), params)
    return {
        "embedding": cast["embedding"],
        "final_norm": cast["final_norm"],
        "layers": unstack_layers(cast["layers"], config.num_hidden_layers),
        "lm_head": unembedding(cast),
    }


@partial(jax.jit, static_argnames=("config", "slots", "length", "dtype"))
def make_cache(config: ModelConfig, slots: int, length: int, dtype: str) -> Cache:
    """An empty cache."""
    shape = (slots, config.num_key_value_heads, length, config.head_dim)
    return tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_hidden_layers))


@partial(jax.jit, static_argnames=("slots", "length"))
def grow_cache(cache: Cache, slots: int, length: int) -> Cache:
    """The same cache with room for more sequences or longer ones."""

    def grow(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, slots - x.shape[0]), (0, 0), (0, length - x.shape[2]), (0, 0)))

    return jax.tree.map(grow, cache)


@partial(jax.jit, static_argnames="length")
def take(cache: Cache, slots: Int[Array, " B"], length: int) -> Cache:
    """Copies of the first `length` positions of these slots."""

    def one(x: jax.Array) -> jax.Array:
        window = (1, x.shape[1], length, x.shape[3])
        return jax.vmap(lambda slot: jax.lax.dynamic_slice(x, (slot, 0, 0, 0), window)[0])(slots)

    return jax.tree.map(one, cache)


@partial(jax.jit, donate_argnums=0)
def put(cache: Cache, new: Cache, slots: Int[Array, " B"], starts: Int[Array, " B"], rows: Int[Array, ""]) -> Cache:
    """Writes the first `rows` rows of `new` into their slots, from position `starts` on.

    What would lie beyond the end of the cache is padding and is dropped. Row by row: XLA's scatter is slow on a CPU.
    """
    length = cache[0].k.shape[2]
    size = min(new[0].k.shape[2], length)

    def write(row: int, cache: Cache) -> Cache:
        start = jnp.minimum(starts[row], length - size)
        shift = starts[row] - start
        keep = jnp.arange(size)[:, None] < shift

        def one(target: jax.Array, source: jax.Array) -> jax.Array:
            window = (1, target.shape[1], size, target.shape[3])
            place = (slots[row], 0, start, 0)
            part = jnp.roll(jax.lax.dynamic_slice(source, (row, 0, 0, 0), window), shift, axis=2)
            old = jax.lax.dynamic_slice(target, place, window)
            return jax.lax.dynamic_update_slice(target, jnp.where(keep, old, part), place)

        return jax.tree.map(one, cache, new)

    return jax.lax.fori_loop(0, rows, write, cache)


@partial(jax.jit, static_argnames="length", donate_argnums=0)
def copy_rows(
    cache: Cache, sources: Int[Array, " N"], targets: Int[Array, " N"], rows: Int[Array, ""], length: int
) -> Cache:
    """Copies the first `length` positions from slot to slot, for the first `rows` pairs: samples of one prompt."""

    def copy(row: int, cache: Cache) -> Cache:
        def one(x: jax.Array) -> jax.Array:
            part = jax.lax.dynamic_slice(x, (sources[row], 0, 0, 0), (1, x.shape[1], length, x.shape[3]))
            return jax.lax.dynamic_update_slice(x, part, (targets[row], 0, 0, 0))

        return jax.tree.map(one, cache)

    return jax.lax.fori_loop(0, rows, copy, cache)


@partial(jax.jit, static_argnames="config")
def extend(
    config: ModelConfig, params: Params, view: Cache, tokens: Int[Array, "B S"], lengths: Int[Array, " B"]
) -> Cache:
    """Keys and values of `tokens`, which follow the first `lengths` positions of each row of `view`."""
    return _through(config, params, view, tokens, lengths)[1]


@partial(jax.jit, static_argnames="config")
def score(config: ModelConfig, params: Params, tokens: Int[Array, "1 S"]) -> Float[Array, " S-1"]:
    """The log-probability of each token but the first, given those before it, at temperature 1."""
    heads, dim = config.num_key_value_heads, config.head_dim
    empty = jnp.zeros((1, heads, 0, dim), params["embedding"].dtype)
    view = (LayerCache(empty, empty),) * config.num_hidden_layers
    hidden, _ = _through(config, params, view, tokens, jnp.zeros(1, jnp.int32))

    def one(state: jax.Array, target: jax.Array) -> jax.Array:
        logits = (final_norm(config, params, state[None]) @ params["lm_head"])[0].astype(jnp.float32)
        return logits[target] - jax.nn.logsumexp(logits)

    return jax.lax.map(lambda pair: one(*pair), (hidden[0, :-1], tokens[0, 1:]), batch_size=_SCORED)


def _through(
    config: ModelConfig, params: Params, view: Cache, tokens: Int[Array, "B S"], lengths: Int[Array, " B"]
) -> tuple[Float[Array, "B S d"], Cache]:
    """`tokens` after the last layer, and their keys and values."""
    batch, size = tokens.shape
    heads, dim = config.num_key_value_heads, config.head_dim
    cached = jnp.arange(view[0].k.shape[2])[None, :] < lengths[:, None]
    causal = jnp.tril(jnp.ones((size, size), bool))
    mask = jnp.concatenate(
        [
            jnp.broadcast_to(cached[:, None], (batch, size, cached.shape[1])),
            jnp.broadcast_to(causal, (batch, size, size)),
        ],
        axis=-1,
    )

    def attend(q: jax.Array, old: LayerCache, new: LayerCache) -> jax.Array:
        keys, values = (jnp.concatenate(pair, axis=2) for pair in zip(old, new, strict=True))
        q = q.reshape(batch, size, heads, -1, dim)
        scores = jnp.einsum("bskgh,bkth->bkgst", q, keys, preferred_element_type=jnp.float32) * dim**-0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1).astype(values.dtype)
        return jnp.einsum("bkgst,bkth->bskgh", weights, values).reshape(batch, size, -1, dim)

    x = jnp.take(params["embedding"], tokens, axis=0)
    rope = rope_table(config, lengths[:, None] + jnp.arange(size))
    result = []
    for layer, old in zip(params["layers"], view, strict=True):
        q, k, v = project_qkv(config, layer, x, rope)
        result.append(LayerCache(k.swapaxes(1, 2), v.swapaxes(1, 2)))
        x = finish_block(config, layer, x, attend(q, old, result[-1]))
    return x, tuple(result)


@partial(jax.jit, static_argnames=("config", "chunk"))
def decode(
    config: ModelConfig, params: Params, view: Cache, rows: Rows, end_ids: Int[Array, " E"], chunk: int
) -> Decoded:
    """Samples up to `chunk` tokens for every row, in one compiled loop.

    A row is done at its limit or after one of `end_ids` (-1 fills the array up); the loop ends when all rows are.
    """
    batch, heads, length, dim = view[0].k.shape
    cached = jnp.arange(length)[None, :] < rows.length[:, None]

    def forward(i: jax.Array, token: jax.Array, buffers: Cache) -> tuple[jax.Array, Cache]:
        fresh = jnp.arange(chunk) <= i
        x = jnp.take(params["embedding"], token[:, None], axis=0)
        rope = rope_table(config, (rows.length + i)[:, None])
        result = []
        for layer, old, buffer in zip(params["layers"], view, buffers, strict=True):
            q, k, v = project_qkv(config, layer, x, rope)
            result.append(
                LayerCache(
                    jax.lax.dynamic_update_slice(buffer.k, k.swapaxes(1, 2), (0, 0, i, 0)),
                    jax.lax.dynamic_update_slice(buffer.v, v.swapaxes(1, 2), (0, 0, i, 0)),
                )
            )
            attended = _attend_two(q.reshape(batch, heads, -1, dim), old, result[-1], cached, fresh)
            x = finish_block(config, layer, x, attended.reshape(batch, 1, -1, dim))
        return (final_norm(config, params, x[:, 0]) @ params["lm_head"]).astype(jnp.float32), tuple(result)

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        i, token, done, count, tokens, logprobs, buffers = state
        logits, buffers = forward(i, token, buffers)
        position = (rows.length + i + 1).astype(jnp.uint32)
        sampled, logprob = sample(logits, rows.seed, position, rows.temperature, rows.top_p)
        token = jnp.where(done, token, sampled)
        count = count + ~done
        done = done | (count >= rows.limit) | jnp.any(sampled[:, None] == end_ids, axis=-1)
        return i + 1, token, done, count, tokens.at[i].set(token), logprobs.at[i].set(logprob), buffers

    empty = jnp.zeros((batch, heads, chunk, dim), view[0].k.dtype)
    start = (
        jnp.int32(0),
        rows.token,
        rows.limit <= 0,
        jnp.zeros(batch, jnp.int32),
        jnp.zeros((chunk, batch), jnp.int32),
        jnp.zeros((chunk, batch), jnp.float32),
        tuple(LayerCache(empty, empty) for _ in view),
    )
    end = jax.lax.while_loop(lambda s: (s[0] < chunk) & ~jnp.all(s[2]), step, start)
    return Decoded(end[4], end[5], end[3], end[6])


def _attend_two(
    q: Float[Array, "B KV G h"], old: LayerCache, new: LayerCache, cached: Bool[Array, "B T"], fresh: Bool[Array, " K"]
) -> Float[Array, "B KV G h"]:
    """One softmax over the cached positions and the fresh ones, as products and sums: tiny batched matrix products are
    slower on a CPU, and concatenating would copy the cache."""
    scale = q.shape[-1] ** -0.5

    def scores(keys: jax.Array, mask: jax.Array) -> jax.Array:
        products = (q * scale)[:, :, :, None, :].astype(jnp.float32) * keys[:, :, None].astype(jnp.float32)
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

    def again(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
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
