"""Chunked log-probabilities against the whole [places, vocabulary] matrix, values and gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqlrl_jax.rl.logprobs import token_logprobs

SHARDS, PLACES, DIM, VOCAB = 2, 24, 8, 50


def inputs(seed: int, count: int, slots: int) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(seed)
    index = np.zeros((SHARDS, slots), np.int32)
    for shard in range(SHARDS):
        index[shard, :count] = rng.permutation(PLACES)[:count]
    targets = np.where(np.arange(slots) < count, rng.integers(0, VOCAB, (SHARDS, slots)), 0).astype(np.int32)
    hidden, unembed = rng.normal(size=(SHARDS, PLACES, DIM)), rng.normal(size=(DIM, VOCAB))
    to = rng.normal(size=(2, SHARDS, slots)) * (np.arange(slots) < count)
    return tuple(map(jnp.asarray, (hidden.astype(np.float32), unembed.astype(np.float32), index, targets, to)))


def whole(
    hidden: jax.Array, unembed: jax.Array, index: jax.Array, targets: jax.Array, temperature: float
) -> tuple[jax.Array, ...]:
    logits = jnp.stack([h[i] for h, i in zip(hidden, index, strict=True)]) @ unembed / temperature
    table = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(table, targets[..., None], -1)[..., 0]
    return chosen, -(jnp.exp(table) * table).sum(-1), logits.argmax(-1) == targets


@partial(jax.jit, static_argnums=(5, 6))
def both(  # values and gradients, chunked and whole
    hidden: jax.Array,
    unembed: jax.Array,
    slots: tuple[jax.Array, jax.Array],
    count: jax.Array,
    to: jax.Array,
    temperature: float,
    chunk: int,
) -> tuple[Any, Any]:
    def chunked(h: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        out = token_logprobs(h, w, *slots, count, temperature=temperature, chunk=chunk)
        return (out.logprobs * to[0] + out.entropy * to[1]).sum(), out

    def plain(h: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        logprobs, entropy, greedy = whole(h, w, *slots, temperature)
        return (logprobs * to[0] + entropy * to[1]).sum(), (logprobs, entropy, greedy)

    return tuple(jax.grad(f, (0, 1), has_aux=True)(hidden, unembed) for f in (chunked, plain))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(0, PLACES), st.sampled_from([(4, 0.6), (8, 1.0), (24, 1.7)]))
def test_equals_the_whole_matrix(seed: int, count: int, how: tuple[int, float]) -> None:
    hidden, unembed, index, targets, to = inputs(seed, count, 24)
    (got_gradient, got), (want_gradient, want) = both(
        hidden, unembed, (index, targets), jnp.int32(count), to, how[1], how[0]
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(a)[:, :count], np.asarray(b)[:, :count], rtol=2e-4, atol=2e-5)
    for a, b in zip(got_gradient, want_gradient, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=5e-5)


def test_the_vocabulary_never_meets_all_places() -> None:
    """In the compiled gradient no buffer has vocabulary times more than a chunk of places."""
    places, vocab, chunk = 512, 4096, 32
    hidden, unembed = jnp.zeros((1, places, 8)), jnp.zeros((8, vocab))
    slots = jnp.zeros((1, places), jnp.int32)

    def total(h: jax.Array, w: jax.Array) -> jax.Array:
        return token_logprobs(h, w, slots, slots, jnp.int32(places), temperature=1.0, chunk=chunk).logprobs.sum()

    memory = jax.jit(jax.grad(total, (0, 1))).lower(hidden, unembed).compile().memory_analysis()
    assert memory.temp_size_in_bytes < places * vocab * 4 / 4


def test_masked_tokens_far_away_do_not_overflow() -> None:
    hidden, unembed = jnp.full((1, 4, 2), 1e4), jnp.array([[1.0, -1.0], [1.0, -1.0]])
    index = jnp.arange(4, dtype=jnp.int32)[None]
    out = token_logprobs(hidden, unembed, index, jnp.ones((1, 4), jnp.int32), jnp.int32(4), temperature=1.0, chunk=4)
    np.testing.assert_allclose(out.logprobs, -4e4)
    np.testing.assert_allclose(out.entropy, 0)


def test_slots_must_fill_chunks() -> None:
    hidden, unembed, index, targets, _ = inputs(0, 5, 24)
    with pytest.raises(ValueError, match="24 slots of trained tokens must be a multiple of the chunk 7"):
        token_logprobs(hidden, unembed, index, targets, jnp.int32(5), temperature=1.0, chunk=7)
