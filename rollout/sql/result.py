"""What a query gave, as the executor hands it out.

Rows stay as the worker encoded them until someone looks, and the text of a whole result, which is for grading, is made
only when asked for: most results are read by the model alone, and graded ones by the grader alone.
"""

from __future__ import annotations

import marshal

from rollout.sql import observation as text
from rollout.sql.observation import Cell

Rows = list[tuple[Cell, ...]] | tuple[()]
Shown = tuple[int, int]  # rows and characters of an observation, at most

# What a worker answers to a query: a rollout.sql.engines.Reply with its rows encoded.
Answer = tuple[str, tuple[str, ...], bytes, bool, str | None, str, float]


class Result:
    """What a query gave.

    `status` is ok, denied (not a read), error, or timeout. `rows` are all rows if the whole result was asked for,
    otherwise the first ones; `truncated` says that there are more. `observation` is what the model reads. `seconds` is
    CPU time, 0 for a result that was remembered.
    """

    __slots__ = ("_observation", "_rows", "_shown", "columns", "error", "seconds", "status", "truncated")

    def __init__(
        self,
        status: str,
        columns: tuple[str, ...] = (),
        rows: Rows | bytes = (),
        truncated: bool = False,
        observation: str | None = "",
        error: str = "",
        seconds: float = 0.0,
        shown: Shown = (0, 0),
    ) -> None:
        """`rows` may be marshalled; without an `observation`, one of `shown` size is made of the rows."""
        self.status, self.columns, self.truncated = status, columns, truncated
        self.error, self.seconds = error, seconds
        self._rows, self._observation, self._shown = rows, observation, shown

    @property
    def rows(self) -> Rows:
        rows = self._rows
        if isinstance(rows, bytes):
            rows = self._rows = decoded(rows)
        return rows

    @property
    def observation(self) -> str:
        if self._observation is None:
            max_rows, max_chars = self._shown
            rows = self.rows
            self._observation = text.render(self.columns, rows[:max_rows], len(rows), not self.truncated, max_chars)
        return self._observation

    def __eq__(self, other: object) -> bool:
        """The same verdict and the same content; the time it took doesn't matter."""
        return isinstance(other, Result) and self._content() == other._content()

    def __repr__(self) -> str:
        names = ("status", "columns", "rows", "truncated", "observation", "error", "seconds")
        return f"Result({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def _content(self) -> tuple[object, ...]:
        return (self.status, self.columns, list(self.rows), self.truncated, self.observation, self.error)


def encoded(rows: Rows) -> bytes:
    """Rows as they go over the pipe and rest in the cache."""
    return marshal.dumps(rows, 2)


def decoded(data: bytes) -> Rows:
    rows: Rows = marshal.loads(data)
    return rows
