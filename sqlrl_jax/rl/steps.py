"""Episodes cut into their turns, each a sample of its own: what it was generated from is its prompt.

For chat templates that rewrite what came before, where no one sequence holds the whole episode as it was sampled. Where
each turn went on from all before it, a step's context is a beginning of the episode, and cutting it changes only what is
one sample: the means of sequence_mean, the ratios of a whole sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rollout.types import Trajectory
from sqlrl_jax.rl.rewards import turn_ends


def steps_of(episode: Trajectory) -> list[Trajectory]:
    """One episode of a single turn for each turn that sampled something. All keep the episode's question, reward, outcome
    and end. Raises ValueError where turns, mask and contexts do not belong together."""
    if episode.contexts and len(episode.contexts) != len(episode.turns):
        raise ValueError(
            f"task {episode.task_id} sample {episode.sample}: {len(episode.contexts)} contexts for "
            f"{len(episode.turns)} turns"
        )
    sampled, begin, out = np.flatnonzero(episode.loss_mask).tolist(), 0, []
    for number, (end, turn) in enumerate(zip(turn_ends(episode), episode.turns, strict=True)):
        if begin == end:
            continue
        first, last = sampled[begin], sampled[end - 1] + 1
        before = [*episode.prompt_ids, *episode.response_ids[:first]]
        out.append(
            replace(
                episode,
                prompt_ids=episode.contexts[number] if episode.contexts else before,
                response_ids=episode.response_ids[first:last],
                loss_mask=episode.loss_mask[first:last],
                logprobs=episode.logprobs[first:last],
                spans=_cut(episode.spans, first, last),
                turns=[turn],
                contexts=[],
            )
        )
        begin = end
    return out


def _cut(spans: Sequence[tuple[int, int, int]], first: int, last: int) -> list[tuple[int, int, int]]:
    inside = [(version, max(start, first) - first, min(end, last) - first) for version, start, end in spans]
    return [(version, start, end) for version, start, end in inside if start < end]


class Parts:
    """Episodes and the samples they are trained as. `owners[i]` is the episode of sample i."""

    def __init__(self, episodes: Sequence[Trajectory], step_wise: bool) -> None:
        parts = [steps_of(episode) if step_wise else [episode] for episode in episodes]
        self.samples = [sample for part in parts for sample in part]
        self.owners = [i for i, part in enumerate(parts) for _ in part]
        self._episodes = len(episodes)

    def join(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Of each sample's tokens → of each episode's, turn after turn."""
        out: list[list[np.ndarray]] = [[] for _ in range(self._episodes)]
        for owner, value in zip(self.owners, values, strict=True):
            out[owner].append(value)
        return [np.concatenate(part) if part else np.zeros(0, np.float32) for part in out]

    def split(self, values: Sequence[np.ndarray] | np.ndarray) -> list[np.ndarray]:
        """The inverse; a single number of an episode goes to all its samples."""
        used, out = [0] * self._episodes, []
        for owner, sample in zip(self.owners, self.samples, strict=True):
            value = np.asarray(values[owner])
            if value.ndim:
                size = sum(sample.loss_mask)
                value = value[used[owner] : used[owner] + size]
                used[owner] += size
            out.append(value)
        return out
