"""Episodes against a served model: the same environments, played as a conversation of messages.

Each observation is a user message, as in conversation style (`generator.use_conversation_multi_turn`), and the server's own
chat template puts the messages together. There are no token ids here, so these episodes can be scored and read but not
trained on; limits of length go by the server's token counts. A failure of the server ends everything with what is
finished already handed over; a failure inside an environment is retried and never scored.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from rollout.chat_client import ChatClient, Completion, ContextFull
from rollout.environment import Environment
from rollout.episode import EpisodeSettings, sample_seed
from rollout.errors import InfrastructureError
from rollout.play import EnvironmentFailure, Play
from rollout.text import whole
from rollout.types import Message, SamplingParams, Task, Trajectory

_CONTROL = re.compile(r"<(?=\|[^|<>\s]{1,40}\|>)")
OnEpisode = Callable[[Trajectory, list[Message]], None]
ENVIRONMENT_ATTEMPTS = 2


@dataclass(frozen=True)
class Conversations:
    """What all episodes have in common."""

    client: ChatClient
    environment: Callable[[], Environment]
    settings: EpisodeSettings
    params: SamplingParams
    seed: int
    pool: Executor | None = None


def neutral(text: str) -> str:
    """Data that is safe in a message: a database cell that says <|im_end|> must not end anybody's turn."""
    return whole(_CONTROL.sub("< ", text))


class ChatEpisode:
    """One conversation, scored as rollout.episode scores one. `play` returns its trajectory; a server's fault is raised."""

    def __init__(self, common: Conversations, task: Task, sample: int) -> None:
        self.common = common
        self.seed = sample_seed(common.seed, task.id, sample)
        self._play = Play(common.environment(), task, sample, common.settings.max_turns, common.pool)
        self.messages: list[Message] = []

    async def play(self) -> Trajectory:
        """Raises EnvironmentFailure, ServerRefused, InfrastructureError."""
        try:
            return await self._converse()
        finally:
            self._play.close()

    async def _converse(self) -> Trajectory:
        play = self._play
        self._say(await play.reset(self.seed))
        for number in range(1, self.common.settings.max_turns + 1):
            completion = await self._generate(first=number == 1)
            if completion is None and number == 1:
                return play.trajectory("prompt_too_long", "error", "the prompt does not fit the context")
            if completion is None:
                await play.finish()
                return play.trajectory("overflow", "overflow")
            cut = completion.finish_reason == "length"
            step = await play.step(completion.text, completion.completion_tokens or 0, cut)
            self.messages.append(Message(role="assistant", content=completion.text))
            if step.done:
                return play.trajectory(step.outcome, play.reason)
            self._say([Message(role="user", content=step.observation or "")])
        return play.trajectory(await play.finish(), play.reason)

    async def _generate(self, first: bool) -> Completion | None:
        """One turn; None when the conversation is longer than it may be."""
        common, started = self.common, time.monotonic()
        limit = common.settings.max_input_length
        if first:
            limit = min(limit, common.settings.max_prompt_length)
        try:
            completion = await common.client.complete(self.messages, common.params, self.seed)
        except ContextFull:
            return None
        finally:
            self._play.metrics["generate_seconds"] += time.monotonic() - started
        return None if (completion.prompt_tokens or 0) > limit else completion

    def _say(self, messages: Sequence[Message]) -> None:
        self.messages += [Message(role=m["role"], content=neutral(m["content"])) for m in messages]


async def play_all(common: Conversations, tasks: Sequence[Task], samples: int, on_episode: OnEpisode) -> None:
    """Plays every task `samples` times, `client.options.concurrency` at a time, in order; `on_episode` sees each as it ends.

    Raises what the server made impossible at once, and InfrastructureError at the end when an environment kept failing.
    """
    jobs = iter([(task, sample) for task in tasks for sample in range(samples)])
    failures: list[str] = []
    workers = min(common.client.options.concurrency, len(tasks) * samples)
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(_work(common, jobs, on_episode, failures))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    if failures:
        shown = "\n  ".join(failures[:5]) + (f"\n  … and {len(failures) - 5} more" if len(failures) > 5 else "")
        raise InfrastructureError(
            f"{len(failures)} episodes failed {ENVIRONMENT_ATTEMPTS} times each for reasons other than the model:\n  {shown}"
        )


async def _work(
    common: Conversations, jobs: Iterator[tuple[Task, int]], on_episode: OnEpisode, failures: list[str]
) -> None:
    for task, sample in jobs:
        problem = ""
        for _ in range(ENVIRONMENT_ATTEMPTS):
            episode = ChatEpisode(common, task, sample)
            try:
                trajectory = await episode.play()
            except EnvironmentFailure as failure:
                problem = str(failure)
                continue
            on_episode(trajectory, episode.messages)
            break
        else:
            failures.append(f"task {task.id!r} sample {sample}: {problem}")
