"""Log-probabilities of given tokens without ever holding [batch, sequence, vocabulary].

Only the hidden states that predict a trained token are gathered (prompts, observations and padding never meet the
vocabulary), and of those only `chunk` at a time have logits, forward and backward: the backward pass computes each
chunk's logits again from the saved normaliser. The number of chunks is a loop bound known at run time, so batches with
more or fewer trained tokens run in one compiled program and pay for what they have.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Two computations of one logit may be rounded apart by this much of its size.
_ROUNDING = 1e-6


class TokenLogprobs(NamedTuple):
    """Of each trained token: its log-probability, the entropy of its distribution (nats), and whether no other token is
    more likely, up to rounding."""

    logprobs: Float[Array, "shards slots"]
    entropy: Float[Array, "shards slots"]
    greedy: Bool[Array, "shards slots"]


def token_logprobs(
    hidden: Float[Array, "shards places dim"],
    unembed: Float[Array, "dim vocab"],
    index: Int[Array, "shards slots"],
    targets: Int[Array, "shards slots"],
    count: Int[Array, ""],
    *,
    temperature: float,
    chunk: int,
) -> TokenLogprobs:
    """Log-probabilities of `targets` given the hidden states at `index`, under softmax(hidden @ unembed / temperature).

    The slots are trained tokens, padded at the end to a multiple of `chunk`; `count` is how many are used in the fullest
    shard. Later slots give zeros and take no time. Within a shard the used indices must be distinct. The leading axis is
    the batch's sharding over devices: each gathers from its own rows only. Differentiable in hidden and unembed through
    logprobs and entropy. float32 results whatever the inputs.
    """
    slots = index.shape[1]
    if slots % chunk:
        raise ValueError(f"{slots} slots of trained tokens must be a multiple of the chunk {chunk}: pad them")
    logprobs, entropy, greedy = _head(hidden, unembed, index, targets, count, 1.0 / temperature, chunk)
    return TokenLogprobs(logprobs, entropy, greedy)


def _chunks(count: Array, chunk: int) -> Array:
    return (count + chunk - 1) // chunk


def _slice(values: Array, i: Array, chunk: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(values, i * chunk, chunk, axis=1)


def _put(values: Array, part: Array, i: Array, chunk: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(values, part, i * chunk, axis=1)


def _logits(hidden: Array, unembed: Array, index: Array, scale: float) -> tuple[Array, Array]:
    picked = jnp.take_along_axis(hidden, index[..., None], axis=1, mode="clip")
    return picked, jnp.einsum("gcd,dv->gcv", picked, unembed, preferred_element_type=jnp.float32) * scale


Outputs = tuple[Array, Array, Array]
Saved = tuple[Array, Array, Array, Array, Array, Array, Array]


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _head(
    hidden: Array, unembed: Array, index: Array, targets: Array, count: Array, scale: float, chunk: int
) -> Outputs:
    return _forward(hidden, unembed, index, targets, count, scale, chunk)[0]


def _forward(
    hidden: Array, unembed: Array, index: Array, targets: Array, count: Array, scale: float, chunk: int
) -> tuple[Outputs, Saved]:
    def step(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        _, logits = _logits(hidden, unembed, _slice(index, i, chunk), scale)
        largest = jnp.max(logits, axis=-1)
        shifted = logits - largest[..., None]
        exponent = jnp.exp(shifted)
        total = jnp.sum(exponent, axis=-1)
        log_total = jnp.log(total)
        chosen = jnp.take_along_axis(shifted, _slice(targets, i, chunk)[..., None], axis=-1, mode="clip")[..., 0]
        entropy = log_total - jnp.sum(exponent * shifted, axis=-1) / total
        parts = (chosen - log_total, entropy, chosen >= -_ROUNDING * (1.0 + jnp.abs(largest)), largest + log_total)
        return tuple(_put(whole, part, i, chunk) for whole, part in zip(carry, parts, strict=True))

    zeros = jnp.zeros(index.shape, jnp.float32)
    start = (zeros, zeros, jnp.zeros(index.shape, bool), zeros)
    logprobs, entropy, greedy, normaliser = jax.lax.fori_loop(0, _chunks(count, chunk), step, start)
    return (logprobs, entropy, greedy), (hidden, unembed, index, targets, count, entropy, normaliser)


def _backward(scale: float, chunk: int, saved: Saved, gradients: Outputs) -> tuple[Array | None, ...]:
    hidden, unembed, index, targets, count, entropy, normaliser = saved
    to_logprob, to_entropy, _ = gradients

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        d_hidden, d_unembed = carry
        at = _slice(index, i, chunk)
        picked, logits = _logits(hidden, unembed, at, scale)
        logprobs = logits - _slice(normaliser, i, chunk)[..., None]
        g_logprob, g_entropy = _slice(to_logprob, i, chunk)[..., None], _slice(to_entropy, i, chunk)[..., None]
        is_target = jnp.arange(logits.shape[-1]) == _slice(targets, i, chunk)[..., None]
        surprise = logprobs + _slice(entropy, i, chunk)[..., None]
        d_logits = jnp.where(is_target, g_logprob, 0.0) - jnp.exp(logprobs) * (g_logprob + g_entropy * surprise)
        d_logits = (d_logits * scale).astype(unembed.dtype)
        d_picked = jnp.einsum("gcv,dv->gcd", d_logits, unembed)
        d_unembed += jnp.einsum("gcd,gcv->dv", picked, d_logits, preferred_element_type=jnp.float32)
        shard = jnp.arange(index.shape[0])[:, None]
        return d_hidden.at[shard, at].add(d_picked.astype(d_hidden.dtype), mode="drop"), d_unembed

    start = (jnp.zeros_like(hidden), jnp.zeros(unembed.shape, jnp.float32))
    d_hidden, d_unembed = jax.lax.fori_loop(0, _chunks(count, chunk), step, start)
    return d_hidden, d_unembed.astype(unembed.dtype), None, None, None


_head.defvjp(_forward, _backward)
