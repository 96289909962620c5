"""Where a step's episodes come from: whole batches played one after another. streamed.py has those that never stop.

A source hands the training loop one batch after another and is told when one was trained on. `Sieve` picks a batch's groups
(a question with its episodes): all, or with trainer.algorithm.dynamic_sampling those whose rewards differ (DAPO,
arXiv:2503.14476), and then more questions are asked until the batch is full. The state of a source is its supply's.

Left out: replacing groups without spread by copies of others (the reference's `replace`), which trains twice on the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import numpy as np

from rollout.types import Task, Trajectory
from sqlrl_jax.config import Config
from sqlrl_jax.data.order import Supply
from sqlrl_jax.fleet import Fleet, sampling_params
from sqlrl_jax.rl.rewards import final_rewards


@dataclass(frozen=True)
class Group:
    """All episodes of one question, by sample; `position` is the question's in the supply."""

    position: int
    episodes: list[Trajectory]


@dataclass(frozen=True)
class Watch:
    """What a person sees, and may ask for, while episodes are waited for."""

    bar: Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
    """Display.bar: a live bar of so many episodes."""
    heed: Callable[[], None]
    """Raises Stopped once a stop was asked for."""

    def follow(self, bar: Callable[[int], None]) -> Callable[[Trajectory], None]:
        """Moves a bar with each episode that arrives, and lets Ctrl-C leave the wait."""
        done = 0

        def on_trajectory(_: Trajectory) -> None:
            nonlocal done
            done += 1
            bar(done)
            self.heed()

        return on_trajectory


@dataclass(frozen=True)
class Batch:
    """The groups of one step, and what is to be said of how they came. One question may be there twice, of two epochs, where
    there are few; it is then one group to advantages and minibatches."""

    groups: list[Group]
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def episodes(self) -> list[Trajectory]:
        return [episode for group in self.groups for episode in group.episodes]


class Batches(Protocol):
    """A source of batches."""

    def take(self, step: int) -> Batch | None:
        """The episodes for step `step` + 1, whose update starts from version `step` of the weights. None when the
        questions do not make another batch. Raises Stopped, InfrastructureError."""

    def trained(self, batch: Batch) -> None:
        """The batch was trained on, and the new weights are live."""

    def close(self) -> None:
        """Ends episodes that are still running."""


class Sieve:
    """The groups of one batch as they come; `offer` until `done`."""

    def __init__(self, config: Config) -> None:
        sampling = config.trainer.algorithm.dynamic_sampling
        self._config, self._size = config, config.trainer.train_batch_size
        self._filters = sampling.type == "filter"
        self._limit = sampling.max_sample_batches * self._size if sampling.max_sample_batches > 0 else math.inf
        self.kept: list[Group] = []
        self.without_spread: list[Group] = []
        self._reward = 0.0

    @property
    def offered(self) -> int:
        return len(self.kept) + len(self.without_spread)

    @property
    def positions(self) -> list[int]:
        """Where the groups that were offered are in the supply."""
        return [group.position for group in (*self.kept, *self.without_spread)]

    @property
    def done(self) -> bool:
        """Whether the batch is full, or as many groups were looked at as may be."""
        return len(self.kept) == self._size or self.offered >= self._limit

    def wanted(self) -> int:
        """How many questions to ask at once: as many as will fill the batch if they go like those before."""
        missing = self._size - len(self.kept)
        expected = math.ceil(missing * self.offered / len(self.kept)) if self.kept else self._size
        return max(missing, min(expected, self._size)) if self.offered else self._size

    def offer(self, group: Group) -> bool:
        """Takes a group into the batch, or leaves it out for want of spread (False)."""
        rewards = final_rewards(group.episodes, self._config)
        keep = not self._filters or bool(rewards.max() > rewards.min())
        (self.kept if keep else self.without_spread).append(group)
        self._reward += float(np.mean([episode.reward for episode in group.episodes]))
        return keep

    def batch(self) -> Batch:
        """The batch. Where the limit came first it is filled up with the last groups without spread, which teach nothing."""
        if not self._filters:
            return Batch(self.kept)
        missing = self._size - len(self.kept)
        filling = self.without_spread[-missing:] if missing else []
        metrics = {
            "generate/sample_batches": self.offered / self._size,
            "generate/groups_without_spread": float(len(self.without_spread)),
            "generate/groups_missing": float(missing),
            "reward/avg_sampled_reward": self._reward / max(1, self.offered),
        }
        return Batch(self.kept + filling, metrics)


class SynchronousBatches:
    """Each batch is played from beginning to end by the weights of its step. A resumed run repeats it exactly, also when it
    was stopped in the middle of one: until a batch is whole, all that was asked for it is owed."""

    def __init__(self, config: Config, supply: Supply, fleet: Fleet, watch: Watch) -> None:
        self._config, self._supply, self._fleet, self._watch = config, supply, fleet, watch
        self._offered: list[int] = []

    def take(self, step: int) -> Batch | None:
        sieve, attempt, left = Sieve(self._config), 0, list[int]()
        while not sieve.done:
            asked = self._supply.take(sieve.wanted()) or self._supply.take(sieve.wanted(), repeat=True)
            if not asked:
                self._supply.used(sieve.positions)
                return None
            episodes = groups_of(self._play([task for _, task in asked], step, attempt))
            for (position, _), group in zip(asked, episodes, strict=True):
                if sieve.done:
                    left.append(position)
                else:
                    sieve.offer(Group(position, group))
            attempt += 1
        self._supply.again(left)
        self._offered = sieve.positions
        return sieve.batch()

    def trained(self, batch: Batch) -> None:
        self._supply.used(self._offered)

    def close(self) -> None:
        """Nothing runs between two batches."""

    def _play(self, tasks: Sequence[Task], step: int, attempt: int) -> list[Trajectory]:
        generator, trainer = self._config.generator, self._config.trainer
        samples = generator.n_samples_per_prompt
        with self._watch.bar("rollout", len(self._fleet.share(tasks)) * samples) as bar:
            return self._fleet.rollout(
                tasks,
                samples=samples,
                sampling=sampling_params(generator.sampling_params),
                version=step,
                seed=trainer.seed * 1_000_003 + step + (attempt << 40),
                max_turns=generator.max_turns,
                on_trajectory=self._watch.follow(bar),
            )


def groups_of(episodes: Sequence[Trajectory]) -> Iterator[list[Trajectory]]:
    """Cuts episodes that lie question by question into groups."""
    for _, group in groupby(episodes, lambda episode: episode.task_id):
        yield list(group)
