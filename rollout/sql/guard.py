"""What a query may do inside a worker process: allow-list, budgets, SQLite and process limits, a fixed clock and dice.

A query may read the opened database and ask for its schema; everything else is refused before it runs. The first limit of
its work is a count of SQLite's VM steps, which is the same on a busy machine and on an idle one; the backup is the CPU
time of the worker. `random()` and 'now' are fixed, so that the same query gives the same rows every time.

Left out: the walls around the whole process, which are rollout.sql.sandbox.
"""

from __future__ import annotations

import math
import re
import resource
import sqlite3
import time
from collections.abc import Callable
from typing import NamedTuple

from rollout.sql import clock
from rollout.sql.memory import Memory

MAX_CELL_BYTES = 4_000_000
MAX_SQL_BYTES = 100_000
MAX_NAMES_CHARS = 1_000_000  # of all columns of a result together
HEAP_BYTES = 256 * 2**20  # all of SQLite's memory in one worker
ADDRESS_SPACE_BYTES = 2 * 2**30
MAX_HARMLESS = 10_000  # names of tables and functions that a connection's rules remember
PROGRESS_INTERVAL = 10_000  # VM steps between two looks at the budget
CPU_SLACK = 1.0  # seconds by which the kernel's limit may be late; setting it for every query is most of a query's cost
TRIM_INTERVAL = 64  # queries between two looks at the memory

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
# Virtual tables that a database may hold, and those that need no declaration. Any other module is refused: sqlite_stmt
# would show the gold query, dbstat the file; modules that someone's SQLite has besides may run SQL or touch the disk.
STORED_MODULES = {"fts3", "fts4", "fts5", "fts4aux", "fts5vocab", "rtree", "rtree_i32", "geopoly"}
TREE_MODULES = {"rtree", "rtree_i32", "geopoly"}
TREE_PARTS = ("node", "rowid", "parent")  # of an R-tree: the tables that it is kept in
FREE_MODULES = {"json_each", "json_tree", "generate_series"}
# Modules of common builds, for a SQLite that can't list its own.
OTHER_MODULES = {"dbstat", "bytecode", "tables_used", "fsdir", "completion", "csv", "zipfile"}
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

# What EXPLAIN gives. It shows addresses in memory, which differ from worker to worker; EXPLAIN QUERY PLAN doesn't.
PROGRAM_COLUMNS = ("addr", "opcode", "p1", "p2", "p3", "p4", "p5", "comment")

_NAME = r"""(?:"(?:[^"]|"")*"|'(?:[^']|'')*'|`(?:[^`]|``)*`|\[[^\]]*\]|[^\s"'`\[(;.]+)"""
_PLAIN = re.compile(r"CREATE (?:TABLE|VIEW|TRIGGER|(?:UNIQUE )?INDEX)\b", re.IGNORECASE)
_MODULE = re.compile(rf"CREATE VIRTUAL TABLE\s*{_NAME}(?:\s*\.\s*{_NAME})?\s*USING\s+[\"'`\[]?(\w+)", re.IGNORECASE)

_WRITES = {sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE}


class _Tables(NamedTuple):
    """Names of a database in lower case: its own tables and views, what may not be read, and the parts of R-trees."""

    own: frozenset[str]
    denied: frozenset[str]
    shadows: frozenset[str]

    def readable(self, table: str) -> bool:
        if table.startswith("sqlite_"):
            return table in SQLITE_TABLES
        if table.startswith("pragma_") and table not in self.own:  # one of its own hides SQLite's
            return table[7:] in SCHEMA_PRAGMAS
        return table not in self.denied


class Guard:
    """The rules for one query at a time, shared by all connections of a worker. Call `arm` before each query."""

    def __init__(self, max_vm_steps: int, cpu_seconds: float) -> None:
        self._max_vm_steps, self._cpu_seconds = max_vm_steps, cpu_seconds
        self._interval = min(PROGRESS_INTERVAL, max_vm_steps)
        self._cpu_limit = 0.0
        self._memory, self._queries = Memory(), 0
        self._ask = sqlite3.connect(":memory:", isolation_level=None)
        self._modules = OTHER_MODULES | {name for (name,) in self._ask.execute("SELECT name FROM pragma_module_list")}
        self.arm()

    def arm(self) -> None:
        """Starts a query: full budgets, dice back at their first throw, and a CPU limit that kills what can't be stopped."""
        self.denied = ""
        self.exhausted = False
        self._steps = 0
        self._dice = 0
        self._queries += 1
        if self._queries % TRIM_INTERVAL == 0:
            self._memory.give_back()
        self._start = time.process_time()
        if self._start + self._cpu_seconds + CPU_SLACK > self._cpu_limit:
            self._cpu_limit = limit_cpu(self._cpu_seconds)

    def allow(self, cpu_seconds: float) -> None:
        """More time than a query has, for work of the worker's own, until `arm`."""
        limit_cpu(cpu_seconds)
        self._cpu_limit = 0.0

    def seconds(self) -> float:
        """CPU seconds since `arm`."""
        return time.process_time() - self._start

    def protect(self, connection: sqlite3.Connection) -> None:
        """Puts the rules on a connection, for good. Anything the worker itself has to set up comes before."""
        connection.execute("PRAGMA temp_store = MEMORY")  # sorting never makes a file
        connection.execute("PRAGMA query_only = ON")
        connection.execute("PRAGMA cell_size_check = ON")
        for category, value in LIMITS.items():
            connection.setlimit(category, value)
        if not clock.stands_still(connection):
            clock.replace_functions(connection, self._ask)
        connection.create_function("random", 0, self._random)
        connection.create_function("randomblob", 1, self._randomblob)
        tables = self._tables(connection)
        connection.set_progress_handler(self._progress, self._interval)
        connection.set_authorizer(self._authorizer(tables))

    def check_columns(self, columns: tuple[str, ...]) -> None:
        """Refuses EXPLAIN, which no rule sees before it runs, and names without end. Raises sqlite3.DatabaseError."""
        if sum(map(len, columns)) > MAX_NAMES_CHARS:
            raise sqlite3.DatabaseError(f"the names of the columns are longer than {MAX_NAMES_CHARS} characters")
        if columns == PROGRAM_COLUMNS:
            self.denied = "EXPLAIN (use EXPLAIN QUERY PLAN)"
            raise sqlite3.DatabaseError(self.denied)

    def spend(self) -> bool:
        """Whether the CPU budget is used up, of which `spent` seconds are gone."""
        self.spent = self.seconds()
        self.exhausted = self.exhausted or self.spent > self._cpu_seconds
        return self.exhausted

    def _progress(self) -> bool:
        self._steps += self._interval
        self.exhausted = self._steps >= self._max_vm_steps
        return self.spend()

    def _authorizer(self, tables: _Tables) -> Callable[..., int]:
        """The rules as SQLite calls them: for each column that a query names. What was found harmless once stays so."""
        columns_of: set[str | None] = set()
        functions: set[str | None] = set()
        read, function, ok = sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_OK

        def authorize(action: int, first: str | None, second: str | None, db: str | None, by: str | None) -> int:
            if first in columns_of if action == read else action == function and second in functions:
                return ok
            verdict = self._authorize(tables, action, first, second, db, by)
            if verdict == ok and len(columns_of) + len(functions) < MAX_HARMLESS:
                if action == read:
                    columns_of.add(first)
                elif action == function:
                    functions.add(second)
            return verdict

        return authorize

    def _authorize(
        self, tables: _Tables, action: int, first: str | None, second: str | None, _db: object, _by: object
    ) -> int:
        if action == sqlite3.SQLITE_READ:
            refused = "" if tables.readable((first or "").lower()) else f"table {first}"
        elif action in _WRITES and (first or "").lower() in tables.shadows:
            refused = ""  # an R-tree prepares its INSERT when it is opened; one that ran would meet query_only
        else:
            refused = _refusal(action, first, second)
        if not refused:
            return sqlite3.SQLITE_OK
        self.denied = self.denied or refused
        return sqlite3.SQLITE_DENY

    def _tables(self, connection: sqlite3.Connection) -> _Tables:
        """What the names of a database stand for.

        A table of the database hides a module of the same name.
        """
        connection.text_factory = lambda data: data.decode("utf-8", "replace")
        stored = connection.execute(
            "SELECT name, sql FROM sqlite_master WHERE typeof(name) = 'text' AND typeof(sql) = 'text'"
        ).fetchall()
        connection.text_factory = str
        denied = {name.lower() for name in self._modules - FREE_MODULES}
        own = {name.lower() for name, _ in stored}
        denied -= own
        shadows: set[str] = set()
        for name, sql in stored:
            if _PLAIN.match(sql):
                continue
            module = _MODULE.match(sql)
            if module is None or module[1].lower() not in STORED_MODULES:
                denied.add(name.lower())
            elif module[1].lower() in TREE_MODULES:
                shadows.update(f"{name.lower()}_{part}" for part in TREE_PARTS)
        return _Tables(frozenset(own), frozenset(denied), frozenset(shadows))

    def _random(self) -> int:
        self._dice = (self._dice * 6364136223846793005 + 1442695040888963407) % 2**64  # Knuth's MMIX generator
        return self._dice - 2**63

    def _randomblob(self, size: object) -> bytes:
        length = max(1, int(size)) if isinstance(size, int | float) and math.isfinite(size) else 1
        if length > MAX_CELL_BYTES:
            raise ValueError("string or blob too big")
        return (self._random() + 2**63).to_bytes(8, "little") * (length // 8) + b"\x5a" * (length % 8)


def _refusal(action: int, first: str | None, second: str | None) -> str:
    """What is refused, for the error message; empty when it is allowed."""
    if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE):
        return ""
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


def limit_cpu(seconds: float) -> float:
    """Arms the kernel: past `seconds` from now (rounded up, plus one) the process dies by SIGXCPU. Returns when."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = math.ceil(time.process_time() + seconds) + 1
    soft = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
    return float(soft)


def limit_process() -> None:
    """Limits of the whole worker: no file may grow, no core dumps, bounded memory, a clock that stands still."""
    _lower(resource.RLIMIT_FSIZE, 0)
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_AS, ADDRESS_SPACE_BYTES)
    clock.stop()
    with sqlite3.connect(":memory:") as connection:
        connection.execute(f"PRAGMA hard_heap_limit = {HEAP_BYTES}")
    connection.close()


def _lower(kind: int, value: int) -> None:
    try:
        resource.setrlimit(kind, (value, value))
    except (ValueError, OSError):  # macOS refuses RLIMIT_AS; the heap limit still holds
        if kind != resource.RLIMIT_AS:
            raise
