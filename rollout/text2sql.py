"""Text-to-SQL: questions over SQLite databases, answered with SQL after looking.

The model runs queries and reads what they return until it gives a solution, whose result is compared with the gold
query's. Executor, gold results and schema texts are shared by all episodes of a process.

Left out: how a query is contained (rollout.sql.executor) and when an answer is right (rollout.sql.judge).
"""

from __future__ import annotations

from pathlib import Path

from rollout.cache import Cache
from rollout.environment import Environment, StepResult
from rollout.errors import InfrastructureError
from rollout.sql import actions, gold_results, grader, prompt, schema
from rollout.sql.budget import TokenBudget
from rollout.sql.executor import Executor, Result
from rollout.sql.judge import Judge, Suites
from rollout.sql.observation import escape
from rollout.sql.syntax import reads_a_table
from rollout.types import Message, Task, Turn
from sqlrl_jax.config import Config, Text2SQLConfig

INVALID_ACTION = (
    "Your previous action is invalid. Follow the format of outputting thinking process and sql tool, and try again."
)
CACHED_SCHEMAS = 2_000


class SharedSQL:
    """The executor and the caches that all text-to-SQL episodes of a process share."""

    def __init__(
        self, executor: Executor, judge: Judge, template: prompt.Template, style: schema.Style, budget: TokenBudget
    ) -> None:
        self.executor, self.judge, self.template = executor, judge, template
        self._style, self._budget = style, budget
        self._schemas: Cache[schema.SchemaText] = Cache(CACHED_SCHEMAS)

    def schema(self, db_id: str, question: str) -> str:
        """The database's schema text, or what of it the question needs most where it is too long."""
        read = self._schemas.get(
            db_id, lambda: schema.open_schema(self.executor, db_id, self._style, self._budget.fits)
        )
        return read.text(question)

    def close(self) -> None:
        self.executor.close()
        self.judge.close()


class Text2SQL(Environment):
    """Questions over SQLite databases, answered with SQL after looking.

    Task fields: db_id, question, gold_sql; optional `db_root` (the database's folder below the configured root), evidence,
    `schema` (text instead of the described one), `prompt` (messages instead of ours), `max_turns`, and `gold_results`
    (published results, which then grade instead of `gold_sql`; rollout.sql.gold_results). The reward is 1.0 for a solution
    that is right by `environment.text2sql.grading`, `partial_reward` for a wrong one that found rows in a table, otherwise
    0.0; an episode without a usable solution is malformed and gets `malformed_reward`. Whether the model thought before it
    acted counts only with `require_think`.
    """

    shared: SharedSQL

    @classmethod
    def open_shared(cls, config: Config) -> SharedSQL:
        sql = config.environment.text2sql
        template = prompt.choose_template(sql.prompt_template, sql.prompt_style, sql.engine)
        budget = TokenBudget(sql.max_schema_tokens, config.trainer.policy.model.path)
        executor = open_executor(sql, sql.database_root)
        suites = None
        if "spider_test_suite" in (sql.grading, *sql.measures):
            root = sql.test_suite_root
            suites = Suites(Path(root), open_executor(sql, root), sql.test_suite_keep_distinct)
        judge = Judge(executor, sql.grading, sql.measures, sql.column_permutation, suites)
        return SharedSQL(executor, judge, template, sql.prompt_style, budget)

    def reset(self, task: Task) -> list[Message]:
        self._task = task
        self._database, self._gold_results = database_of(task), gold_results.of(task)
        self.shared.executor.locate(self._database)  # a missing one is told before the model is asked
        self._gold_sql = "" if self._gold_results else _text(task, "gold_sql")
        judge = self.shared.judge
        possible = () if self._gold_results else judge.gradings_of(task.id, self._database)
        self._measures = [name for name in possible if name in judge.measures]
        self._max_turns = int(task.fields.get("max_turns") or self.config.generator.max_turns)
        self._metrics: dict[str, float] = {"sql/queries": 0.0, "sql/seconds": 0.0}
        self._metrics |= {f"grade/{name}": 0.0 for name in self._measures}
        self._thought, self._thoughtless = False, False
        if task.fields.get("prompt"):
            return _messages(task)
        question, evidence = _text(task, "question"), _optional(task, "evidence")
        text = _optional(task, "schema") or self.shared.schema(self._database, f"{question}\n{evidence}")
        return self.shared.template.messages(text, question, evidence, self._max_turns)

    def step(self, action: str, turn: int) -> StepResult:
        request = actions.parse(action)
        form = actions.form(action)
        self._thought = self._thought or form.thought
        self._thoughtless = self._thoughtless or (turn > 1 and not form.thought_first)
        record = Turn(action=action, sql=request.sql, status="invalid")
        if request.answered or turn >= self._max_turns:
            return self._end(request, record, form.solutions)
        if request.kind == "sql":
            result = self.shared.executor.run(self._database, request.sql)
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

    def _end(self, request: actions.Action, record: Turn, solutions: int) -> StepResult:
        thoughtful = self._thought and not self._thoughtless and solutions == 1
        well_formed = thoughtful or not self.config.environment.text2sql.require_think
        if request.kind != "solution" or not well_formed:
            record.status = "unused" if request.kind == "sql" else "invalid"
            step = self.finish()
            step.turn = record
            return step
        record.status = "solution"
        predicted = self.shared.executor.run(self._database, request.sql, whole=True)
        self._count(predicted)
        record.answer = grader.fingerprint(predicted)
        if predicted.status != "ok":
            record.observation = escape(predicted.error)
        outcome = self._outcome(request.sql, predicted)
        reward = 1.0 if outcome == "correct" else self._partial(request.sql, predicted)
        return StepResult(reward=reward, done=True, outcome=outcome, turn=record, metrics=dict(self._metrics))

    def _outcome(self, sql: str, predicted: Result) -> str:
        """How the episode ended; notes what every measure says."""
        judge = self.shared.judge
        if self._gold_results:
            right = predicted.status == "ok" and gold_results.matches(predicted.rows, self._gold_results)
        else:
            verdicts = judge.verdicts(self._task.id, self._database, sql, predicted, self._gold_sql)
            right = verdicts[judge.grading]
            self._metrics |= {f"grade/{name}": float(verdicts[name]) for name in self._measures}
        if right:
            return "correct"
        return {"ok": "wrong", "timeout": "timeout"}.get(predicted.status, "sql_error")

    def _partial(self, sql: str, predicted: Result) -> float:
        """What an answer that is not right earns. `SELECT 1` returns a row of any database, so a table must be read."""
        partial = self.config.environment.text2sql.partial_reward
        return partial if partial and predicted.status == "ok" and predicted.rows and reads_a_table(sql) else 0.0

    def _count(self, result: Result) -> None:
        name = f"sql/{result.status}"
        self._metrics["sql/queries"] += 1
        self._metrics["sql/seconds"] += result.seconds
        self._metrics[name] = self._metrics.get(name, 0.0) + 1


def open_executor(sql: Text2SQLConfig, root: str) -> Executor:
    """The configured executor over a folder of databases."""
    return Executor(
        root,
        timeout=sql.timeout,
        workers=sql.workers,
        max_vm_steps=sql.max_vm_steps,
        max_rows=sql.max_rows,
        max_observation_chars=sql.max_observation_chars,
        engine=sql.engine,
        cache_mb=sql.cache_mb,
    )


def database_of(task: Task) -> str:
    """A task's database as the executor knows it: `<db_root>/<db_id>`. Raises InfrastructureError naming the field."""
    root, db_id = _optional(task, "db_root"), _text(task, "db_id")
    return f"{root.strip('/')}/{db_id}" if root else db_id


def _text(task: Task, name: str) -> str:
    text = _optional(task, name)
    if not text.strip():
        raise InfrastructureError(f"task {task.id}: field {name}: expected text, found {task.fields.get(name)!r}")
    return text


def _optional(task: Task, name: str) -> str:
    """A field that may be missing or null."""
    value = task.fields.get(name)
    if value is not None and not isinstance(value, str):
        raise InfrastructureError(f"task {task.id}: field {name}: expected text, found {value!r}")
    return value or ""


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
