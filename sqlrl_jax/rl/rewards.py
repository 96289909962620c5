"""What an episode's reward becomes before advantages are made of it: truncated and overlong ones, spent turns.

Pure functions of finished episodes. What an answer is worth is the environment's business, and stays in the episode.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from rollout.types import Trajectory
from sqlrl_jax.config import Config


def truncated(episode: Trajectory) -> bool:
    """True when the last turn was cut off, or the context was full, so that the episode could not end as it wanted."""
    return episode.stop_reason in ("length", "overflow")


def overlong_penalty(tokens: int, limit: int, buffer: int, factor: float) -> float:
    """Soft overlong punishment (DAPO, arXiv:2503.14476): 0 up to limit - buffer tokens, -factor from the limit
    on, linear between. `buffer` 0 is none."""
    if buffer == 0:
        return 0.0
    return -factor * min(max(tokens - (limit - buffer), 0) / buffer, 1.0)


def turn_cost(episode: Trajectory, penalty: float) -> float:
    """What a right answer loses for its turns after the first. A wrong one loses nothing, or giving up at once would pay."""
    return penalty * max(len(episode.turns) - 1, 0) if episode.outcome == "correct" else 0.0


def final_rewards(episodes: Sequence[Trajectory], config: Config) -> Float[np.ndarray, " episodes"]:
    """Rewards as advantages see them: 0 for truncated episodes (generator.zero_reward_on_non_stop), less the cost of turns
    (trainer.algorithm.turn_penalty) and the penalty for long ones (trainer.algorithm.overlong_buffer). An episode's length
    is its whole context, observations included, because that is what generator.max_input_length bounds."""
    generator, buffer = config.generator, config.trainer.algorithm.overlong_buffer
    out = []
    for episode in episodes:
        zero = generator.zero_reward_on_non_stop and truncated(episode)
        earned = 0.0 if zero else episode.reward - turn_cost(episode, config.trainer.algorithm.turn_penalty)
        tokens = len(episode.prompt_ids) + len(episode.response_ids)
        penalty = overlong_penalty(tokens, generator.max_input_length, buffer.len, buffer.penalty_factor)
        out.append(earned + penalty)
    return np.array(out, np.float64)
