"""From a batch of finished episodes to a step of the learner: rewards, KL, values, advantages, both models' steps.

The one place that knows the order: the critic speaks before it learns, and learns before the policy. Everything is
counted over whole episodes, also where each turn is a sample of its own. What the figures mean is in rl/; how a step is
made, in learner.py and critic.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rollout.types import Trajectory
from sqlrl_jax.learner import Learner
from sqlrl_jax.rl.advantages import Estimator, Rewards, advantage_metrics, gae_returns
from sqlrl_jax.rl.kl_control import episode_mean, next_coefficient
from sqlrl_jax.rl.rewards import final_rewards, token_rewards
from sqlrl_jax.rl.steps import Parts


def learn(learner: Learner, estimator: Estimator, episodes: Sequence[Trajectory]) -> dict[str, float]:
    """Trains on a batch of episodes; returns the metrics named policy/*, critic/* and loss/*."""
    algorithm = learner.config.trainer.algorithm
    parts = Parts(episodes, learner.config.generator.step_wise_trajectories)
    finals = final_rewards(episodes, learner.config)
    tokens = token_rewards(episodes, finals, learner.config)
    metrics: dict[str, float] = {}
    if algorithm.use_kl_in_reward:
        kls = parts.join(learner.reference_kls(parts.samples))
        tokens = [reward - learner.kl_coef * kl for reward, kl in zip(tokens, kls, strict=True)]
        finals -= learner.kl_coef * np.array([kl.sum() for kl in kls])
        metrics["loss/avg_kl"] = episode_mean(kls)
    values = parts.join(learner.critic.values(parts.samples)) if learner.critic else ()
    lengths = np.array([sum(episode.loss_mask) for episode in episodes])
    batch = Rewards(finals, [episode.task_id for episode in episodes], lengths, tokens, values)
    advantages = estimator(batch, algorithm)
    if learner.critic:
        returns = gae_returns(batch, algorithm.gamma, algorithm.lambd)
        metrics |= learner.critic.update(parts.samples, parts.split(values), parts.split(returns))
    metrics |= learner.update(parts.samples, parts.split(advantages), parts.owners)
    metrics |= advantage_metrics(finals, advantages)
    if algorithm.needs_reference:
        metrics["loss/kl_loss_coef"] = learner.kl_coef
        measured = metrics.get("loss/avg_kl", metrics.get("policy/policy_kl"))
        if measured is not None:  # no step was made, so nothing was scored
            learner.kl_coef = next_coefficient(learner.kl_coef, measured, len(episodes), algorithm.kl_ctrl)
    return metrics
