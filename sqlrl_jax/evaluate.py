"""Evaluation: greedy (or sampled) episodes on held-out questions, during training and as a verb of its own.

The verb needs no learner: episodes are played by a rollout service that serves the model folder as it is, or, with
`--server`, by the same environment against any served model. Both go through the same metrics, table and JSON.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.text import Text

from rollout.chat_client import ServerOptions, with_model
from rollout.errors import UserError
from rollout.types import Task, Trajectory
from sqlrl_jax import config_file
from sqlrl_jax.config import Config
from sqlrl_jax.data.demo.generate import ensure
from sqlrl_jax.data.questions import validation
from sqlrl_jax.display import Display, comparison
from sqlrl_jax.episodes_file import EpisodesFile
from sqlrl_jax.eval_table import as_markdown, as_text, habits, set_line, set_rows
from sqlrl_jax.fleet import Fleet
from sqlrl_jax.metrics import eval_metrics
from sqlrl_jax.players import OnEpisode, Player, hosted, play_for_evaluation, served


@dataclass(frozen=True)
class Request:
    """What the command line asks for; None and empty leave the configuration as it is."""

    model: str | None = None
    questions: Sequence[str] = ()
    databases: str | None = None
    samples: int | None = None
    max_questions: int | None = None
    turns: Sequence[int] = ()
    out: str | None = None
    resume: bool = False
    markdown: bool = False
    server: ServerOptions | None = field(default=None)


def evaluate(
    fleet: Fleet,
    config: Config,
    tasks: Sequence[Task],
    version: int | None,
    max_turns: int,
    on_trajectory: Callable[[Trajectory], None],
) -> tuple[list[Trajectory], dict[str, float]]:
    """Episodes of all tasks on a version of the weights (None: what the services loaded) and their metrics."""
    episodes = play_for_evaluation(fleet, config, tasks, version, max_turns, on_trajectory)
    return episodes, eval_metrics(episodes)


def main(config: Config, request: Request) -> int:
    """`launch.py eval`: prints a line a set as it is done, a table and, as the last line, all metrics as JSON."""
    config = _with(config, request)
    if config.data.demo.train_databases and not request.questions:
        ensure(config.data.demo)
    tasks = validation(config)
    limits = list(request.turns) or [config.generator.max_turns]
    samples = config.generator.eval_n_samples_per_prompt
    display = Display()
    if samples > 1 and config.generator.eval_sampling().temperature == 0:
        display.warn("greedy samples are all the same; set generator.eval_sampling_params.temperature")
    if request.server is not None:
        request = replace(request, server=asyncio.run(with_model(request.server)))
    name = request.server.model if request.server else config.trainer.policy.model.path
    results: list[tuple[int, dict[str, float]]] = []
    with ExitStack() as stack:
        file = _open_out(config, request, name)
        if file is not None:
            stack.callback(file.close)
            file.begin(tasks, limits, samples)
        if file is None or len(file.done) < len(tasks) * samples * len(limits):
            server, keep = request.server, file is not None
            player = served(config, server) if server else hosted(config, display, keep)
            play = stack.enter_context(player)
        else:
            play = _nothing
        for limit in limits:
            title = f"{name}, up to {limit} {'turns' if limit > 1 else 'turn'}"
            measurement = Measurement(tasks, samples, limit, title, request.markdown)
            results.append((limit, _measure(play, measurement, display, file)))
    if len(results) > 1 and not request.markdown:
        display.print(comparison(name, [(f"{t} turns" if t > 1 else "1 turn", m) for t, m in results]))
    summary = {"model": name, "turns": {str(t): m for t, m in results}}
    single = results[0][1] | {"max_turns": limits[0], "model": name}
    print(json.dumps(single if len(results) == 1 else summary))
    return 0


class Progress:
    """The episodes of one measurement as they come: which sets are complete, and what was had when it was interrupted."""

    def __init__(self, tasks: Sequence[Task], samples: int, say: Callable[[str], None]) -> None:
        self._say, self._samples = say, samples
        self._places = {task.id: number for number, task in enumerate(tasks)}
        self._missing = Counter(task.source for task in tasks for _ in range(samples))
        self._several = len(self._missing) > 1
        self.episodes: list[Trajectory] = []

    def add(self, episode: Trajectory) -> None:
        self.episodes.append(episode)
        self._missing[episode.source] -= 1
        if self._several and self._missing[episode.source] == 0:
            mine = [e for e in self.episodes if e.source == episode.source]
            self._say(set_line(episode.source, eval_metrics(mine)))

    def result(self) -> list[Trajectory]:
        """The episodes by task, then sample."""
        return sorted(self.episodes, key=lambda e: (self._places[e.task_id], e.sample))

    def complete(self) -> list[Trajectory]:
        """The episodes of the questions that have all their samples."""
        samples = Counter(episode.task_id for episode in self.episodes)
        return [episode for episode in self.result() if samples[episode.task_id] == self._samples]


@dataclass(frozen=True)
class Measurement:
    """All questions with one limit of turns."""

    tasks: list[Task]
    samples: int
    limit: int
    title: str
    markdown: bool


def _measure(play: Player, what: Measurement, display: Display, file: EpisodesFile | None) -> dict[str, float]:
    tasks, samples, limit, title, markdown = what.tasks, what.samples, what.limit, what.title, what.markdown
    done = {key[1:]: e for key, e in file.done.items() if key[0] == limit} if file is not None else {}
    progress = Progress(tasks, samples, lambda line: display.print(Text(line)))
    for episode in done.values():
        progress.add(episode)
    todo = [task for task in tasks if (task.id, 0) not in done]
    total = len(tasks) * samples
    try:
        with display.bar("evaluating", total) as bar:
            bar(len(done))

            def follow(episode: Trajectory, record: dict[str, Any]) -> None:
                progress.add(episode)
                if file is not None:
                    file.write(record)
                bar(len(progress.episodes))

            if todo:
                play(todo, limit, follow)
    except (KeyboardInterrupt, UserError):
        kept = ""
        if file is not None and progress.episodes:
            kept = f"; they are in {file.path}, go on with the same command and --resume"
        complete = progress.complete()
        if complete:
            shown = f"{title}, the {len(complete) // samples} of {len(tasks)} questions that ended first"
            _show(display, shown, complete, markdown)
        display.warn(f"stopped after {len(progress.episodes)} of {total} episodes{kept}")
        raise
    return _show(display, title, progress.result(), markdown)


def _show(display: Display, title: str, episodes: list[Trajectory], markdown: bool) -> dict[str, float]:
    metrics = eval_metrics(episodes)
    header, rows = set_rows(metrics)
    if markdown:
        display.print(Text(f"\n{title}:\n\n{as_markdown(header, rows)}\n"))
    else:
        display.print(as_text(title, header, rows))
    display.print(habits(metrics))
    return metrics


def _nothing(tasks: Sequence[Task], limit: int, on_episode: OnEpisode) -> None:
    """Plays when every episode is in the file already."""


def _open_out(config: Config, request: Request, name: str) -> EpisodesFile | None:
    if request.out is None:
        if request.resume:
            raise UserError("--resume goes on with the episodes in a file; name it with --out")
        return None
    generator = config.generator
    decisive = {
        "model": name,
        "served": request.server is not None,
        "extra": dict(request.server.extra) if request.server else {},
        "sampling": generator.eval_sampling().model_dump(),
        "conversation": generator.use_conversation_multi_turn or request.server is not None,
        "lengths": [generator.max_input_length, config.trainer.max_prompt_length],
        "seed": config.trainer.seed,
        "environment": config.environment.model_dump(mode="json", exclude={"text2sql": {"workers"}}),
    }
    return EpisodesFile(Path(request.out), decisive, resume=request.resume)


def _with(config: Config, request: Request) -> Config:
    """The configuration with the command line's paths put in, checked to exist."""
    overrides: list[tuple[str, Any]] = []
    named = [
        ("trainer.policy.model.path", request.model),
        ("environment.text2sql.database_root", request.databases),
        *(("data.val_data", file) for file in request.questions),
    ]
    for key, path in named:
        if path is not None and not Path(path).exists():
            raise UserError(f"{path}: no such file or folder (for {key})")
        if path is not None and key != "data.val_data":
            overrides.append((key, path))
    if request.questions:
        overrides.append(("data.val_data", list(request.questions)))
    if request.samples is not None:
        overrides.append(("generator.eval_n_samples_per_prompt", request.samples))
    if request.max_questions is not None:
        overrides.append(("data.max_val_questions", request.max_questions))
    return config_file.override(config, overrides)
