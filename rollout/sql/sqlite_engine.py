"""SQLite in a worker process: read-only connections that are kept open, each query under rollout.sql.guard.

Left out: a cache of prepared statements. It would keep the gold query where `sqlite_stmt` could show it.
"""

from __future__ import annotations

import marshal
import os
import sqlite3
from collections import OrderedDict
from collections.abc import Iterator
from stat import S_ISREG
from typing import NamedTuple

from rollout.sql import guard, observation
from rollout.sql.engines import COUNTED_ROWS, MAX_RESULT_BYTES, MAX_RESULT_ROWS, SHOWN_BYTES, Engine, Reply

OPEN_DATABASES = 32
FIRST_ROWS, NEXT_ROWS = 8, 32  # fetched at a time; a large row could be anywhere
SMALL_BYTES = 100_000  # after more than that, rows are fetched one by one
CELL_BYTES = 16  # what the smallest cell counts for
CHECK_SECONDS = 60.0  # for looking whether a database file is damaged
FILE_ERRORS = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN}


Row = tuple[observation.Cell, ...]


class BrokenDatabase(Exception):
    """The database can't be read. The message names its file."""


class Fetched(NamedTuple):
    columns: tuple[str, ...]
    rows: list[Row]
    total: int
    exact: bool  # `total` is all; otherwise there are more


class TooLarge(Exception):
    """The whole result was wanted and is past the bound."""


class SQLiteEngine(Engine):
    def __init__(self, timeout: float, max_vm_steps: int, max_rows: int, max_chars: int, database_root: str) -> None:
        """A connection reaches its own file only, so the root means nothing here."""
        guard.limit_process()
        self._guard = guard.Guard(max_vm_steps, timeout)
        self._max_rows, self._max_chars = max_rows, max_chars
        self._open: OrderedDict[str, tuple[sqlite3.Connection, tuple[int, ...]]] = OrderedDict()
        self._checked: dict[str, sqlite3.Connection] = {}  # whose file was looked at in this batch
        self._sound: dict[str, tuple[int, ...]] = {}

    def begin(self) -> None:
        self._checked.clear()

    def run(self, path: str, uri: str, sql: str, whole: bool) -> Reply:
        """Runs one query; never raises for what a query does."""
        try:
            fetched = self._query_with_room(path, uri, sql, whole)
        except BrokenDatabase as error:
            return self._reply("broken", error=str(error))
        except TooLarge:
            rows, size = MAX_RESULT_ROWS, MAX_RESULT_BYTES // 1_000_000
            return self._reply("error", error=f"result too large (more than {rows} rows or {size} MB)")
        except MemoryError:
            self._forget(path)
            return self._reply("error", error="out of memory: the query needs too much of it")
        except (sqlite3.Error, sqlite3.Warning, UnicodeError, OverflowError, ValueError) as error:
            return self._failure(error, path, uri, sql)
        return self._timed(fetched, whole)

    def _query_with_room(self, path: str, uri: str, sql: str, whole: bool) -> Fetched:
        try:
            return self._query(path, uri, sql, whole)
        except MemoryError:
            failed = list(self._open)
        for other in failed:  # all share the memory, and the verdict must not depend on which are open
            self._forget(other)
        return self._query(path, uri, sql, whole)

    def _query(self, path: str, uri: str, sql: str, whole: bool) -> Fetched:
        connection = self._connection(path, uri)
        self._guard.arm()
        try:
            return self._fetch(connection, sql, whole)
        except sqlite3.OperationalError as error:
            if not str(error).startswith("Could not decode to UTF-8"):
                raise
        connection.text_factory = _decode  # slower, hence only for databases that need it
        self._guard.arm()
        return self._fetch(connection, sql, whole)

    def _connection(self, path: str, uri: str) -> sqlite3.Connection:
        checked = self._checked.get(path)
        if checked is not None:
            return checked
        try:
            stat = os.stat(path)
        except OSError as error:
            self._forget(path)
            raise BrokenDatabase(f"database {path}: {error.strerror}") from None
        if not S_ISREG(stat.st_mode):
            raise BrokenDatabase(f"database {path} is not a plain file")  # opening a named pipe would never end
        stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        known = self._open.get(path)
        if known is not None and known[1] == stamp:
            self._open.move_to_end(path)
            self._checked[path] = known[0]
            return known[0]
        self._forget(path)
        while len(self._open) >= OPEN_DATABASES:
            self._forget(next(iter(self._open)))
        self._guard.arm()  # opening is work as well, and must not be charged to the query before
        connection = _connect(path, uri)
        self._guard.protect(connection)
        self._open[path] = (connection, stamp)
        return connection

    def _forget(self, path: str) -> None:
        self._checked.pop(path, None)
        known = self._open.pop(path, None)
        if known is not None:
            known[0].close()

    def _fetch(self, connection: sqlite3.Connection, sql: str, whole: bool) -> Fetched:
        cursor = connection.execute(sql)
        try:
            description = cursor.description
            if description is None:
                raise ValueError("the statement returns no columns; write one SELECT")
            columns = tuple([column[0] for column in description])
            self._guard.check_columns(columns)
            return self._fetch_whole(cursor, columns) if whole else self._fetch_shown(cursor, columns)
        finally:
            cursor.close()

    def _fetch_whole(self, cursor: sqlite3.Cursor, columns: tuple[str, ...]) -> Fetched:
        rows: list[Row] = []
        size = 0
        for some, length in _pieces(cursor):
            rows += some
            size += length
            if size > MAX_RESULT_BYTES or len(rows) > MAX_RESULT_ROWS:
                raise TooLarge
        return Fetched(columns, rows, len(rows), True)

    def _fetch_shown(self, cursor: sqlite3.Cursor, columns: tuple[str, ...]) -> Fetched:
        rows: list[Row] = []
        size = total = 0
        for some, length in _pieces(cursor):
            if size + length <= SHOWN_BYTES:
                rows += some[: self._max_rows - len(rows)]
            elif size <= SHOWN_BYTES:
                rows += _fitting(some[: self._max_rows - len(rows)], SHOWN_BYTES - size, not rows)
            size += length
            total += len(some)
            if total > COUNTED_ROWS:
                return Fetched(columns, rows, COUNTED_ROWS, False)
            if size > MAX_RESULT_BYTES:
                return Fetched(columns, rows, total - 1, False)
        return Fetched(columns, rows, total, True)

    def _failure(self, error: Exception, path: str, uri: str, sql: str) -> Reply:
        if self._guard.exhausted:
            return self._reply("timeout")
        if self._guard.denied or "pragma_" in sql.lower():
            self._forget(path)  # SQLite has registered the module of a pragma's table, and later queries could tell
        if self._guard.denied:
            return self._reply("denied", error=f"not authorized: {self._guard.denied} (the database is read-only)")
        message = str(error)
        code = getattr(error, "sqlite_errorcode", None)
        if code is not None and code & 0xFF in FILE_ERRORS:
            damage = self._damage(path, uri)
            if damage:
                return self._reply("broken", error=f"database {path} can't be read: {damage}")
        if isinstance(error, UnicodeEncodeError):
            message = "the statement is not valid Unicode text"
        elif isinstance(error, UnicodeDecodeError):
            message = "a name in the database is not valid Unicode text"
        return self._reply("error", error=message.replace(path, "the database"))

    def _damage(self, path: str, uri: str) -> str:
        """What is wrong with a database; empty when only the query was at fault. Looks once at every content."""
        stamp = self._open[path][1] if path in self._open else None
        self._forget(path)
        if stamp is not None and self._sound.get(path) == stamp:
            return ""
        self._guard.allow(CHECK_SECONDS)
        damage = _damage(uri)
        if stamp is not None and not damage:
            self._sound[path] = stamp
        return damage

    def _timed(self, fetched: Fetched, whole: bool) -> Reply:
        """The reply to a query that gave rows, if it gave them in time."""
        if self._guard.spend():
            return self._reply("timeout")
        columns, rows, total, exact = fetched
        text = None if whole else observation.render(columns, rows, total, exact, self._max_chars)
        return ("ok", columns, rows, len(rows) < total or not exact, text, "", self._guard.spent)

    def _reply(self, status: str, error: str = "") -> Reply:
        timeout = status == "timeout"
        text = observation.TIMEOUT if timeout else observation.render_error(error, self._max_chars)
        return (status, (), [], False, text, error or (text if timeout else ""), self._guard.seconds())


def _pieces(cursor: sqlite3.Cursor) -> Iterator[tuple[list[Row], int]]:
    """Rows some at a time, as many as can do no harm, and their size in bytes, about.

    To encode rows is the fastest way to measure them.
    """
    wanted = FIRST_ROWS
    while True:
        rows = cursor.fetchmany(wanted)
        size = len(marshal.dumps(rows, 2))
        yield rows, size + CELL_BYTES * len(rows) * len(rows[0]) if rows else 0
        if len(rows) < wanted:
            return
        wanted = NEXT_ROWS if size < SMALL_BYTES else 1


def _fitting(rows: list[Row], room: int, at_least_one: bool) -> list[Row]:
    """The first rows that have room, or one that is below the bound of a whole result."""
    for index, row in enumerate(rows):
        room -= len(marshal.dumps(row, 2))
        if room < 0:
            if index == 0 and at_least_one and SHOWN_BYTES - room > MAX_RESULT_BYTES:
                raise TooLarge
            return rows[: max(index, at_least_one)]
    return rows


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "replace")


def _connect(path: str, uri: str) -> sqlite3.Connection:
    for suffix in ("-wal", "-journal"):
        try:
            pending = os.stat(path + suffix).st_size
        except OSError:
            continue
        if pending:
            raise BrokenDatabase(
                f"database {path} has unfinished changes in {suffix}; open and close it once with sqlite3"
            )
    try:
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, cached_statements=0)
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        raise BrokenDatabase(f"database {path} can't be read: {error}") from None
    return connection


def _damage(uri: str) -> str:
    """What is wrong with a database, seen from a fresh connection; empty when only the query was at fault."""
    try:
        connection = sqlite3.connect(uri, uri=True)
    except sqlite3.Error as error:
        return str(error)
    try:
        verdict = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
        return "" if verdict == "ok" else verdict
    except sqlite3.Error as error:
        return str(error)
    finally:
        connection.close()
