"""What an attack is. Left out: what all attacks have in common (nothing changed, nothing leaked); the runner checks it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# What may come of an attack. REFUSED is denied or an error, STOPPED a timeout or an error, CONTAINED anything but an
# InfrastructureError; BROKEN is that error: the database is at fault, and no query on it is scored.
DENIED, ERROR, TIMEOUT, OK, BROKEN = "denied", "error", "timeout", "ok", "broken"
REFUSED, STOPPED, CONTAINED = "denied|error", "timeout|error", "ok|denied|error|timeout"

COUNTER = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT {}) "


@dataclass(frozen=True)
class Attack:
    """SQL statements that a fresh worker runs one after the other, all with the same expectation.

    `{scratch}` in them is a folder that must stay empty. `rows` are expected of the last, `shown` in its observation.
    `kills` says that only the death of the worker ends it, None that it may. `database` is a name in attacks.databases.
    """

    statements: tuple[str, ...]
    expected: str
    database: str = "plain"
    rows: list[tuple[Any, ...]] | None = None
    shown: str = ""
    kills: bool | None = False


def attacks(expected: str, *statements: str, database: str = "plain") -> list[Attack]:
    """One attack a statement, in a process of its own; those that are refused before they run share one."""
    size = 20 if set(expected.split("|")) <= {DENIED, ERROR} else 1
    kills = None if TIMEOUT in expected.split("|") and expected != TIMEOUT else False
    return [Attack(statements[i : i + size], expected, database, kills=kills) for i in range(0, len(statements), size)]


def answers(database: str, expected: dict[str, list[tuple[Any, ...]]]) -> list[Attack]:
    """Statements that are answered, with their rows."""
    return [Attack((statement,), OK, database, rows) for statement, rows in expected.items()]
