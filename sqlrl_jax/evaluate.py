"""Evaluation: greedy (or sampled) episodes on held-out questions, during training and as a verb of its own.

Accuracy is in all and by source; pass@k needs several samples; a list of turn limits shows what looking is worth. The
verb needs no learner: the rollout service serves the model folder as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rollout.chat import load_tokenizer
from rollout.errors import UserError
from rollout.types import Task, Trajectory
from sqlrl_jax import config_file
from sqlrl_jax.config import Config
from sqlrl_jax.data.demo import ensure
from sqlrl_jax.data.questions import validation
from sqlrl_jax.display import Display, comparison, eval_line
from sqlrl_jax.fleet import Fleet, sampling_params
from sqlrl_jax.metrics import eval_metrics
from sqlrl_jax.run import episode_record


def evaluate(
    fleet: Fleet,
    config: Config,
    tasks: Sequence[Task],
    version: int | None,
    max_turns: int,
    on_trajectory: Callable[[Trajectory], None],
) -> tuple[list[Trajectory], dict[str, float]]:
    """Episodes of all tasks on a version of the weights (None: what the services loaded) and their metrics."""
    episodes = fleet.rollout(
        tasks,
        samples=config.generator.eval_n_samples_per_prompt,
        sampling=sampling_params(config.generator.eval_sampling()),
        version=version,
        seed=config.trainer.seed,
        max_turns=max_turns,
        on_trajectory=on_trajectory,
    )
    return episodes, eval_metrics(episodes)


def main(
    config: Config,
    model: str | None,
    questions: str | None,
    databases: str | None,
    samples: int | None,
    turns: list[int] | None,
    out: str | None,
) -> int:
    """`launch.py eval`: prints a table and, as the last line, all metrics as JSON."""
    config = _with(config, model, questions, databases, samples)
    if config.data.demo.train_databases and not questions:
        ensure(config.data.demo)
    tasks = validation(config)
    limits = turns or [config.generator.max_turns]
    display = Display()
    results: list[tuple[int, dict[str, float]]] = []
    with TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        config_file.save(config, file)
        fleet = Fleet(config, file, Path(folder, "service.log"), display.print)
        try:
            for limit in limits:
                results.append((limit, _measure(fleet, config, tasks, limit, display, out)))
        finally:
            fleet.close()
    display.print(
        comparison(config.trainer.policy.model.path, [(f"{t} turns" if t > 1 else "1 turn", m) for t, m in results])
    )
    summary = {"model": config.trainer.policy.model.path, "turns": {str(t): m for t, m in results}}
    print(json.dumps(results[0][1] | {"max_turns": limits[0]} if len(results) == 1 else summary))
    return 0


def _measure(
    fleet: Fleet, config: Config, tasks: list[Task], limit: int, display: Display, out: str | None
) -> dict[str, float]:
    done = 0
    with display.bar("evaluating", len(tasks) * config.generator.eval_n_samples_per_prompt) as bar:

        def follow(_: Trajectory) -> None:
            nonlocal done
            done += 1
            bar(done)

        episodes, metrics = evaluate(fleet, config, tasks, None, limit, follow)
    display.print(eval_line(0, limit, metrics))
    if out:
        by_id = {task.id: task for task in tasks}
        decode = load_tokenizer(config.trainer.policy.model.path).decode
        with Path(out).open("a", encoding="utf-8") as file:
            for episode in episodes:
                record = episode_record("eval", limit, episode, by_id[episode.task_id], decode)
                file.write(json.dumps(record) + "\n")
    return metrics


def _with(
    config: Config, model: str | None, questions: str | None, databases: str | None, samples: int | None
) -> Config:
    """The configuration with the command line's paths put in, checked to exist."""
    overrides: list[tuple[str, Any]] = []
    for path, key in (
        (model, "trainer.policy.model.path"),
        (databases, "environment.text2sql.database_root"),
        (questions, "data.val_data"),
    ):
        if path is not None:
            if not Path(path).exists():
                raise UserError(f"{path}: no such file or folder (for {key})")
            overrides.append((key, [path] if key == "data.val_data" else path))
    if samples is not None:
        overrides.append(("generator.eval_n_samples_per_prompt", samples))
    return config_file.override(config, overrides)
