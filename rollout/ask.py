"""Text-to-SQL for a question whose answer nobody knows yet: what `launch.py ask` runs.

The same episode as in training, but nothing is graded: `correct` means here that the final query ran. Its result is in
the last turn, for the person who asked.
"""

from __future__ import annotations

from dataclasses import replace

from rollout.environment import StepResult
from rollout.sql.executor import Result
from rollout.text2sql import Text2SQL
from rollout.types import Message, Task

NO_GOLD = "SELECT NULL"


class Ask(Text2SQL):
    """Text2SQL without `gold_sql`."""

    def reset(self, task: Task) -> list[Message]:
        return super().reset(replace(task, fields={**task.fields, "gold_sql": NO_GOLD}))

    def step(self, action: str, turn: int) -> StepResult:
        result = super().step(action, turn)
        if result.outcome == "correct" and result.turn is not None:
            result.turn.observation = self._predicted.observation
        return result

    def _outcome(self, sql: str, predicted: Result) -> str:
        self._predicted = predicted
        return {"ok": "correct", "timeout": "timeout"}.get(predicted.status, "sql_error")
