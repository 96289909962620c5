"""The engines that a SQL worker can run, by name, and what they all share.

The executor and its workers both read this table; an engine's own module is imported in the worker only. Left out: any
way to bring an engine by import path. One that isn't safe would be worse than none.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple, Protocol

from rollout.sql.observation import Cell

COUNTED_ROWS = 10_000  # rows of a long result are counted up to here
SHOWN_BYTES = 4_000_000  # of cells, in a result that only the model reads
MAX_RESULT_ROWS = 100_000
MAX_RESULT_BYTES = 64_000_000

# Status, columns, rows, truncated, observation, error, CPU seconds. The status is ok, denied, error or timeout; "broken"
# says, in the error, that the database or this program is at fault and not the query. An observation of None stands for
# what rollout.sql.observation makes of the rows.
Reply = tuple[str, tuple[str, ...], list[tuple[Cell, ...]], bool, str | None, str, float]


class Engine(Protocol):
    """Runs one query at a time in a worker process, on databases that it keeps open.

    Made from (timeout in CPU seconds, max_vm_steps, max_rows, max_chars of an observation, the database root); sets the
    limits of its process (rollout.sql.guard) before it looks at any database.
    """

    def begin(self) -> None:
        """A batch of queries comes. Files may have changed since the last one; within one they are taken as they are."""
        return None

    def run(self, path: str, uri: str, sql: str, whole: bool) -> Reply:
        """Runs one query on a database file; never raises for what a query does."""
        ...


class Kind(NamedTuple):
    module: str
    name: str
    suffix: str  # of a database file
    site_packages: bool  # False: the standard library is enough, and a worker starts sooner


ENGINES = {
    "sqlite": Kind("rollout.sql.sqlite_engine", "SQLiteEngine", ".sqlite", False),
    "duckdb": Kind("rollout.sql.duckdb_engine", "DuckDBEngine", ".duckdb", True),
}


def load(name: str) -> Callable[..., Engine]:
    """The class of an engine."""
    kind = ENGINES[name]
    engine: Callable[..., Engine] = getattr(import_module(kind.module), kind.name)
    return engine
