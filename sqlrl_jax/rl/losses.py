"""Losses of single tokens, summed: pure functions of arrays of trained tokens.

Every function takes arrays of one shape (any) with a `mask` of the places that count and a `weight` for each token, and
returns the weighted SUM of the loss with a dictionary of sums. Nothing is divided here: the caller adds the sums of all
micro-batches and devices and divides once by the global total of weights, so that a mean is never a mean of means. What
makes `token_mean` or `sequence_mean` is the weight, made in data/packing.py. Masked places are replaced before any
arithmetic, so a NaN or a huge number there reaches neither the value nor the gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

LOG_RATIO_LIMIT = 20.0
Sums = dict[str, Float[Array, ""]]


def _only(mask: Array, values: Array, fill: float = 0.0) -> Array:
    return jnp.where(mask, values, jnp.asarray(fill, values.dtype))


def ppo(
    logprobs: Float[Array, "*n"],
    old_logprobs: Float[Array, "*n"],
    advantages: Float[Array, "*n"],
    weights: Float[Array, "*n"],
    mask: Bool[Array, "*n"],
    *,
    eps_low: float,
    eps_high: float,
    dual_clip: float | None = None,
) -> tuple[Float[Array, ""], Sums]:
    """PPO's clipped surrogate (arXiv:1707.06347) with its own bound on each side (clip-higher, arXiv:2503.14476).

    loss = max(-A r, -A clip(r, 1 - eps_low, 1 + eps_high)), r = exp(clamp(logp - old, ±20)). With `dual_clip` = c
    (arXiv:1912.09729) the loss of a negative advantage is at most -c A. Sums: clip_frac (tokens whose gradient the clip
    removed), approx_kl (k3 of the old policy from the new), ratio, tokens, and the largest and total |logp - old|.
    """
    new, old = _only(mask, logprobs), _only(mask, old_logprobs)
    advantage, weight = _only(mask, advantages), _only(mask, weights)
    difference = new - old
    log_ratio = jnp.clip(difference, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = jnp.exp(log_ratio)
    plain = -advantage * ratio
    clipped = -advantage * jnp.clip(ratio, 1.0 - eps_low, 1.0 + eps_high)
    loss = jnp.maximum(plain, clipped)
    cut = clipped > plain
    if dual_clip is not None:
        bound = -dual_clip * advantage
        cut |= (advantage < 0) & (loss > bound)
        loss = jnp.where(advantage < 0, jnp.minimum(loss, bound), loss)
    gap = jnp.abs(difference)
    sums = {
        "clip_frac": jnp.sum(_only(mask, cut.astype(jnp.float32))),
        "approx_kl": jnp.sum(_only(mask, jnp.expm1(log_ratio) - log_ratio)),
        "ratio": jnp.sum(_only(mask, ratio)),
        "logprob_diff": jnp.sum(_only(mask, gap)),
        "logprob_diff_max": jnp.max(_only(mask, gap), initial=0.0),
        "tokens": jnp.sum(mask.astype(jnp.float32)),
    }
    return jnp.sum(_only(mask, loss * weight)), jax.lax.stop_gradient(sums)


def cross_entropy(
    logprobs: Float[Array, "*n"], weights: Float[Array, "*n"], greedy: Bool[Array, "*n"], mask: Bool[Array, "*n"]
) -> tuple[Float[Array, ""], Sums]:
    """Negative log-likelihood of given tokens, for the cold start.

    `greedy` says where the given token is the most likely one. Sums over tokens of full weight (the model's own, not the
    prompt's): their nll, how many the model would have chosen (greedy), and their number (own_tokens); tokens counts all.
    """
    nll, weight = _only(mask, -logprobs), _only(mask, weights)
    own = mask & (weight >= 1.0)
    sums = {
        "nll": jnp.sum(_only(own, nll)),
        "greedy": jnp.sum((own & greedy).astype(jnp.float32)),
        "own_tokens": jnp.sum(own.astype(jnp.float32)),
        "tokens": jnp.sum(mask.astype(jnp.float32)),
    }
    return jnp.sum(_only(mask, nll * weight)), jax.lax.stop_gradient(sums)


def add_sums(left: Sums, right: Sums) -> Sums:
    """The sums of two parts of a batch together; names that end in _max keep the larger."""
    return {k: jnp.maximum(left[k], right[k]) if k.endswith("_max") else left[k] + right[k] for k in left}
