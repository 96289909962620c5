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
from dataclasses import dataclass, replace
from typing import Any

from rollout.chat_client import ChatClient, Completion, ContextFull
from rollout.environment import Environment, StepResult
from rollout.episode import EpisodeSettings, sample_seed
from rollout.errors import InfrastructureError
from rollout.text import whole
from rollout.types import Message, SamplingParams, Task, Trajectory, Turn

_CONTROL = re.compile(r"<(?=\|[^|<>\s]{1,40}\|>)")
OnEpisode = Callable[[Trajectory, list[Message]], None]
ENVIRONMENT_ATTEMPTS = 2


class EnvironmentFailure(Exception):
    """An environment could not do its part; the message says why."""


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
        self.common, self.task, self.sample = common, task, sample
        self.seed = sample_seed(common.seed, task.id, sample)
        self.environment = common.environment()
        self.messages: list[Message] = []
        self.turns: list[Turn] = []
        self.metrics: dict[str, float] = {"generate_seconds": 0.0, "environment_seconds": 0.0}

    async def play(self) -> Trajectory:
        try:
            return await self._play()
        finally:  # may block, so it is nobody's to wait for
            asyncio.get_running_loop().run_in_executor(self.common.pool, self.environment.close)

    async def _play(self) -> Trajectory:
        settings = self.common.settings
        told = replace(self.task, fields={"seed": self.seed, **self.task.fields, "max_turns": settings.max_turns})
        self._say(await self._environment(self.environment.reset, told))
        reason = "max_turns"
        for number in range(1, settings.max_turns + 1):
            completion = await self._generate(first=number == 1)
            if completion is None and number == 1:
                return self._end("prompt_too_long", "error", "the prompt does not fit the context")
            if completion is None:
                return await self._finish("overflow", "overflow")
            reason = "length" if completion.finish_reason == "length" else "max_turns"
            step = await self._act(completion, number)
            if step.done:
                status = self.turns[-1].status
                if status in ("solution", "timeout"):
                    reason = status
                elif reason == "max_turns" and number < settings.max_turns:
                    reason = "done"
                return self._end(step.outcome, reason)
            self._say([Message(role="user", content=step.observation or "")])
        return await self._finish(None, reason)

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
            self.metrics["generate_seconds"] += time.monotonic() - started
        return None if (completion.prompt_tokens or 0) > limit else completion

    async def _act(self, completion: Completion, number: int) -> StepResult:
        started = time.monotonic()
        step: StepResult = await self._environment(self.environment.step, completion.text, number)
        status = "solution" if step.done else "ok"
        turn = step.turn or Turn(completion.text, status=status, observation=step.observation or "")
        turn.tokens, turn.seconds = completion.completion_tokens or 0, time.monotonic() - started
        turn.reward = step.reward
        self.turns.append(turn)
        self.metrics.update(step.metrics)
        self.messages.append(Message(role="assistant", content=completion.text))
        return step

    async def _finish(self, outcome: str | None, reason: str) -> Trajectory:
        step: StepResult = await self._environment(self.environment.finish)
        self.metrics.update(step.metrics)
        if self.turns:
            self.turns[-1].reward += step.reward
        return self._end(outcome or step.outcome, reason)

    async def _environment(self, function: Callable[..., Any], *arguments: Any) -> Any:
        started = time.monotonic()
        try:
            return await asyncio.get_running_loop().run_in_executor(self.common.pool, function, *arguments)
        except InfrastructureError as error:
            raise EnvironmentFailure(str(error)) from error
        except Exception as error:  # a fault in somebody's environment must not take the other episodes with it
            raise EnvironmentFailure(f"{type(error).__name__}: {error}") from error
        finally:
            self.metrics["environment_seconds"] += time.monotonic() - started

    def _say(self, messages: Sequence[Message]) -> None:
        self.messages += [Message(role=m["role"], content=neutral(m["content"])) for m in messages]

    def _end(self, outcome: str, reason: str, error: str = "") -> Trajectory:
        return Trajectory(
            task_id=self.task.id,
            source=self.task.source,
            sample=self.sample,
            prompt_ids=[],
            response_ids=[],
            loss_mask=[],
            logprobs=[],
            spans=[],
            reward=sum(turn.reward for turn in self.turns),
            outcome=outcome,
            stop_reason=reason,
            turns=self.turns,
            metrics=self.metrics,
            error=error,
        )


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
