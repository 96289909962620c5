"""The critic's loss and how well it explains what was earned: pure functions of values and returns."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sqlrl_jax.rl.losses import Sums
from sqlrl_jax.rl.tokens import only


def value_loss(
    values: Float[Array, "shards slots"],
    old_values: Float[Array, "shards slots"],
    returns: Float[Array, "shards slots"],
    mask: Bool[Array, "shards slots"],
    clip: float | None,
) -> tuple[Float[Array, ""], Sums]:
    """Half the squared distance from the returns, summed over the trained tokens, as PPO's code has it
    (arXiv:2005.12729): max((V - R)^2, (V_old + clamp(V - V_old, ±clip) - R)^2) / 2, without the second for None.

    Sums over tokens: clip_frac (where the second is larger, so that the token lost its gradient), tokens.
    """
    values, old, returns = only(mask, values), only(mask, old_values), only(mask, returns)
    error = jnp.square(values - returns)
    clipped = jnp.zeros_like(error)
    if clip is not None:
        clipped = jnp.square(old + jnp.clip(values - old, -clip, clip) - returns)
    sums = {
        "clip_frac": jnp.sum((clipped > error).astype(jnp.float32)),
        "tokens": jnp.sum(mask.astype(jnp.float32)),
    }
    return 0.5 * jnp.sum(jnp.maximum(error, clipped)), jax.lax.stop_gradient(sums)


def explained_variance(values: Sequence[np.ndarray], returns: Sequence[np.ndarray]) -> float:
    """1 - Var(R - V) / Var(R) over all tokens: 1 is a perfect critic, 0 one that says a constant; 0 where all returns are
    equal."""
    v, r = (np.concatenate(parts).astype(np.float64) if len(parts) else np.zeros(0) for parts in (values, returns))
    variance = r.var() if len(r) else 0.0
    return float(1.0 - (r - v).var() / variance) if variance > 0 else 0.0
