"""The multi-turn episode, token ids in and token ids out.

One coroutine an episode: generate a turn, let the environment act on its text, append the observation's ids, repeat. The
mask is 1 on sampled tokens only. An episode always ends in a Trajectory: one that outgrows the context is still scored for
what it did, and a failure that is not the model's (a missing database, a dead engine, a fault in an environment) is told
apart as `infrastructure` and never scored. Retrying those is the caller's business, who knows how much time is left.

Left out: asynchronous environments. Steps run in a thread pool, which any blocking code can live with.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any

from rollout.chat import Chat
from rollout.engine.base import Engine, Session
from rollout.environment import Environment, StepResult
from rollout.errors import InfrastructureError
from rollout.types import Generation, SamplingParams, Task, Trajectory, Turn

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EpisodeSettings:
    """Limits of an episode. `max_input_length` bounds what a turn is generated from, `max_prompt_length` the prompt."""

    max_turns: int
    max_input_length: int
    max_prompt_length: int


def sample_seed(seed: int, task_id: str, sample: int) -> int:
    """The seed of one episode: a stable hash, so that neither batch composition nor the process matters. 63 bits."""
    digest = hashlib.blake2b(f"{seed}\0{task_id}\0{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass
class _Record:
    """An episode's tokens while it runs."""

    prompt: list[int] = field(default_factory=list)
    response: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=lambda: {"generate_seconds": 0.0, "environment_seconds": 0.0})

    def sampled(self, generation: Generation) -> None:
        start = len(self.response)
        self.response += generation.output_ids
        self.mask += [1] * len(generation.output_ids)
        self.logprobs += generation.logprobs
        for version, first, end in generation.spans:
            if self.spans and self.spans[-1][0] == version:  # the observation in between has no version of its own
                self.spans[-1] = (version, self.spans[-1][1], start + end)
            else:
                self.spans.append((version, start + first, start + end))

    def observed(self, ids: Sequence[int]) -> None:
        self.response += ids
        self.mask += [0] * len(ids)
        self.logprobs += [0.0] * len(ids)


class _EpisodeRun:
    """One episode on its way; `run` returns its trajectory whatever happens."""

    def __init__(
        self,
        task: Task,
        sample: int,
        session: Session,
        environment: Environment,
        chat: Chat,
        settings: EpisodeSettings,
        params: SamplingParams,
        max_context: int,
        pool: Executor | None,
    ) -> None:
        self.task, self.sample, self.session, self.environment, self.chat = task, sample, session, environment, chat
        self.settings, self.params, self.max_context, self.pool = settings, params, max_context, pool
        self.record = _Record()

    async def run(self, seed: int) -> Trajectory:
        try:
            return await self._play(seed)
        except InfrastructureError as error:
            return self._end("infrastructure", "error", str(error))
        except Exception as error:  # a fault in an environment must not take the other episodes with it
            _log.exception("episode %s sample %d failed", self.task.id, self.sample)
            return self._end("infrastructure", "error", f"{type(error).__name__}: {error}")
        finally:  # may block, so it is nobody's to wait for
            asyncio.get_running_loop().run_in_executor(self.pool, self.environment.close)

    async def _play(self, seed: int) -> Trajectory:
        record, settings = self.record, self.settings
        told = replace(self.task, fields={"seed": seed, **self.task.fields, "max_turns": settings.max_turns})
        record.prompt = self.chat.prompt_ids(await self._environment(self.environment.reset, told))
        if len(record.prompt) > min(settings.max_prompt_length, settings.max_input_length, self.max_context - 1):
            return self._end("prompt_too_long", "error", f"the prompt has {len(record.prompt)} tokens")
        pending: list[int] = []  # the observation joins the response only if another turn follows it
        for number in range(1, settings.max_turns + 1):
            size = len(record.prompt) + len(record.response) + len(pending)
            if size > settings.max_input_length or size >= self.max_context:
                return await self._finish("overflow", "overflow")
            record.observed(pending)
            generation = await self._generate(size, seed)
            if generation.finish_reason == "abort":
                return self._end("infrastructure", "error", f"turn {number} was aborted by the engine")
            step = await self._act(generation, number)
            reason = "length" if generation.finish_reason == "length" else "max_turns"
            if step.done:
                status = record.turns[-1].status
                if status in ("solution", "timeout"):
                    reason = status
                elif reason == "max_turns" and number < settings.max_turns:
                    reason = "done"
                return self._end(step.outcome, reason)
            pending = self.chat.observation_ids(step.observation or "", generation.output_ids)
        return await self._finish(None, reason)

    async def _generate(self, size: int, seed: int) -> Generation:
        params = replace(self.params, max_tokens=min(self.params.max_tokens, self.max_context - size))
        started = time.monotonic()
        generation = await self.session.generate(self.record.prompt + self.record.response, params, seed)
        self.record.metrics["generate_seconds"] += time.monotonic() - started
        self.record.sampled(generation)
        return generation

    async def _act(self, generation: Generation, number: int) -> StepResult:
        action = self.chat.action_text(generation.output_ids)
        started = time.monotonic()
        step: StepResult = await self._environment(self.environment.step, action, number)
        turn = step.turn or Turn(action, status="solution" if step.done else "ok", observation=step.observation or "")
        turn.tokens, turn.seconds = len(generation.output_ids), time.monotonic() - started
        turn.reward = step.reward
        self.record.turns.append(turn)
        self.record.metrics.update(step.metrics)
        return step

    async def _environment(self, function: Callable[..., Any], *arguments: Any) -> Any:
        started = time.monotonic()
        result = await asyncio.get_running_loop().run_in_executor(self.pool, function, *arguments)
        self.record.metrics["environment_seconds"] += time.monotonic() - started
        return result

    async def _finish(self, outcome: str | None, reason: str) -> Trajectory:
        """The end without a solution: the environment says what the episode so far is worth."""
        step: StepResult = await self._environment(self.environment.finish)
        self.record.metrics.update(step.metrics)
        if self.record.turns:
            self.record.turns[-1].reward += step.reward
        return self._end(outcome or step.outcome, reason)

    def _end(self, outcome: str, reason: str, error: str = "") -> Trajectory:
        """The trajectory as it is now; its reward is the sum of its turns' rewards, 0 after a failure."""
        r = self.record
        reward = sum(turn.reward for turn in r.turns) if outcome != "infrastructure" else 0.0
        return Trajectory(
            task_id=self.task.id,
            source=self.task.source,
            sample=self.sample,
            prompt_ids=r.prompt,
            response_ids=r.response,
            loss_mask=r.mask,
            logprobs=r.logprobs,
            spans=r.spans,
            reward=reward,
            outcome=outcome,
            stop_reason=reason,
            turns=r.turns,
            metrics=r.metrics,
            error=error,
        )


async def run_batch(
    tasks: Sequence[Task],
    n_samples: int,
    engine: Engine,
    environment_factory: Callable[[], Environment],
    chat: Chat,
    settings: EpisodeSettings,
    params: SamplingParams,
    seed: int,
    on_trajectory: Callable[[Trajectory], None] | None = None,
    pool: Executor | None = None,
) -> list[Trajectory]:
    """Plays every task `n_samples` times, all at once; returns the trajectories by task, then sample.

    `on_trajectory` is called in the event loop as each episode ends. The session of task t, sample s has order
    t * n_samples + s. Cancelling this coroutine closes every session. `pool` runs the environments (default: asyncio's own).
    """
    pairs = [(task, sample) for task in tasks for sample in range(n_samples)]
    sessions: list[Session] = []

    async def play(task: Task, sample: int, session: Session) -> Trajectory:
        async with session:
            run = _EpisodeRun(
                task, sample, session, environment_factory(), chat, settings, params, engine.max_context, pool
            )
            trajectory = await run.run(sample_seed(seed, task.id, sample))
        if on_trajectory is not None:
            on_trajectory(trajectory)
        return trajectory

    try:
        for order in range(len(pairs)):  # before any await: the engine counts them
            sessions.append(engine.session(order))
        async with asyncio.TaskGroup() as group:
            jobs = [group.create_task(play(t, s, session)) for (t, s), session in zip(pairs, sessions, strict=True)]
        return [job.result() for job in jobs]
    finally:
        for session in sessions:  # an episode cancelled before it began never entered its session
            session.close()
