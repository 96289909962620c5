"""Policy losses of single tokens: pure functions of the trained tokens and the algorithm's settings.

Each returns the loss of every token, to be minimised, and where the token lost its gradient. Weights, masks, corrections
and sums are objective.py's: nothing is divided here, so a mean is never a mean of means. A = advantage, r = exp(clamp(new -
old, ±20)), sg = no gradient. POLICY_LOSSES names them for trainer.algorithm.policy_loss_type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rollout.errors import UserError
from sqlrl_jax.config_algorithm import AlgorithmConfig
from sqlrl_jax.rl.own import load_function
from sqlrl_jax.rl.tokens import LOG_RATIO_LIMIT, Tokens, episode_sums, of_episode, only

Sums = dict[str, Float[Array, ""]]


class TokenLoss(NamedTuple):
    """`loss` of each token; `clipped` where a bound took the token's gradient or, for cispo, held its weight."""

    loss: Float[Array, "shards slots"]
    clipped: Bool[Array, "shards slots"]


PolicyLoss = Callable[[Tokens, AlgorithmConfig], TokenLoss]


def _clip(ratio: Array, advantages: Array, settings: AlgorithmConfig) -> TokenLoss:
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - settings.eps_clip_low, 1.0 + settings.eps_clip_high)
    return TokenLoss(jnp.maximum(plain, clipped), clipped > plain)


def ppo(tokens: Tokens, settings: AlgorithmConfig) -> TokenLoss:
    """PPO's clipped surrogate (arXiv:1707.06347) with its own bound on each side (clip-higher, arXiv:2503.14476):
    max(-A r, -A clip(r, 1 - eps_clip_low, 1 + eps_clip_high))."""
    return _clip(jnp.exp(tokens.log_ratio), tokens.advantages, settings)


def dual_clip(tokens: Tokens, settings: AlgorithmConfig) -> TokenLoss:
    """ppo, and for A < 0 at most -c A, c = clip_ratio_c (arXiv:1912.09729)."""
    loss, clipped = ppo(tokens, settings)
    bound = -settings.clip_ratio_c * tokens.advantages
    beyond = (tokens.advantages < 0) & (loss > bound)
    return TokenLoss(jnp.where(beyond, bound, loss), clipped | beyond)


def gspo(tokens: Tokens, settings: AlgorithmConfig) -> TokenLoss:
    """Sequence-level ratio, the token form of GSPO (arXiv:2507.18071): ppo's loss with s new / sg(new) for r (new, old as
    probabilities), log s = sg(mean of log new - log old over the episode's trained tokens)."""
    counts = episode_sums(tokens.mask.astype(jnp.float32), tokens.episodes)
    means = episode_sums(tokens.logprobs - tokens.old_logprobs, tokens.episodes) / jnp.maximum(counts, 1.0)
    log_s = jnp.clip(of_episode(means, tokens.episodes), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = jnp.exp(jax.lax.stop_gradient(log_s) + tokens.logprobs - jax.lax.stop_gradient(tokens.logprobs))
    return _clip(ratio, tokens.advantages, settings)


def cispo(tokens: Tokens, settings: AlgorithmConfig) -> TokenLoss:
    """CISPO (arXiv:2506.13585): -A sg(clip(r, 1 - low, 1 + high)) new: the weight is bounded, every token keeps its
    gradient. `clipped` tells where it is bounded."""
    ratio = jnp.exp(tokens.log_ratio)
    low, high = 1.0 - settings.cispo.cispo_eps_clip_low, 1.0 + settings.cispo.cispo_eps_clip_high
    weight = jax.lax.stop_gradient(jnp.clip(ratio, low, high))
    return TokenLoss(-tokens.advantages * weight * tokens.logprobs, (ratio < low) | (ratio > high))


def sapo(tokens: Tokens, settings: AlgorithmConfig) -> TokenLoss:
    """Soft gate in place of the clip (arXiv:2511.20347): -A 4/tau sigmoid(tau (r - 1)), tau = tau_pos where A > 0, tau_neg
    elsewhere."""
    tau = jnp.where(tokens.advantages > 0, settings.sapo.tau_pos, settings.sapo.tau_neg)
    gate = 4.0 / tau * jax.nn.sigmoid(tau * (jnp.exp(tokens.log_ratio) - 1.0))
    return TokenLoss(-tokens.advantages * gate, jnp.zeros_like(tokens.mask))


def _rollout_ratio(tokens: Tokens) -> Array:
    return jnp.exp(jnp.clip(tokens.logprobs - tokens.rollout_logprobs, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def dppo(tokens: Tokens, settings: AlgorithmConfig) -> TokenLoss:
    """Trust region by divergence (arXiv:2602.04879): -A r to the rollout's policy, 0 where the token
    has moved away from it, in the direction A asks for, by more than delta.

    With p the present and q the rollout's probability of the token, binary_tv is |p - q|, and binary_kl is
    q log(q / p) + (1 - q) log((1 - q) / (1 - p)).
    """
    p, q = jnp.exp(jax.lax.stop_gradient(tokens.logprobs)), jnp.exp(tokens.rollout_logprobs)
    if settings.dppo.dppo_type == "binary_tv":
        moved = jnp.abs(p - q)
    else:
        other = jnp.log((1.0 - q + 1e-8) / (1.0 - p + 1e-8))
        moved = q * (tokens.rollout_logprobs - jax.lax.stop_gradient(tokens.logprobs)) + (1.0 - q) * other
    up = (tokens.advantages > 0) & (p > q) & (moved > settings.dppo.delta_high)
    down = (tokens.advantages < 0) & (p < q) & (moved > settings.dppo.delta_low)
    return TokenLoss(only(~(up | down), -tokens.advantages * _rollout_ratio(tokens)), up | down)


def importance_sampling(tokens: Tokens, settings: AlgorithmConfig) -> TokenLoss:
    """Policy gradient with the plain ratio to the rollout's policy and no bound: -A r."""
    return TokenLoss(-tokens.advantages * _rollout_ratio(tokens), jnp.zeros_like(tokens.mask))


def clip_cov(tokens: Tokens, settings: AlgorithmConfig) -> TokenLoss:
    """Clip-Cov (arXiv:2505.22617): ppo, and no gradient at the tokens that covariance.py selected."""
    loss, clipped = ppo(tokens, settings)
    return TokenLoss(only(~tokens.selected, loss), clipped | tokens.selected)


def kl_cov(tokens: Tokens, settings: AlgorithmConfig) -> TokenLoss:
    """KL-Cov (arXiv:2505.22617): -A r, and at the tokens that covariance.py selected plus coefficient times the KL of the
    old policy from the present one, r - 1 - log r.

    The paper's code has |log r| here. Its gradient on policy is the sign of a rounding error; this one's is zero.
    """
    log_ratio = tokens.log_ratio
    ratio = jnp.exp(log_ratio)
    penalty = settings.kl_cov.ppo_kl_coef * (ratio - 1.0 - log_ratio)
    return TokenLoss(-tokens.advantages * ratio + only(tokens.selected, penalty), jnp.zeros_like(tokens.mask))


def cross_entropy(tokens: Tokens, settings: AlgorithmConfig) -> TokenLoss:
    """Imitation of what was better than its baseline (rejection sampling, arXiv:2304.06767): -log p where A > 0, whatever A
    is there; 0 elsewhere. There is no ratio, so nothing holds a step near the policy but its size."""
    return TokenLoss(only(tokens.advantages > 0, -tokens.logprobs), jnp.zeros_like(tokens.mask))


POLICY_LOSSES: dict[str, PolicyLoss] = {
    "ppo": ppo,
    "dual_clip": dual_clip,
    "gspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
    "dppo": dppo,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "importance_sampling": importance_sampling,
    "cross_entropy": cross_entropy,
}


def load_policy_loss(name: str) -> PolicyLoss:
    """The loss of that name, or the user's own at package.module:function, whose result's shapes are checked."""
    if name in POLICY_LOSSES:
        return POLICY_LOSSES[name]
    key = "trainer.algorithm.policy_loss_type"
    function = load_function(key, name)

    def checked(tokens: Tokens, settings: AlgorithmConfig) -> TokenLoss:
        result = function(tokens, settings)
        shape = tokens.mask.shape
        parts = result if isinstance(result, tuple) else (result,)
        if len(parts) != 2 or any(getattr(part, "shape", None) != shape for part in parts):
            found = ", ".join(f"{type(part).__name__} {getattr(part, 'shape', '')}" for part in parts)
            raise UserError(
                f"{key} = {name!r} returned {found}: expected TokenLoss(loss, clipped), two arrays of the tokens' "
                f"shape {shape}"
            )
        return TokenLoss(*result)

    return checked


def next_token_loss(
    logprobs: Float[Array, "*n"], weights: Float[Array, "*n"], greedy: Bool[Array, "*n"], mask: Bool[Array, "*n"]
) -> tuple[Float[Array, ""], Sums]:
    """Summed negative log-likelihood of given tokens, for the cold start.

    `greedy` says where the given token is the most likely one. Sums over tokens of full weight (the model's own, not the
    prompt's): their nll, how many the model would have chosen (greedy), and their number (own_tokens); tokens counts all.
    """
    nll, weight = only(mask, -logprobs), only(mask, weights)
    own = mask & (weight >= 1.0)
    sums = {
        "nll": jnp.sum(only(own, nll)),
        "greedy": jnp.sum((own & greedy).astype(jnp.float32)),
        "own_tokens": jnp.sum(own.astype(jnp.float32)),
        "tokens": jnp.sum(mask.astype(jnp.float32)),
    }
    return jnp.sum(only(mask, nll * weight)), jax.lax.stop_gradient(sums)


def add_sums(left: Sums, right: Sums, larger: Callable[..., Array] = jnp.maximum) -> Sums:
    """The sums of two parts of a batch together; names that end in _max keep the larger. On the host give np.maximum as
    `larger`: jax would compile a program for it."""
    return {k: larger(left[k], right[k]) if k.endswith("_max") else left[k] + right[k] for k in left}
