"""How good each episode was, relative to others: advantages from rewards.

Plain NumPy in float64 on the host: a batch has a few numbers an episode, so nothing here is worth a device. The estimators
are pure functions; ESTIMATORS names them for trainer.algorithm.advantage_estimator. Tokens are an episode's sampled ones:
observations are not steps, so a return or a value passes over them. The critic itself is critic.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.signal import lfilter

from rollout.errors import UserError
from sqlrl_jax.config_algorithm import AlgorithmConfig
from sqlrl_jax.rl.own import load_function

EPSILON = 1e-6
KEY = "trainer.algorithm.advantage_estimator"


@dataclass(frozen=True)
class Rewards:
    """A batch of episodes as an estimator sees it: what each earned, its question, and how many tokens it sampled.

    `token_rewards` are the same rewards where they were earned, an array of `lengths[i]` an episode; not given, all of it
    came with the last token. `values` are the critic's, of each token before it was sampled.
    """

    rewards: Float[np.ndarray, " episodes"]
    groups: Sequence[Hashable]
    lengths: Int[np.ndarray, " episodes"]
    token_rewards: Sequence[np.ndarray] = ()
    values: Sequence[np.ndarray] = ()

    def at_tokens(self) -> list[Float[np.ndarray, " tokens"]]:
        """The rewards at each episode's tokens. Raises ValueError for what is not finite or does not fit."""
        if not len(self.token_rewards):
            values = _checked(self.rewards, len(self.lengths))
            return [np.append(np.zeros(max(n - 1, 0)), r)[:n] for r, n in zip(values, self.lengths, strict=True)]
        return _per_token("rewards", self.token_rewards, self.lengths)


# One number an episode, or for each episode one number a sampled token.
Advantages = Float[np.ndarray, " episodes"] | Sequence[np.ndarray]
Estimator = Callable[[Rewards, AlgorithmConfig], Advantages]


def grpo(
    rewards: Float[np.ndarray, " episodes"], groups: Sequence[Hashable], norm_by_std: bool = True
) -> Float[np.ndarray, " episodes"]:
    """Group-relative advantages (arXiv:2402.03300): (R - mean) / (std + 1e-6), std unbiased, inside each group.

    `groups` names the group of each episode (its question). A group of one has mean 0 and std 1, so its advantage is its
    reward. `norm_by_std=False` leaves the division out (Dr. GRPO, arXiv:2503.20783). Non-finite rewards raise ValueError.
    """

    def of_group(reward: np.ndarray) -> np.ndarray:
        if len(reward) == 1:
            return reward / (1.0 + EPSILON) if norm_by_std else reward
        return (reward - reward.mean()) / (reward.std(ddof=1) + EPSILON if norm_by_std else 1.0)

    return _by_group(rewards, groups, of_group)


def rloo(rewards: Float[np.ndarray, " episodes"], groups: Sequence[Hashable]) -> Float[np.ndarray, " episodes"]:
    """Leave-one-out advantages (arXiv:2402.14740): R minus the mean of the others, which is (R - mean) n / (n - 1).

    A group of one has nobody to be compared with: 0. Non-finite rewards raise ValueError.
    """

    def of_group(reward: np.ndarray) -> np.ndarray:
        n = len(reward)
        return (reward - reward.mean()) * (n / (n - 1)) if n > 1 else np.zeros(1)

    return _by_group(rewards, groups, of_group)


def maxrl(rewards: Float[np.ndarray, " episodes"], groups: Sequence[Hashable]) -> Float[np.ndarray, " episodes"]:
    """Maximum-likelihood RL (arXiv:2602.02710): (R - mean) / (mean + 1e-6): a question weighs the more, the rarer a
    success. A group of one keeps its reward. Negative rewards raise UserError, non-finite ones ValueError."""

    def of_group(reward: np.ndarray) -> np.ndarray:
        mean = reward.mean()
        return (reward - mean) / (mean + EPSILON) if len(reward) > 1 else reward

    values = np.asarray(rewards, np.float64)
    if (values < 0).any():
        raise UserError(
            f"{KEY} maxrl divides by the mean reward of a question and needs none below 0, but an episode earned "
            f"{values.min():g}: use another estimator or rewards from 0 up"
        )
    return _by_group(values, groups, of_group)


def reinforce_plus_plus(batch: Rewards, gamma: float = 1.0) -> list[Float[np.ndarray, " tokens"]]:
    """REINFORCE++ (arXiv:2501.03262): discounted returns of the sampled tokens, whitened over all tokens of the batch.

    A reward k tokens later counts gamma^k. One array an episode. Non-finite rewards raise ValueError.
    """
    return whiten([_discounted(rewards, gamma) for rewards in batch.at_tokens()])


def gae_returns(batch: Rewards, gamma: float, lambd: float) -> list[Float[np.ndarray, " tokens"]]:
    """What the critic is trained on: each token's value plus its advantage before whitening (arXiv:1506.02438).

    A_t = Σ_k (gamma lambd)^k (r_{t+k} + gamma V_{t+k+1} - V_{t+k}), over the tokens of an episode; V after the last is 0,
    also where the episode was cut off. Raises ValueError for what is not finite.
    """
    values = _per_token("values", batch.values, batch.lengths)
    out = []
    for rewards, value in zip(batch.at_tokens(), values, strict=True):
        delta = rewards + gamma * np.append(value[1:], 0.0)[: len(value)] - value
        out.append(value + _discounted(delta, gamma * lambd))
    return out


def gae(batch: Rewards, gamma: float = 1.0, lambd: float = 1.0) -> list[Float[np.ndarray, " tokens"]]:
    """Generalised advantage estimation (arXiv:1506.02438), whitened over all tokens of the batch. See `gae_returns`."""
    returns = gae_returns(batch, gamma, lambd)
    return whiten([r - np.asarray(v, np.float64) for r, v in zip(returns, batch.values, strict=True)])


def whiten(parts: Sequence[Float[np.ndarray, " tokens"]]) -> list[Float[np.ndarray, " tokens"]]:
    """(x - mean) / sqrt(variance + 1e-8) over all numbers of all parts, variance unbiased; all equal, or one alone, gives
    zeros."""
    tokens = np.concatenate(parts) if parts else np.zeros(0)
    if len(tokens) < 2 or (tokens == tokens[0]).all():
        return [np.zeros(len(part), np.float32) for part in parts]
    mean, scale = tokens.mean(), 1.0 / np.sqrt(tokens.var(ddof=1) + 1e-8)
    return [((part - mean) * scale).astype(np.float32) for part in parts]


def _discounted(rewards: Float[np.ndarray, " tokens"], gamma: float) -> Float[np.ndarray, " tokens"]:
    """Σ_k gamma^k r_{t+k} for every t."""
    return lfilter([1.0], [1.0, -gamma], rewards[::-1])[::-1] if len(rewards) else rewards


def _per_token(what: str, parts: Sequence[np.ndarray], lengths: Int[np.ndarray, " episodes"]) -> list[np.ndarray]:
    out = [np.asarray(part, np.float64) for part in parts]
    shapes = [part.shape for part in out]
    if shapes != [(n,) for n in lengths]:
        raise ValueError(f"{what} of shapes {shapes[:3]} … for episodes of {list(lengths)[:3]} … sampled tokens")
    for i, part in enumerate(out):
        if not np.isfinite(part).all():
            raise ValueError(f"{what} of episode {i} are not finite")
    return out


def _checked(rewards: np.ndarray, episodes: int) -> np.ndarray:
    values = np.asarray(rewards, np.float64)
    if values.shape != (episodes,):
        raise ValueError(f"rewards have shape {values.shape} for {episodes} groups: expected one reward an episode")
    if not np.isfinite(values).all():
        raise ValueError(f"reward of episode {int(np.flatnonzero(~np.isfinite(values))[0])} is not finite")
    return values


def _by_group(
    rewards: np.ndarray, groups: Sequence[Hashable], of_group: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    values = _checked(rewards, len(groups))
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    out = np.zeros_like(values)
    for index in members.values():
        reward = values[index]
        if len(index) == 1 or (reward != reward[0]).any():  # exactly 0 where the mean of equal numbers is off a bit
            out[index] = of_group(reward)
    return out.astype(np.float32)


ESTIMATORS: dict[str, Estimator] = {
    "grpo": lambda batch, settings: grpo(batch.rewards, batch.groups, settings.grpo_norm_by_std),
    "rloo": lambda batch, settings: rloo(batch.rewards, batch.groups),
    "reinforce++": lambda batch, settings: reinforce_plus_plus(batch, settings.gamma),
    "maxrl": lambda batch, settings: maxrl(batch.rewards, batch.groups),
    "gae": lambda batch, settings: gae(batch, settings.gamma, settings.lambd),
}


def load_estimator(name: str) -> Estimator:
    """The estimator of that name, or the user's own at package.module:function, whose result is checked."""
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    function = load_function(KEY, name)
    return lambda batch, settings: _own(name, function(batch, settings), batch)


def _own(name: str, result: Any, batch: Rewards) -> Advantages:
    """Refuses what is neither one finite number an episode nor one finite number a sampled token."""
    try:
        whole = [np.asarray(part, np.float32) for part in result]
    except (TypeError, ValueError) as error:
        raise UserError(f"{KEY} = {name!r} returned {type(result).__name__} and not numbers: {error}") from error
    fits = len(whole) == len(batch.rewards) and (
        all(part.shape == () for part in whole)
        or all(part.shape == (n,) for part, n in zip(whole, batch.lengths, strict=True))
    )
    if not fits:
        raise UserError(
            f"{KEY} = {name!r} returned {len(whole)} advantages of shapes {sorted({p.shape for p in whole})[:3]} for "
            f"{len(batch.rewards)} episodes: expected one number an episode, or for each an array of its `lengths`"
        )
    bad = [i for i, part in enumerate(whole) if not np.isfinite(part).all()]
    if bad:
        raise UserError(f"{KEY} = {name!r}: the advantage of episode {bad[0]} is not finite")
    return np.array(whole) if whole and whole[0].shape == () else whole


def advantage_metrics(rewards: Float[np.ndarray, " episodes"], advantages: Advantages) -> dict[str, float]:
    """Means over the episodes of a batch: what rewards became, and the advantages (of an episode, of its tokens)."""
    means = [float(np.mean(a)) for a in advantages if np.size(a)]
    sizes = [float(np.mean(np.abs(a))) for a in advantages if np.size(a)]
    return {
        "loss/avg_final_rewards": float(np.mean(rewards)),
        "loss/avg_raw_advantages": float(np.mean(means)) if means else 0.0,
        "loss/avg_raw_advantages_abs": float(np.mean(sizes)) if sizes else 0.0,
    }
