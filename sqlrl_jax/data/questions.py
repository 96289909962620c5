"""The questions of a run: those it trains on and those it is measured on, read and checked before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rollout.types import Task
from sqlrl_jax.config import Config
from sqlrl_jax.data.demo.generate import ensure
from sqlrl_jax.data.tasks import REQUIRED, DataError, read_tasks


@dataclass(frozen=True)
class Questions:
    """`val` is sampled when `data.max_val_questions` says so; `by_id` covers both."""

    train: list[Task]
    val: list[Task]

    @property
    def by_id(self) -> dict[str, Task]:
        return {task.id: task for task in (*self.train, *self.val)}


def load_questions(config: Config) -> Questions:
    """Generates the demo if asked, reads both lists. Raises DataError naming file, line and field."""
    if config.data.demo.train_databases:
        ensure(config.data.demo)
    train = read_all(config.data.train_data, "data.train_data", required_fields(config))
    return Questions(train, validation(config))


def validation(config: Config) -> list[Task]:
    """The evaluation questions: all, or a sample that depends on the seed alone."""
    tasks = read_all(config.data.val_data, "data.val_data", required_fields(config))
    limit = config.data.max_val_questions
    if 0 < limit < len(tasks):
        chosen = np.random.default_rng(config.trainer.seed).choice(len(tasks), limit, replace=False)
        tasks = [tasks[i] for i in sorted(chosen)]
    return tasks


def required_fields(config: Config) -> tuple[str, ...]:
    """What a line of questions must have; environments of one's own ask for an `id` alone."""
    return REQUIRED if config.environment.env_class == "text2sql" else ("id",)


def read_all(paths: Sequence[str], key: str, required: Sequence[str] = REQUIRED) -> list[Task]:
    """All questions of several files. The same id in two files is refused."""
    tasks: dict[str, Task] = {}
    for path in paths:
        for task in read_tasks(path, required):
            if task.id in tasks:
                raise DataError(
                    f"{path}: question id {task.id!r} is also in an earlier file of {key}; ids must be unique over all "
                    "of them, so put a prefix for each file before its ids"
                )
            tasks[task.id] = task
    if not tasks:
        raise DataError(f"{key} = {list(paths)}: no questions")
    return list(tasks.values())
