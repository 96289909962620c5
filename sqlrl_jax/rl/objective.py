"""The summed loss of a micro-batch: policy loss, corrections, entropy, KL; and the sums behind its metrics.

Nothing is divided here: the step adds the sums of all micro-batches and devices and divides once by the minibatch's
divisor. What makes `token_mean` or `sequence_mean` is the weight of each token, made in data/packing.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sqlrl_jax.config_algorithm import AlgorithmConfig
from sqlrl_jax.rl.corrections import PER_EPISODE, correct
from sqlrl_jax.rl.kl import approximate_kl
from sqlrl_jax.rl.losses import PolicyLoss, Sums
from sqlrl_jax.rl.tokens import Tokens, episode_sums, only


def policy_objective(
    tokens: Tokens,
    entropy: Float[Array, "shards slots"],
    policy_loss: PolicyLoss,
    settings: AlgorithmConfig,
    kl_coef: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Sums]:
    """Sum over the trained tokens of weight x (correction x policy loss - entropy_loss_coef x entropy + kl_coef x KL from
    the reference), and sums. Without `kl_coef` it is the configuration's kl_loss_coef.

    Sums over tokens: clip_frac (tokens that a bound held), approx_kl (k3 of the old policy from the present), ratio_mean,
    entropy, logprob_diff and its largest (|present - rollout|), tokens, and those of the corrections; over episodes,
    under `episodes/`, those of the corrections; episodes. With use_kl_loss policy_kl, the KL from the reference.
    """
    loss, clipped = policy_loss(tokens, settings)
    sums: Sums = {}
    if settings.off_policy_correction.enabled:
        factor, sums = correct(tokens, settings.off_policy_correction)
        loss = only(factor != 0, loss) * factor
    if settings.use_entropy_loss:
        loss -= settings.entropy_loss_coef * only(tokens.mask, entropy)
    if settings.use_kl_loss:
        kl = approximate_kl(tokens.logprobs, tokens.reference_logprobs, settings.kl_estimator_type, jnp)
        loss += (settings.kl_loss_coef if kl_coef is None else kl_coef) * kl
        sums["policy_kl"] = jnp.sum(kl)  # 0 in masked places
    total = jnp.sum(only(tokens.mask, loss * tokens.weights))
    return total, jax.lax.stop_gradient(sums | _sums(tokens, clipped, entropy))


def _sums(tokens: Tokens, clipped: Array, entropy: Array) -> Sums:
    log_ratio = tokens.log_ratio  # 0 in masked places
    gap = jnp.abs(tokens.logprobs - tokens.rollout_logprobs)
    tokens_of = episode_sums(tokens.mask.astype(jnp.float32), tokens.episodes)
    return {
        "clip_frac": jnp.sum(only(tokens.mask, clipped.astype(jnp.float32))),
        "approx_kl": jnp.sum(jnp.expm1(log_ratio) - log_ratio),
        "ratio_mean": jnp.sum(only(tokens.mask, jnp.exp(log_ratio))),
        "entropy": jnp.sum(only(tokens.mask, entropy)),
        "logprob_diff": jnp.sum(gap),
        "logprob_diff_max": jnp.max(gap, initial=0.0),
        "tokens": jnp.sum(tokens.mask.astype(jnp.float32)),
        "episodes": jnp.sum((tokens_of > 0).astype(jnp.float32)),
    }


def means(sums: dict[str, float]) -> dict[str, float]:
    """Sums as means: over tokens, over episodes for those under `episodes/`; a largest value stays what it is. Without
    loss, tokens and episodes."""
    out = {}
    for name, value in sums.items():
        if name.endswith("_max"):
            out[name] = value
        elif name.startswith(PER_EPISODE):
            out[name.removeprefix(PER_EPISODE)] = value / sums["episodes"]
        elif name not in ("loss", "tokens", "episodes"):
            out[name] = value / sums["tokens"]
    return out
