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


def context_tokens(episode: Trajectory) -> int:
    """Tokens of the context at its longest, observations included: at the end, but where a template rewrites what came
    before."""
    if not episode.contexts:
        return len(episode.prompt_ids) + len(episode.response_ids)
    return max(len(ids) + turn.tokens for ids, turn in zip(episode.contexts, episode.turns, strict=True))


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
        penalty = overlong_penalty(
            context_tokens(episode), generator.max_input_length, buffer.len, buffer.penalty_factor
        )
        out.append(earned + penalty)
    return np.array(out, np.float64)


def token_rewards(
    episodes: Sequence[Trajectory], finals: Float[np.ndarray, " episodes"], config: Config
) -> list[Float[np.ndarray, " tokens"]]:
    """The same rewards at the sampled tokens: each turn's own with the turn's last token, and what `finals` has besides (a
    penalty) with the episode's last. A truncated episode that earns 0 by zero_reward_on_non_stop loses its turns' too."""
    out = []
    for episode, final in zip(episodes, finals, strict=True):
        rewards = np.zeros(sum(episode.loss_mask), np.float64)
        if len(rewards):
            if not (config.generator.zero_reward_on_non_stop and truncated(episode)):
                for end, turn in zip(turn_ends(episode), episode.turns, strict=True):
                    rewards[max(end - 1, 0)] += turn.reward
            rewards[-1] += final - rewards.sum()
        out.append(rewards)
    return out


def turn_ends(episode: Trajectory) -> list[int]:
    """How many tokens were sampled up to the end of each turn. Raises ValueError where the turns' tokens are not those of
    the mask."""
    ends = np.cumsum([turn.tokens for turn in episode.turns], dtype=int).tolist()
    sampled = sum(episode.loss_mask)
    if ends and ends[-1] != sampled:
        raise ValueError(
            f"task {episode.task_id} sample {episode.sample}: its turns have {ends[-1]} tokens, its loss_mask {sampled}"
        )
    return ends
