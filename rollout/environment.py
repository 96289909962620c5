"""What a model acts in: the base class of all environments, and the door for environments of one's own.

An environment lives for one episode. `reset` gives the first messages, `step` takes the text of one turn of the model and
says what follows it, `finish` closes an episode that ended without an answer. All of them may block. What the episodes of
a process share (workers, caches, a big table) is made once by `open_shared`.

`environment.env_class` names the class. Text-to-SQL runs in the service's own threads, because it brings worker processes
for its queries; every other environment runs in worker processes with deadlines (rollout.environment_host), so that
nothing it does can harm the service. docs/environments.md is the guide.

Left out: tokens, chat templates and limits of length, which are the episode's business (rollout.episode).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rollout.types import Message, Task, Turn
from sqlrl_jax.config import Config

BUILT_IN = {"text2sql": "rollout.text2sql:Text2SQL", "calculator": "rollout.calculator:Calculator"}

# What an environment may call the end of an episode. The other outcomes are the service's.
END_OUTCOMES = ("correct", "wrong", "malformed", "sql_error", "timeout")


@dataclass
class StepResult:
    """What follows an action.

    `observation` is the raw text after the model's own, tags and reminder included; it is not shown to the model when the
    episode is `done`. `reward` is this step's; an episode is worth the sum over its steps. `outcome` is one of
    END_OUTCOMES when `done`; empty means correct if this step's reward is above 0, otherwise wrong. `metrics` are totals
    of the episode so far. `turn` says more about the action for people who read episodes; it may be left out.
    """

    observation: str | None = None
    reward: float = 0.0
    done: bool = False
    outcome: str = ""
    turn: Turn | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


class Environment:
    """Base of all environments: one instance an episode. `shared` is what `open_shared` of the same class returned."""

    def __init__(self, config: Config, shared: Any) -> None:
        self.config = config
        self.shared = shared

    @property
    def settings(self) -> Mapping[str, Any]:
        """`environment.settings` of the configuration, as it was written there."""
        return self.config.environment.settings

    @classmethod
    def open_shared(cls, config: Config) -> Any:
        """Called once in a process; returns what its environments share. A worker process ends without closing it."""
        return None

    def reset(self, task: Task) -> Sequence[Message] | str:
        """Starts the episode; returns the prompt: messages, or the text of a single one.

        `task.fields` holds the task's own fields, and besides `max_turns` and (unless the task has one) a `seed`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method reset")

    def step(self, action: str, turn: int) -> StepResult:
        """Acts on the text of turn number `turn` (from 1)."""
        raise NotImplementedError(f"{type(self).__name__} has no method step")

    def finish(self) -> StepResult:
        """The episode ended without an answer: no turn is left or the context is full."""
        return StepResult(done=True, outcome="malformed")

    def close(self) -> None:
        """The episode is over, however it ended. Frees what it held."""


class EnvironmentFactory:
    """Makes the environments of a process, one an episode."""

    def __init__(self, environment: type[Environment], config: Config) -> None:
        self._environment, self._config = environment, config
        self._shared = environment.open_shared(config)

    def create(self) -> Environment:
        return self._environment(self._config, self._shared)

    def close(self) -> None:
        """Frees what the environments shared."""
        close = getattr(self._shared, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> EnvironmentFactory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_environment_factory(config: Config) -> EnvironmentFactory:
    """The factory for `environment.env_class`. Raises UserError if that names nothing usable."""
    if config.environment.env_class == "text2sql":
        from rollout.text2sql import Text2SQL  # here, because that file needs this one

        return EnvironmentFactory(Text2SQL, config)
    from rollout.environment_host import Hosted

    return EnvironmentFactory(Hosted, config)
