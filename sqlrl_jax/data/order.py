"""Which question comes next, and how each comes to be used exactly once.

`Shuffled` is the order: a pure function of seed and position. `Supply` hands its questions out and keeps the books: what
was handed out is used, or owed again. Its state is small and part of every checkpoint, so a resumed run uses what is left,
no more and no less. Another order has the methods of `Order`; curriculum.py has two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from rollout.errors import UserError
from rollout.types import Task, Trajectory


def steps_per_epoch(tasks: int, batch_size: int) -> int:
    """Full batches in one pass; the last partial batch is dropped."""
    return tasks // batch_size


class Order(Protocol):
    """An endless list of questions."""

    def __len__(self) -> int:
        """Positions in one epoch, which together hold at least a batch of different questions."""

    def at(self, position: int) -> Task:
        """The question at a position, from 0. Asked once for each new position, in turn."""

    def tell(self, episodes: Sequence[Trajectory]) -> None:
        """The groups of a batch that was trained on."""

    @property
    def state(self) -> dict[str, Any]:
        """JSON from which `restore` goes on; `kind` is the value of data.order."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from the `state` of an order of this kind."""


class Shuffled:
    """Each epoch is another shuffle, and uses each question at most once; only full batches count."""

    def __init__(self, tasks: Sequence[Task], batch_size: int, seed: int) -> None:
        self._tasks, self._seed = tasks, seed
        self._length = steps_per_epoch(len(tasks), batch_size) * batch_size
        self._shuffle = lru_cache(maxsize=1)(self._shuffled)

    def __len__(self) -> int:
        return self._length

    def at(self, position: int) -> Task:
        epoch, index = divmod(position, self._length)
        return self._tasks[self._shuffle(epoch)[index]]

    def tell(self, episodes: Sequence[Trajectory]) -> None:
        """Makes no difference."""

    @property
    def state(self) -> dict[str, Any]:
        return {"kind": "shuffled"}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing but seed and position counts."""

    def _shuffled(self, epoch: int) -> list[int]:
        order: list[int] = np.random.default_rng([self._seed, epoch]).permutation(len(self._tasks)).tolist()
        return order


class Supply:
    """Hands out the first `limit` positions of an order, and sees to it that each is used once.

    What comes back unused (its service died, its weights are too old, the batch was full) is handed out again before anything
    new. A question that is out is not handed out at another position, as long as there are others.
    """

    def __init__(self, order: Order, limit: int) -> None:
        self._order, self._limit = order, limit
        self._next = 0
        self._owed: dict[int, Task] = {}
        self._out: dict[int, Task] = {}

    @property
    def out(self) -> int:
        """How many questions are out."""
        return len(self._out)

    @property
    def done(self) -> bool:
        """Whether every position was used."""
        return self._next == self._limit and not self._owed and not self._out

    def take(self, count: int, repeat: bool = False) -> list[tuple[int, Task]]:
        """Up to `count` positions and their questions, which are all different; fewer when all others are out or used.

        `repeat` also hands out those that are out at another position.
        """
        taken: list[tuple[int, Task]] = []
        shunned = set() if repeat else {task.id for task in self._out.values()}

        def hand_out(position: int, task: Task) -> None:
            self._out[position] = task
            taken.append((position, task))
            shunned.add(task.id)

        for position in sorted(self._owed):
            if len(taken) < count and self._owed[position].id not in shunned:
                hand_out(position, self._owed.pop(position))
        # Two epochs hold a whole one, and so a question that is not out, if there is any.
        while len(taken) < count and self._next < self._limit and len(self._owed) < 2 * len(self._order):
            position, task = self._next, self._order.at(self._next)
            self._next += 1
            if task.id in shunned:
                self._owed[position] = task
            else:
                hand_out(position, task)
        return taken

    def used(self, positions: Iterable[int]) -> None:
        """These were trained on, or looked at and left out: they are done with."""
        for position in positions:
            del self._out[position]

    def again(self, positions: Iterable[int]) -> None:
        """These were not used and are owed."""
        for position in positions:
            self._owed[position] = self._out.pop(position)

    @property
    def state(self) -> dict[str, Any]:
        """JSON from which `restore` goes on. What is out counts as owed: whoever resumes has none of it."""
        owed = self._owed | self._out
        return {"next": self._next, "owed": [(position, owed[position].id) for position in sorted(owed)]}

    def restore(self, state: Mapping[str, Any], tasks: Mapping[str, Task]) -> None:
        """Goes on from `state`. Raises UserError when a question that is owed is no longer among `tasks`, by id."""
        gone = [name for _, name in state["owed"] if name not in tasks]
        if gone:
            raise UserError(
                f"the checkpoint still owes question {gone[0]!r}, which is no longer in data.train_data ({len(gone)} such): "
                f"go on with the run's own questions, or start another in another trainer.run_dir"
            )
        self._next = state["next"]
        self._owed = {position: tasks[name] for position, name in state["owed"]}
        self._out = {}
