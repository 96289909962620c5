"""Which episodes of a batch have come, each counted exactly once. Pure bookkeeping; client.py does the asking."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rollout.types import Task, Trajectory


class Ledger:
    """Episodes wanted: `n_samples` of each task. One that failed for reasons of infrastructure stays wanted.

    `duplicates` counts trajectories that came again or were never asked for, `retried` episodes that had to be asked again.
    """

    def __init__(self, tasks: Sequence[Task], n_samples: int) -> None:
        self.tasks = {task.id: task for task in tasks}
        if len(self.tasks) != len(tasks):
            twice = Counter(task.id for task in tasks).most_common(1)[0][0]
            raise ValueError(
                f"task id {twice!r} is twice in the batch; ids must be unique, since seeds follow from them"
            )
        self.n_samples = n_samples
        self.duplicates = self.retried = 0
        self._got: dict[str, dict[int, Trajectory]] = {task.id: {} for task in tasks}
        self._reasons: dict[tuple[str, int], str] = {}
        self._failures: Counter[tuple[str, int]] = Counter()

    def accept(self, trajectory: Trajectory) -> bool:
        """Counts a trajectory; False for one that came before, was not asked for, or failed and stays wanted."""
        got = self._got.get(trajectory.task_id)
        if got is None or not 0 <= trajectory.sample < self.n_samples or trajectory.sample in got:
            self.duplicates += 1
            return False
        if trajectory.outcome == "infrastructure":
            self._reasons[trajectory.task_id, trajectory.sample] = trajectory.error or "no reason given"
            return False
        got[trajectory.sample] = trajectory
        return True

    def attempt_ended(self, tasks: Sequence[Task], default_reason: str) -> list[tuple[int, str]]:
        """A request for `tasks` was answered: counts what it failed to bring as (times so far, who and why)."""
        failed = [(task.id, sample) for task in tasks for sample in self.missing(task.id)]
        self._failures.update(failed)
        self.retried += len(failed)
        return [
            (self._failures[key], f"task {key[0]!r} sample {key[1]}: {self._reasons.pop(key, default_reason)}")
            for key in failed
        ]

    def missing(self, task_id: str) -> list[int]:
        return [sample for sample in range(self.n_samples) if sample not in self._got[task_id]]

    def incomplete(self, tasks: Sequence[Task]) -> list[Task]:
        """Those of `tasks` that lack an episode."""
        return [task for task in tasks if self.missing(task.id)]

    def result(self) -> list[Trajectory]:
        """Everything, by task in the order given, then sample."""
        return [got[sample] for got in self._got.values() for sample in range(self.n_samples)]
