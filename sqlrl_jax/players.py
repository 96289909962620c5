"""Who plays the episodes of an evaluation or of a person's question: rollout services, or any served model.

Both play the same environment with the sampling of `generator.eval_sampling_params`, and hand over each episode as it ends
with its record for files.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from rollout.chat import load_tokenizer
from rollout.chat_client import ChatClient, ServerOptions
from rollout.chat_episode import Conversations, play_all
from rollout.environment import make_environment_factory
from rollout.episode import EpisodeSettings
from rollout.errors import UserError
from rollout.types import Message, Task, Trajectory
from sqlrl_jax import config_file
from sqlrl_jax.config import Config
from sqlrl_jax.display import Display
from sqlrl_jax.fleet import Fleet, sampling_params
from sqlrl_jax.run import episode_record

OnEpisode = Callable[[Trajectory, dict[str, Any]], None]
"""Takes an episode as it ends and its record for the file."""
Player = Callable[[Sequence[Task], int, OnEpisode], None]
"""Plays the tasks with a limit of turns."""


def play_for_evaluation(
    fleet: Fleet,
    config: Config,
    tasks: Sequence[Task],
    version: int | None,
    max_turns: int,
    on_trajectory: Callable[[Trajectory], None],
) -> list[Trajectory]:
    """Episodes of all tasks on a version of the weights (None: what the services loaded)."""
    return fleet.rollout(
        tasks,
        samples=config.generator.eval_n_samples_per_prompt,
        sampling=sampling_params(config.generator.eval_sampling()),
        version=version,
        seed=config.trainer.seed,
        max_turns=max_turns,
        on_trajectory=on_trajectory,
    )


@contextmanager
def hosted(config: Config, display: Display, keep: bool) -> Iterator[Player]:
    """Plays on rollout services: those of `generator.services`, or one started here on the model folder.

    `keep`: the records will be read, so the prompts need the tokenizer, which a learner's host may lack otherwise.
    """
    folder = Path(mkdtemp(prefix="rollout-"))
    file, log = folder / "config.yaml", folder / "service.log"
    config_file.save(config, file)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        try:
            fleet = Fleet(config, file, log, display.print)
            stack.callback(fleet.close)
            decode = load_tokenizer(config.trainer.policy.model.path).decode if keep else str

            def play(tasks: Sequence[Task], limit: int, on_episode: OnEpisode) -> None:
                by_id = {task.id: task for task in tasks}

                def follow(episode: Trajectory) -> None:
                    record = episode_record("eval", limit, episode, by_id[episode.task_id], decode)
                    on_episode(episode, record | {"max_turns": limit})

                play_for_evaluation(fleet, config, tasks, None, limit, follow)

            yield play
        except UserError:
            logs = [file for file in sorted(folder.glob("service*.log")) if file.stat().st_size]
            if logs:
                kept = [str(shutil.copy(file, f"{folder}.{file.name}")) for file in logs]
                display.warn(f"the rollout service's log is kept in {', '.join(kept)}")
            raise


@contextmanager
def served(config: Config, server: ServerOptions) -> Iterator[Player]:
    """Plays against a served model, with the environment in this process."""
    generator = config.generator
    pool = ThreadPoolExecutor(min(64, server.concurrency), thread_name_prefix="environment")
    with make_environment_factory(config) as environments:

        def play(tasks: Sequence[Task], limit: int, on_episode: OnEpisode) -> None:
            by_id = {task.id: task for task in tasks}

            def follow(episode: Trajectory, messages: list[Message]) -> None:
                task = by_id[episode.task_id]
                record = {"kind": "eval", "max_turns": limit, **task.fields, "messages": messages}
                on_episode(episode, record | asdict(episode))

            async def run() -> None:
                async with ChatClient(server) as client:
                    common = Conversations(
                        client=client,
                        environment=environments.create,
                        settings=EpisodeSettings(limit, generator.max_input_length, config.trainer.max_prompt_length),
                        params=sampling_params(generator.eval_sampling()),
                        seed=config.trainer.seed,
                        pool=pool,
                    )
                    await play_all(common, tasks, generator.eval_n_samples_per_prompt, follow)

            asyncio.run(run())

        try:
            yield play
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
