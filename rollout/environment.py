"""The worlds that a model acts in: the base class, text-to-SQL, and the door for environments of one's own.

An environment lives for one episode. `reset` gives the first messages, `step` takes the text of one turn of the model and
says what follows it, `finish` closes an episode that ended without an answer. All of them may block; they are called
from a pool of threads. What the episodes of a process share (workers, caches) is made once by `open_shared`.

Left out: tokens, chat templates and limits of length, which are the episode's business (rollout.episode).
"""

from __future__ import annotations

import importlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from rollout.errors import InfrastructureError, UserError
from rollout.sql import actions, grader, prompt, schema
from rollout.sql.executor import Executor, Result
from rollout.sql.observation import escape
from rollout.types import Message, Task, Turn
from sqlrl_jax.config import Config

T = TypeVar("T")

INVALID_ACTION = (
    "Your previous action is invalid. Follow the format of outputting thinking process and sql tool, and try again."
)
CACHED_GOLDS = 20_000
CACHED_SCHEMAS = 2_000


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


class Cache(Generic[T]):
    """Computes each key's value once, whichever thread asks first; the others wait for it. Failures are not kept."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, Future[T]] = OrderedDict()

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        with self._lock:
            future = self._values.get(key)
            mine = future is None
            if future is None:
                future = self._values[key] = Future()
                if len(self._values) > self._size:
                    self._values.popitem(last=False)
        if mine:
            try:
                future.set_result(compute())
            except BaseException as error:
                with self._lock:
                    self._values.pop(key, None)
                future.set_exception(error)
        return future.result()


class SharedSQL:
    """The executor and the caches that all text-to-SQL episodes of a process share."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self._golds: Cache[Result] = Cache(CACHED_GOLDS)
        self._schemas: Cache[str] = Cache(CACHED_SCHEMAS)

    def gold(self, task_id: str, db_id: str, sql: str) -> Result:
        """The gold query's whole result. Raises InfrastructureError naming the task if it has none."""
        result = self._golds.get((db_id, sql), lambda: self.executor.run(db_id, sql, whole=True))
        if result.status != "ok":
            raise InfrastructureError(
                f"task {task_id}: its gold query on {db_id} failed ({result.error}); repair or drop it"
            )
        return result

    def schema(self, db_id: str, style: schema.Style) -> str:
        """The database's schema text."""
        return self._schemas.get((db_id, style), lambda: schema.describe(self.executor, db_id, style))

    def close(self) -> None:
        self.executor.close()


class Text2SQL(Environment):
    """Questions over SQLite databases, answered with SQL after looking.

    Task fields: db_id, question, gold_sql; optional evidence, `schema` (text instead of the described one), `prompt`
    (messages instead of ours) and `max_turns`. The reward is 1.0 for a solution whose result is the gold's, otherwise 0.0;
    an episode without a usable solution is malformed and gets `malformed_reward`. Whether the model thought before it
    acted is not looked at: a right answer is right.
    """

    shared: SharedSQL

    @classmethod
    def open_shared(cls, config: Config) -> SharedSQL:
        sql = config.environment.text2sql
        return SharedSQL(
            Executor(
                sql.database_root,
                timeout=sql.timeout,
                workers=sql.workers,
                max_vm_steps=sql.max_vm_steps,
                max_rows=sql.max_rows,
                max_observation_chars=sql.max_observation_chars,
            )
        )

    def reset(self, task: Task) -> list[Message]:
        self._task = task
        self._db_id, self._gold_sql = _text(task, "db_id"), _text(task, "gold_sql")
        self._max_turns = int(task.fields.get("max_turns") or self.config.generator.max_turns)
        self._metrics: dict[str, float] = {"sql/queries": 0.0, "sql/seconds": 0.0}
        if task.fields.get("prompt"):
            return _messages(task)
        style = self.config.environment.text2sql.prompt_style
        text = task.fields.get("schema") or self.shared.schema(self._db_id, style)
        evidence = task.fields.get("evidence") or ""
        return prompt.build_messages(text, _text(task, "question"), evidence, style, self._max_turns)

    def step(self, action: str, turn: int) -> StepResult:
        request = actions.parse(action)
        record = Turn(action=action, sql=request.sql, status="invalid")
        if request.answered or turn >= self._max_turns:
            return self._end(request, record)
        if request.kind == "sql":
            result = self.shared.executor.run(self._db_id, request.sql)
            self._count(result)
            record.status, text = result.status, result.observation
        else:
            text = INVALID_ACTION
            self._metrics["sql/invalid"] = self._metrics.get("sql/invalid", 0.0) + 1
        left = self._max_turns - turn
        record.observation = text
        reminder = f"<reminder>You have {left} turns left to complete the task.</reminder>"
        observation = f"\n\n<observation>{text}\n{reminder}</observation>\n\n"
        return StepResult(observation=observation, turn=record, metrics=dict(self._metrics))

    def finish(self) -> StepResult:
        reward = self.config.environment.text2sql.malformed_reward
        return StepResult(reward=reward, done=True, outcome="malformed", metrics=dict(self._metrics))

    def _end(self, request: actions.Action, record: Turn) -> StepResult:
        if request.kind != "solution":
            record.status = "unused" if request.kind == "sql" else "invalid"
            step = self.finish()
            step.turn = record
            return step
        record.status = "solution"
        predicted = self.shared.executor.run(self._db_id, request.sql, whole=True)
        self._count(predicted)
        if predicted.status == "ok":
            gold = self.shared.gold(self._task.id, self._db_id, self._gold_sql)
            outcome = "correct" if grader.correct(predicted, gold, self._gold_sql) else "wrong"
        else:
            outcome = "timeout" if predicted.status == "timeout" else "sql_error"
            record.observation = escape(predicted.error)
        reward = 1.0 if outcome == "correct" else 0.0
        return StepResult(reward=reward, done=True, outcome=outcome, turn=record, metrics=dict(self._metrics))

    def _count(self, result: Result) -> None:
        name = f"sql/{result.status}"
        self._metrics["sql/queries"] += 1
        self._metrics["sql/seconds"] += result.seconds
        self._metrics[name] = self._metrics.get(name, 0.0) + 1


def _text(task: Task, name: str) -> str:
    value = task.fields.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InfrastructureError(f"task {task.id}: field {name}: expected text, found {value!r}")
    return value


def _messages(task: Task) -> list[Message]:
    """A task's own prompt, checked."""
    rows = task.fields["prompt"]
    if not isinstance(rows, list):
        raise InfrastructureError(
            f"task {task.id}: field prompt: expected a list of messages, found {type(rows).__name__}"
        )
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("role", "content")):
            raise InfrastructureError(f"task {task.id}: field prompt[{number}]: expected role and content, both text")
    return [Message(role=row["role"], content=row["content"]) for row in rows]


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
    return EnvironmentFactory(Text2SQL if name == "text2sql" else _import(name), config)


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
