"""Orders of the questions by difficulty, as measured while training, for data/order.py's Supply.

The first epoch is a shuffle, because nothing is known yet. Each later one is sorted once, when it begins, by what the run has
measured until then; every question is still asked once an epoch. The state (what was measured, what the present epoch was
sorted by) is small JSON for the checkpoint: a resumed run asks the same questions as one that was never stopped.

Left out: asking questions more often or never, because then an epoch would no longer be an epoch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from rollout.errors import UserError
from rollout.types import Task, Trajectory
from sqlrl_jax.data.order import Order, Shuffled, steps_per_epoch

Difficulty = Literal["learnable_first", "easy_first"]
Kind = Literal["shuffled", "learnable_first", "easy_first"]
Counts = dict[str, tuple[int, int]]
"""Right answers and episodes of each question, by id."""

_KEYS: dict[Difficulty, Callable[[float], float]] = {
    "learnable_first": lambda rate: abs(rate - 0.5),  # a group's rewards differ most
    "easy_first": lambda rate: -rate,
}


class ByDifficulty:
    """Endless positions, `len` of them an epoch. Tell it what each batch measured."""

    def __init__(self, tasks: Sequence[Task], batch_size: int, seed: int, difficulty: Difficulty) -> None:
        self._tasks, self._seed, self._difficulty = tasks, seed, difficulty
        self._length = steps_per_epoch(len(tasks), batch_size) * batch_size
        self._measured: Counts = {}
        self._sorted_by: Counts = {}
        self._epoch, self._order = -1, list[int]()

    def __len__(self) -> int:
        return self._length

    def at(self, position: int) -> Task:
        """The question at a position, from 0, which is in the present epoch or a later one."""
        epoch, index = divmod(position, self._length)
        if epoch != self._epoch:
            self._epoch, self._sorted_by = epoch, dict(self._measured)
            self._order = self._sort()
        return self._tasks[self._order[index]]

    def tell(self, episodes: Sequence[Trajectory]) -> None:
        """The groups of a batch that was trained on. What dynamic sampling left out is judged by its source."""
        self._measured |= counts_of(episodes)

    @property
    def state(self) -> dict[str, Any]:
        return {
            "kind": self._difficulty,
            "epoch": self._epoch,
            "measured": self._measured,
            "sorted_by": self._sorted_by,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`, also after it was JSON."""
        self._epoch = state["epoch"]
        self._measured, self._sorted_by = dict(state["measured"]), dict(state["sorted_by"])
        if self._epoch >= 0:
            self._order = self._sort()

    def _sort(self) -> list[int]:
        return sorted_places(
            self._tasks, self._seed, self._epoch, self._difficulty, pass_rates(self._tasks, self._sorted_by)
        )


def question_order(tasks: Sequence[Task], batch_size: int, seed: int, kind: Kind) -> Order:
    """The order that data.order names."""
    if kind == "shuffled":
        return Shuffled(tasks, batch_size, seed)
    return ByDifficulty(tasks, batch_size, seed, kind)


def go_on(order: Order, state: Mapping[str, Any] | None) -> None:
    """Restores the order of a checkpoint; None is one from before there were several. Raises UserError for another kind."""
    before, now = (state or {"kind": "shuffled"})["kind"], order.state["kind"]
    if before != now:
        raise UserError(
            f"data.order = {now}, but this run began with {before}; in the middle of an epoch that would ask some questions "
            f"twice and others never: go on with data.order={before}, or start another run in another trainer.run_dir"
        )
    if state is not None:
        order.restore(state)


def sorted_places(
    tasks: Sequence[Task], seed: int, epoch: int, difficulty: Difficulty, rates: Mapping[str, float]
) -> list[int]:
    """Places in `tasks`, each once, by pass rate; equal rates, as all are where nothing was measured, stay shuffled."""
    shuffled: list[int] = np.random.default_rng([seed, epoch]).permutation(len(tasks)).tolist()
    key = _KEYS[difficulty]
    return sorted(shuffled, key=lambda i: key(rates[tasks[i].id]))


def pass_rates(tasks: Sequence[Task], counts: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    """Each question's share of right answers; of one that was not asked yet, its source's mean, else that of all."""
    rates = {task_id: right / total for task_id, (right, total) in counts.items()}
    by_source: dict[str, list[float]] = defaultdict(list)
    for task in tasks:
        if task.id in rates:
            by_source[task.source].append(rates[task.id])
    mean = sum(rates.values()) / len(rates) if rates else 0.5
    expected = {source: sum(values) / len(values) for source, values in by_source.items()}
    return {task.id: rates.get(task.id, expected.get(task.source, mean)) for task in tasks}


def counts_of(episodes: Iterable[Trajectory]) -> Counts:
    """Right answers and episodes of each question; failures of infrastructure say nothing of it."""
    counts: Counts = {}
    for episode in episodes:
        if episode.outcome != "infrastructure":
            right, total = counts.get(episode.task_id, (0, 0))
            counts[episode.task_id] = (right + (episode.outcome == "correct"), total + 1)
    return counts
