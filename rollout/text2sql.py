"""Text-to-SQL: questions over SQLite databases, answered with SQL after looking.

The model runs queries and reads what they return until it gives a solution, whose result is compared with the gold
query's. Executor, gold results and schema texts are shared by all episodes of a process.

Left out: how a query is contained (rollout.sql.executor) and when two results are equal (rollout.sql.grader).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

from rollout.environment import Environment, StepResult
from rollout.errors import InfrastructureError
from rollout.sql import actions, grader, prompt, schema
from rollout.sql.budget import TokenBudget
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

    def __init__(self, executor: Executor, template: prompt.Template, style: schema.Style, budget: TokenBudget) -> None:
        self.executor, self.template = executor, template
        self._style, self._budget = style, budget
        self._golds: Cache[Result] = Cache(CACHED_GOLDS)
        self._schemas: Cache[schema.SchemaText] = Cache(CACHED_SCHEMAS)

    def gold(self, task_id: str, db_id: str, sql: str) -> Result:
        """The gold query's whole result. Raises InfrastructureError naming the task if it has none."""
        result = self._golds.get((db_id, sql), lambda: self.executor.run(db_id, sql, whole=True))
        if result.status != "ok":
            raise InfrastructureError(
                f"task {task_id}: its gold query on {db_id} failed ({result.error}); repair or drop it"
            )
        return result

    def schema(self, db_id: str, question: str) -> str:
        """The database's schema text, or what of it the question needs most where it is too long."""
        read = self._schemas.get(
            db_id, lambda: schema.open_schema(self.executor, db_id, self._style, self._budget.fits)
        )
        return read.text(question)

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
        template = prompt.choose_template(sql.prompt_template, sql.prompt_style, sql.engine)
        budget = TokenBudget(sql.max_schema_tokens, config.trainer.policy.model.path)
        executor = Executor(
            sql.database_root,
            timeout=sql.timeout,
            workers=sql.workers,
            max_vm_steps=sql.max_vm_steps,
            max_rows=sql.max_rows,
            max_observation_chars=sql.max_observation_chars,
        )
        return SharedSQL(executor, template, sql.prompt_style, budget)

    def reset(self, task: Task) -> list[Message]:
        self._task = task
        self._db_id, self._gold_sql = _text(task, "db_id"), _text(task, "gold_sql")
        self._max_turns = int(task.fields.get("max_turns") or self.config.generator.max_turns)
        self._metrics: dict[str, float] = {"sql/queries": 0.0, "sql/seconds": 0.0}
        if task.fields.get("prompt"):
            return _messages(task)
        question, evidence = _text(task, "question"), task.fields.get("evidence") or ""
        text = task.fields.get("schema") or self.shared.schema(self._db_id, f"{question}\n{evidence}")
        return self.shared.template.messages(text, question, evidence, self._max_turns)

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
