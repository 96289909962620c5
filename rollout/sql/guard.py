"""What a query may do inside a worker process: allow-list, budgets, SQLite and process limits, a fixed clock and dice.

A query may read the opened database and ask for its schema; everything else is refused before it runs. The first limit of
its work is a count of SQLite's VM steps, which is the same on a busy machine and on an idle one; the backup is the CPU
time of the worker. `random()` and 'now' are fixed, so that the same query gives the same rows every time.

Left out: a process sandbox (no new privileges, landlock). The limits here are SQLite's and the kernel's rlimits.
"""

from __future__ import annotations

import functools
import math
import resource
import sqlite3
import time
from collections.abc import Callable
from typing import Any

NOW = "2025-01-01 00:00:00"  # what 'now' and CURRENT_TIMESTAMP are

MAX_CELL_BYTES = 4_000_000
MAX_SQL_BYTES = 100_000
HEAP_BYTES = 256 * 2**20  # all of SQLite's memory in one worker
ADDRESS_SPACE_BYTES = 2 * 2**30
PROGRESS_INTERVAL = 10_000  # VM steps between two looks at the budget

LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: MAX_CELL_BYTES,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: MAX_SQL_BYTES,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 500,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 200,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 1_000_000,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1000,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 10,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}

_KINDS = "TABLE INDEX VIEW TRIGGER TEMP_TABLE TEMP_INDEX TEMP_VIEW TEMP_TRIGGER VTABLE"
_OTHERS = "ALTER_TABLE ANALYZE ATTACH DELETE DETACH INSERT PRAGMA REINDEX SAVEPOINT TRANSACTION UPDATE"
_REFUSED = [f"{verb}_{kind}" for verb in ("CREATE", "DROP") for kind in _KINDS.split()] + _OTHERS.split()
ACTION_NAMES = {getattr(sqlite3, f"SQLITE_{name}"): name.replace("_", " ") for name in _REFUSED}

SCHEMA_PRAGMAS = {"table_info", "table_xinfo", "table_list", "foreign_key_list"}
SCHEMA_PRAGMAS |= {"index_list", "index_info", "index_xinfo"}
# Full-text tables ask for these, without a value, when a query first touches them.
SILENT_PRAGMAS = {"data_version", "page_size"}
SQLITE_TABLES = {"sqlite_master", "sqlite_schema", "sqlite_temp_master", "sqlite_temp_schema", "sqlite_sequence"}
SQLITE_TABLES |= {"sqlite_stat1", "sqlite_stat4"}
# sqlite_stmt would show the gold query, dbpage and dbstat the file; the others run SQL or touch the disk.
DENIED_TABLES = {"dbstat", "bytecode", "tables_used", "fsdir", "completion"}
DENIED_FUNCTIONS = {
    "load_extension",
    "fts3_tokenizer",
    "readfile",
    "writefile",
    "edit",
    "eval",
    "optimize",
    "sqlite_log",
}

CLOCK_FUNCTIONS = ("date", "time", "datetime", "julianday", "unixepoch", "strftime", "timediff")
CLOCK_KEYWORDS = {"current_timestamp": NOW, "current_date": NOW[:10], "current_time": NOW[11:]}


class Guard:
    """The rules for one query at a time, shared by all connections of a worker. Call `arm` before each query."""

    def __init__(self, max_vm_steps: int, cpu_seconds: float) -> None:
        self._max_vm_steps, self._cpu_seconds = max_vm_steps, cpu_seconds
        self._interval = min(PROGRESS_INTERVAL, max_vm_steps)
        self._clock = sqlite3.connect(":memory:", isolation_level=None)
        self._clock_value = functools.lru_cache(maxsize=4096, typed=True)(self._ask_clock)
        self.arm()

    def arm(self) -> None:
        """Starts a query: full budgets, dice back at their first throw, and a CPU limit that kills what can't be stopped."""
        self.denied = ""
        self.exhausted = False
        self._steps = 0
        self._dice = 0
        self._start = time.thread_time()
        limit_cpu(self._cpu_seconds)

    def seconds(self) -> float:
        """CPU seconds since `arm`."""
        return time.thread_time() - self._start

    def protect(self, connection: sqlite3.Connection) -> None:
        """Puts the rules on a connection, for good. Anything the worker itself has to set up comes before."""
        connection.execute("PRAGMA temp_store = MEMORY")  # sorting never makes a file
        connection.execute("PRAGMA query_only = ON")
        connection.execute("PRAGMA cell_size_check = ON")
        for category, value in LIMITS.items():
            connection.setlimit(category, value)
        self._fix_time_and_dice(connection)
        connection.set_progress_handler(self._progress, self._interval)
        connection.set_authorizer(self._authorize)

    def spend(self) -> bool:
        """Whether the CPU budget is used up; for loops that run outside of SQLite."""
        self.exhausted = self.exhausted or self.seconds() > self._cpu_seconds
        return self.exhausted

    def _progress(self) -> bool:
        self._steps += self._interval
        self.exhausted = self._steps >= self._max_vm_steps
        return self.spend()

    def _authorize(self, action: int, first: str | None, second: str | None, _db: str | None, _by: str | None) -> int:
        refused = _refusal(action, first, second)
        if not refused:
            return sqlite3.SQLITE_OK
        self.denied = self.denied or refused
        return sqlite3.SQLITE_DENY

    def _fix_time_and_dice(self, connection: sqlite3.Connection) -> None:
        known = {name for (name,) in self._clock.execute("SELECT DISTINCT name FROM pragma_function_list")}
        for name in CLOCK_FUNCTIONS:
            if name in known:
                connection.create_function(name, -1, self._clock_function(name), deterministic=True)
        for name, value in CLOCK_KEYWORDS.items():
            connection.create_function(name, 0, _constant(value), deterministic=True)
        connection.create_function("random", 0, self._random)
        connection.create_function("randomblob", 1, self._randomblob)

    def _random(self) -> int:
        self._dice = (self._dice * 6364136223846793005 + 1442695040888963407) % 2**64  # Knuth's MMIX generator
        return self._dice - 2**63

    def _randomblob(self, size: object) -> bytes:
        length = max(1, int(size)) if isinstance(size, int | float) and math.isfinite(size) else 1
        if length > MAX_CELL_BYTES:
            raise ValueError("string or blob too big")
        return (self._random() + 2**63).to_bytes(8, "little") * (length // 8) + b"\x5a" * (length % 8)

    def _clock_function(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: self._at_now(name, *arguments)

    def _at_now(self, name: str, *arguments: object) -> object:
        values = arguments[1:] if name == "strftime" else arguments
        if not values and (arguments or name not in ("strftime", "timediff")):
            return self._clock_value(name, (*arguments, NOW))
        fixed = tuple(NOW if _is_now(value) else value for value in values)
        return self._clock_value(name, (*arguments[: len(arguments) - len(values)], *fixed))

    def _ask_clock(self, name: str, arguments: tuple[object, ...]) -> object:
        marks = ",".join("?" * len(arguments))
        return self._clock.execute(f"SELECT {name}({marks})", arguments).fetchone()[0]


def _constant(value: str) -> Callable[[], str]:
    return lambda: value


def _is_now(value: object) -> bool:
    """As SQLite sees it: text up to the first NUL, in any case; a blob is read as text."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return isinstance(value, str) and len(value) < 100 and value.split("\0")[0].lower() == "now"


def _refusal(action: int, first: str | None, second: str | None) -> str:
    """What is refused, for the error message; empty when it is allowed."""
    if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE):
        return ""
    if action == sqlite3.SQLITE_READ:
        table = (first or "").lower()
        sqlite_own = table.startswith("sqlite_") and table not in SQLITE_TABLES
        pragma = table.startswith("pragma_") and table[7:] not in SCHEMA_PRAGMAS
        return f"table {first}" if sqlite_own or pragma or table in DENIED_TABLES else ""
    if action == sqlite3.SQLITE_FUNCTION:
        name = (second or "").lower()
        return f"function {second}" if name in DENIED_FUNCTIONS or name.startswith("sqlite_compile") else ""
    if action == sqlite3.SQLITE_PRAGMA:
        name = (first or "").lower()
        allowed = name in SCHEMA_PRAGMAS or (name in SILENT_PRAGMAS and second is None)
        return "" if allowed else f"PRAGMA {first}"
    if action == sqlite3.SQLITE_UPDATE and first in ("sqlite_master", "sqlite_schema"):
        return (
            ""  # SQLite asks this when it declares a built-in virtual table (json_each); a real update fails by itself
        )
    return ACTION_NAMES.get(action, f"action {action}")


def limit_cpu(seconds: float) -> None:
    """Arms the kernel: past `seconds` from now (rounded up, plus one) the process dies by SIGXCPU."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = math.ceil(time.process_time() + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def limit_process() -> None:
    """Limits of the whole worker: no file may grow, no core dumps, bounded memory. Works without privileges."""
    _lower(resource.RLIMIT_FSIZE, 0)
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_AS, ADDRESS_SPACE_BYTES)
    with sqlite3.connect(":memory:") as connection:
        connection.execute(f"PRAGMA hard_heap_limit = {HEAP_BYTES}")
    connection.close()


def _lower(kind: int, value: int) -> None:
    try:
        resource.setrlimit(kind, (value, value))
    except (ValueError, OSError):  # macOS refuses RLIMIT_AS; the heap limit still holds
        if kind != resource.RLIMIT_AS:
            raise
