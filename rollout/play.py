"""The environment's side of an episode: the same rules for episodes of token ids and for conversations with a server.

Its calls run in threads, turns keep what they earned, and what ended the episode gets its name. Left out: where a turn's
text comes from and how long it may be (rollout.episode, rollout.chat_episode).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

from rollout.environment import Environment, StepResult
from rollout.errors import InfrastructureError
from rollout.types import Message, Task, Trajectory, Turn

_log = logging.getLogger(__name__)


class EnvironmentFailure(InfrastructureError):
    """An environment could not do its part; the message says why."""


class Play:
    """One episode in `environment`. Every call raises EnvironmentFailure, whatever the environment raised.

    `reason` is the stop reason (rollout.types.Trajectory) if the episode ends after the last step.
    """

    def __init__(
        self, environment: Environment, task: Task, sample: int, max_turns: int, pool: Executor | None
    ) -> None:
        self._environment, self._task, self._sample = environment, task, sample
        self._max_turns, self._pool = max_turns, pool
        self.turns: list[Turn] = []
        self.metrics: dict[str, float] = {"generate_seconds": 0.0, "environment_seconds": 0.0}
        self.reason = ""

    async def reset(self, seed: int) -> Sequence[Message]:
        told = replace(self._task, fields={"seed": seed, **self._task.fields, "max_turns": self._max_turns})
        messages: Sequence[Message] = await self._call(self._environment.reset, told)
        return messages

    async def step(self, action: str, tokens: int, cut: bool) -> StepResult:
        """Acts on a turn's text, of so many tokens; `cut`: its length ended it."""
        started = time.monotonic()
        step: StepResult = await self._call(self._environment.step, action, len(self.turns) + 1)
        turn = step.turn or Turn(action, status="solution" if step.done else "ok", observation=step.observation or "")
        turn.tokens, turn.seconds, turn.reward = tokens, time.monotonic() - started, step.reward
        self.turns.append(turn)
        self.metrics.update(step.metrics)
        if step.done and turn.status in ("solution", "timeout"):
            self.reason = turn.status
        elif cut:
            self.reason = "length"
        else:
            self.reason = "done" if step.done and len(self.turns) < self._max_turns else "max_turns"
        return step

    async def finish(self) -> str:
        """The end without an answer: the environment says what the episode so far is worth, and its outcome."""
        step: StepResult = await self._call(self._environment.finish)
        self.metrics.update(step.metrics)
        self.turns[-1].reward += step.reward
        return step.outcome

    def close(self) -> None:
        """Frees the environment. That may block, so it is nobody's to wait for."""
        asyncio.get_running_loop().run_in_executor(self._pool, self._environment.close)

    def trajectory(self, outcome: str, reason: str, error: str = "") -> Trajectory:
        """The episode as it is now, without tokens; its reward is the sum of its turns' rewards, 0 after a failure."""
        return Trajectory(
            task_id=self._task.id,
            source=self._task.source,
            sample=self._sample,
            prompt_ids=[],
            response_ids=[],
            loss_mask=[],
            logprobs=[],
            spans=[],
            reward=0.0 if outcome == "infrastructure" else sum(turn.reward for turn in self.turns),
            outcome=outcome,
            stop_reason=reason,
            turns=self.turns,
            metrics=self.metrics,
            error=error,
        )

    async def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        started = time.monotonic()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)
        except InfrastructureError as error:
            raise EnvironmentFailure(str(error)) from error
        except Exception as error:  # a fault in an environment must not take the other episodes with it
            _log.exception("task %s sample %d: its environment failed", self._task.id, self._sample)
            raise EnvironmentFailure(f"{type(error).__name__}: {error}") from error
        finally:
            self.metrics["environment_seconds"] += time.monotonic() - started
