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

from rollout.chat import Chat
from rollout.engine.base import Engine, Session
from rollout.environment import Environment
from rollout.errors import InfrastructureError
from rollout.play import Play
from rollout.types import Generation, Message, SamplingParams, Task, Trajectory

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
    contexts: list[list[int]] = field(default_factory=list)

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
        play: Play,
        session: Session,
        chat: Chat,
        settings: EpisodeSettings,
        params: SamplingParams,
        max_context: int,
    ) -> None:
        self.play, self.session, self.chat = play, session, chat
        self.settings, self.params, self.max_context = settings, params, max_context
        self.record = _Record()

    async def run(self, seed: int) -> Trajectory:
        try:
            return await self._play(seed)
        except InfrastructureError as error:
            return self._end("infrastructure", "error", str(error))
        except Exception as error:  # a fault of the engine must not take the other episodes with it
            trajectory = self._end("infrastructure", "error", f"{type(error).__name__}: {error}")
            _log.exception("task %s sample %d failed", trajectory.task_id, trajectory.sample)
            return trajectory
        finally:
            self.play.close()

    async def _play(self, seed: int) -> Trajectory:
        record, settings = self.record, self.settings
        messages = list(await self.play.reset(seed))
        record.prompt = self.chat.prompt_ids(messages)
        if len(record.prompt) > min(settings.max_prompt_length, settings.max_input_length, self.max_context - 1):
            return self._end("prompt_too_long", "error", f"the prompt has {len(record.prompt)} tokens")
        context = list(record.prompt)
        pending: list[int] = []  # the observation joins the response only if another turn follows it
        for number in range(1, settings.max_turns + 1):
            if len(context) > settings.max_input_length or len(context) >= self.max_context:
                await self.play.finish()
                return self._end("overflow", "overflow")
            record.observed(pending)
            if self.chat.rewrites_history:
                record.contexts.append(context)
            generation = await self._generate(context, seed)
            if generation.finish_reason == "abort":
                return self._end("infrastructure", "error", f"turn {number} was aborted by the engine")
            action, tokens = self.chat.action_text(generation.output_ids), len(generation.output_ids)
            step = await self.play.step(action, tokens, cut=generation.finish_reason == "length")
            if step.done:
                return self._end(step.outcome, self.play.reason)
            observation = step.observation or ""
            pending = self.chat.observation_ids(observation, generation.output_ids)
            if self.chat.rewrites_history:
                messages += [Message(role="assistant", content=action), Message(role="user", content=observation)]
                context = self.chat.prompt_ids(messages)
            else:
                context = record.prompt + record.response + pending
        return self._end(await self.play.finish(), self.play.reason)

    async def _generate(self, context: list[int], seed: int) -> Generation:
        params = replace(self.params, max_tokens=min(self.params.max_tokens, self.max_context - len(context)))
        started = time.monotonic()
        generation = await self.session.generate(context, params, seed)
        self.play.metrics["generate_seconds"] += time.monotonic() - started
        self.record.sampled(generation)
        return generation

    def _end(self, outcome: str, reason: str, error: str = "") -> Trajectory:
        r, trajectory = self.record, self.play.trajectory(outcome, reason, error)
        trajectory.prompt_ids, trajectory.response_ids, trajectory.loss_mask = r.prompt, r.response, r.mask
        trajectory.logprobs, trajectory.spans, trajectory.contexts = r.logprobs, r.spans, r.contexts
        return trajectory


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
    """Plays every task `n_samples` times, or the samples that it names, all at once; returns them by task, then sample.

    `on_trajectory` is called in the event loop as each episode ends. Sessions have the order of the episodes.
    Cancelling this coroutine closes every session. `pool` runs the environments (default: asyncio's own).
    """
    pairs = [(task, sample) for task in tasks for sample in task.samples or range(n_samples)]
    sessions: list[Session] = []

    async def play(task: Task, sample: int, session: Session) -> Trajectory:
        async with session:
            played = Play(environment_factory(), task, sample, settings.max_turns, pool)
            run = _EpisodeRun(played, session, chat, settings, params, engine.max_context)
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
