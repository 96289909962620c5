"""What a model acts in: the base class of all environments, and the door for environments of one's own.

An environment lives for one episode. `reset` gives the first messages, `step` takes the text of one turn of the model and
says what follows it, `finish` closes an episode that ended without an answer. All of them may block; they are called
from a pool of threads. What the episodes of a process share (workers, caches) is made once by `open_shared`.

Left out: tokens, chat templates and limits of length, which are the episode's business (rollout.episode), and text-to-SQL
itself (rollout.text2sql).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

from rollout.errors import UserError
from rollout.types import Message, Task, Turn
from sqlrl_jax.config import Config


@dataclass
class StepResult:
    """What follows an action.

    `observation` is the raw text after the model's own, tags and reminder included; None at the end. `reward` counts once,
    when `done`. `outcome` is one of rollout.types.OUTCOMES, empty until `done`. `metrics` are totals of the episode so far.
    """

    observation: str | None = None
    reward: float = 0.0
    done: bool = False
    outcome: str = ""
    turn: Turn | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class Environment:
    """Base of all environments: one instance an episode. `shared` is what `open_shared` of the same class returned."""

    def __init__(self, config: Config, shared: Any) -> None:
        self.config = config
        self.shared = shared

    @classmethod
    def open_shared(cls, config: Config) -> Any:
        """Called once in a process. If what it returns has a `close`, that is called at the end."""
        return None

    def reset(self, task: Task) -> list[Message]:
        """Starts the episode; returns the prompt."""
        raise NotImplementedError(f"{type(self).__name__}.reset")

    def step(self, action: str, turn: int) -> StepResult:
        """Acts on the text of turn number `turn` (from 1)."""
        raise NotImplementedError(f"{type(self).__name__}.step")

    def finish(self) -> StepResult:
        """The episode ended without an answer: no turn is left or the context is full."""
        return StepResult(done=True, outcome="malformed")


BUILT_IN = {"text2sql": "rollout.text2sql:Text2SQL"}


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
    name = config.environment.env_class
    return EnvironmentFactory(_import(BUILT_IN.get(name, name)), config)


def _import(name: str) -> type[Environment]:
    module_name, colon, class_name = name.partition(":")
    if not colon or not module_name or not class_name:
        raise UserError(f"environment.env_class = {name!r}: expected text2sql or package.module:Class")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"environment.env_class = {name!r}: {error}; run from the folder that holds {module_name!r} or install it"
        ) from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Environment)):
        raise UserError(
            f"environment.env_class = {name!r}: expected a subclass of rollout.environment.Environment there"
        )
    return found
