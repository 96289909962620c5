"""The SQL environment's parts: executor and its workers, guard, grader, observations, prompts, schema text."""

from rollout.sql.executor import Executor, Result

__all__ = ["Executor", "Result"]
