"""DuckDB in a worker process: one read-only database at a time, each query under rollout.sql.duckdb_guard.

Cells are numbers, text and bytes as SQLite's are, so that observations and grading need to know nothing of DuckDB: DECIMAL
is a number, and whatever else has no counterpart (dates, intervals, lists, structs, booleans …) is DuckDB's own text.

Left out: a look at what a query would cost before it runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from decimal import Decimal
from typing import NamedTuple

import duckdb

from rollout.sql import guard, observation
from rollout.sql.duckdb_guard import Deadline, Denied, Guard, connect, identifier, literal
from rollout.sql.engines import COUNTED_ROWS, MAX_RESULT_BYTES, MAX_RESULT_ROWS, SHOWN_BYTES, Engine, Reply
from rollout.sql.observation import Cell
from rollout.sql.sqlite_engine import BrokenDatabase, TooLarge

SUFFIX = ".duckdb"
OWN_NAMES = {"memory", "system", "temp"}  # of DuckDB's own databases
BATCH_ROWS = 256
CELL_BYTES = 16  # what the smallest cell counts for
CHECK_SECONDS = 60.0  # for opening a database, and for looking whether it is damaged
MAX_DIGITS = 300  # of an integer; longer ones, which no float can be compared with, stay text

_INTEGERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT"}
_INTEGERS |= {f"U{name}" for name in _INTEGERS}
_NATIVE = {*_INTEGERS, "VARCHAR", "BLOB", '"NULL"', "DOUBLE"}
Converter = Callable[[object], Cell]


class Shown(NamedTuple):
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]
    total: int
    exact: bool  # `total` is all; otherwise there are more
    shown: list[tuple[Cell, ...]]  # the first rows as the model reads them: decimals with all their places


class DuckDBEngine(Engine):
    """Runs one query at a time. `max_vm_steps` means nothing here."""

    def __init__(self, timeout: float, max_vm_steps: int, max_rows: int, max_chars: int, database_root: str) -> None:
        guard.limit_process()
        self._connection = connect(database_root)
        self._guard, self._deadline = Guard(self._connection), Deadline(self._connection, timeout)
        self._max_rows, self._max_chars = max_rows, max_chars
        self._attached: tuple[str, tuple[int, ...]] | None = None
        _warm_up(self._connection)

    def run(self, path: str, uri: str, sql: str, whole: bool) -> Reply:
        """Runs one query; never raises for what a query does."""
        guard.limit_cpu(CHECK_SECONDS)
        try:
            self._attach(path)
        except BrokenDatabase as error:
            return self._reply("broken", error=str(error))
        guard.limit_cpu(self._deadline.cpu_seconds)
        self._deadline.arm()
        try:
            fetched = self._fetch(sql, whole)
        except (Denied, duckdb.PermissionException) as error:
            return self._reply(
                "denied", error=f"not authorized: {_message(error)} (the database is read-only; write one SELECT)"
            )
        except TooLarge:
            rows, size = MAX_RESULT_ROWS, MAX_RESULT_BYTES // 1_000_000
            return self._reply("error", error=f"result too large (more than {rows} rows or {size} MB)")
        except (MemoryError, duckdb.OutOfMemoryException):
            return self._reply("error", error="out of memory: the query needs too much of it")
        except RecursionError:
            return self._reply("error", error="the statement is nested too deeply")
        except (duckdb.FatalException, duckdb.InternalException):
            os._exit(70)  # DuckDB is of no more use; the executor starts another worker and tries once more
        except (duckdb.Error, UnicodeError, OverflowError, ValueError, RuntimeError) as error:
            return self._failure(error, path)
        finally:
            self._deadline.disarm()
        return self._reply("timeout") if self._deadline.passed else self._reply("ok", fetched)

    def _attach(self, path: str) -> None:
        """Makes the database the one that queries see. One at a time, so that none of them can look into another."""
        try:
            stat = os.stat(path)
        except OSError as error:
            raise BrokenDatabase(f"database {path}: {error.strerror}") from None
        attached = (path, (stat.st_ino, stat.st_size, stat.st_mtime_ns))
        if self._attached == attached:
            return
        self._detach()
        if os.path.exists(path + ".wal"):
            raise BrokenDatabase(f"database {path} has unfinished changes in .wal; open and close it once with duckdb")
        name = os.path.basename(path).removesuffix(SUFFIX)
        name = "database" if name.lower() in OWN_NAMES else name
        try:
            self._connection.execute(f"ATTACH {literal(path)} AS {identifier(name)} (TYPE duckdb, READ_ONLY)")
            self._connection.execute(f"USE {identifier(name)}")
        except duckdb.Error as error:
            raise BrokenDatabase(f"database {path} can't be read: {_message(error)}") from None
        self._attached = attached

    def _detach(self) -> None:
        self._attached = None
        self._connection.execute("USE memory")
        names = self._connection.execute("SELECT database_name FROM duckdb_databases() WHERE NOT internal").fetchall()
        for (name,) in names:
            if name != "memory":
                self._connection.execute(f"DETACH {identifier(name)}")

    def _fetch(self, sql: str, whole: bool) -> Shown:
        """Runs the query; a part of the result that isn't fetched goes when the next query begins."""
        shows = self._guard.check(sql)
        sql = _without_semicolons(sql)
        if shows:  # can't be described; its cells are text and numbers
            self._connection.execute(sql)
            described = [(str(column[0]), str(column[1])) for column in self._connection.description or ()]
        else:
            described = [row[:2] for row in self._connection.execute(f"DESCRIBE {sql}").fetchall()]
            types = [kind for _, kind in described]
            self._connection.execute(sql if all(map(_is_native, types)) else self._with_plain_types(sql, types))
        return self._rows(tuple(name for name, _ in described), [_converter(kind) for _, kind in described], whole)

    def _with_plain_types(self, sql: str, types: list[str]) -> str:
        """The query with everything that is neither number, text nor bytes as text. The order of rows stays."""
        names = [f"c{number}" for number in range(len(types))]
        shown = [
            name if _is_native(kind) else f"CAST({name} AS VARCHAR)" for name, kind in zip(names, types, strict=True)
        ]
        return f"SELECT {', '.join(shown)} FROM ({sql}\n) AS query({', '.join(names)})"

    def _rows(self, columns: tuple[str, ...], converters: list[Converter], whole: bool) -> Shown:
        rows: list[tuple[Cell, ...]] = []
        shown: list[tuple[Cell, ...]] = []
        size = total = 0
        while batch := self._connection.fetchmany(BATCH_ROWS):
            for values in batch:
                row = tuple(convert(value) for convert, value in zip(converters, values, strict=True))
                total += 1
                size += _size(row)
                if whole and (size > MAX_RESULT_BYTES or total > MAX_RESULT_ROWS):
                    raise TooLarge
                if whole or (len(rows) < self._max_rows and (size <= SHOWN_BYTES or not rows)):
                    rows.append(row)
                    if len(shown) < self._max_rows:
                        shown.append(tuple(map(_shown, values, row)))
                elif size > MAX_RESULT_BYTES or total > COUNTED_ROWS:
                    return Shown(columns, rows, total - 1, False, shown)
            if self._deadline.passed:
                break
        return Shown(columns, rows, total, True, shown)

    def _failure(self, error: Exception, path: str) -> Reply:
        if self._deadline.passed:
            return self._reply("timeout")
        self._deadline.disarm()
        if isinstance(error, duckdb.IOException):
            guard.limit_cpu(CHECK_SECONDS)
            damage = self._damage(path)
            if damage:
                return self._reply("broken", error=f"database {path} can't be read: {damage}")
        message = _message(error)
        if "cannot encode str as UTF-8" in message:
            message = "the statement is not valid Unicode text"
        return self._reply("error", error=message.replace(path, "the database"))

    def _damage(self, path: str) -> str:
        """What is wrong with the database, attached afresh and read whole; empty when only the query was at fault."""
        try:
            self._detach()
            self._attach(path)
            tables = "SELECT schema_name, table_name FROM duckdb_tables() WHERE database_name = current_database()"
            for names in self._connection.execute(tables).fetchall():
                table = ".".join(map(identifier, names))
                self._connection.execute(f"SELECT count(COLUMNS(*)) FROM {table}").fetchall()
        except BrokenDatabase as error:
            return str(error)
        except duckdb.Error as error:
            return _message(error)
        return ""

    def _reply(self, status: str, fetched: Shown | None = None, error: str = "") -> Reply:
        seconds = self._deadline.seconds()
        if fetched is None:
            timeout = status == "timeout"
            text = observation.TIMEOUT if timeout else observation.render_error(error, self._max_chars)
            return (status, (), [], False, text, error or (text if timeout else ""), seconds)
        columns, rows, total, exact, shown = fetched
        text = observation.render(columns, shown, total, exact, self._max_chars)
        return (status, columns, rows, len(rows) < total or not exact, text, "", seconds)


def _without_semicolons(sql: str) -> str:
    """A single statement as it can stand inside of another."""
    text = bytearray(sql.encode())
    for place, kind in duckdb.tokenize(sql):  # places are those of bytes
        if kind == duckdb.token_type.operator and text[place] == ord(";"):
            text[place] = ord(" ")
    return text.decode()


def _is_native(kind: str) -> bool:
    return kind in _NATIVE or _is_decimal(kind)


def _is_decimal(kind: str) -> bool:
    return kind.startswith("DECIMAL(") and kind.endswith(")")  # and not a list of them


def _converter(kind: str) -> Converter:
    """From what DuckDB's client gives for a column of a type to a cell."""
    if kind == "DOUBLE":
        return _double
    if kind == "FLOAT":
        return _float
    if kind == "BIGNUM":
        return _bignum
    if _is_decimal(kind):
        return _decimal
    return _same


def _same(value: object) -> Cell:
    return value if value is None or isinstance(value, int | float | str | bytes) else str(value)


def _double(value: object) -> Cell:
    """NaN, which equals nothing, as text."""
    return "nan" if isinstance(value, float) and value != value else _same(value)


def _float(value: object) -> Cell:
    return None if value is None else _double(float(str(value)))


def _bignum(value: object) -> Cell:
    return int(value) if isinstance(value, str) and len(value) <= MAX_DIGITS else _same(value)


def _decimal(value: object) -> Cell:
    """An integer where it is one, so that it is exact at any size."""
    if not isinstance(value, Decimal):
        return _same(value)
    return int(value) if value == value.to_integral_value() else float(value)


def _shown(value: object, cell: Cell) -> Cell:
    return f"{value:f}" if isinstance(value, Decimal) else cell


def _size(row: tuple[Cell, ...]) -> int:
    return CELL_BYTES * len(row) + sum(len(cell) for cell in row if isinstance(cell, str | bytes))


def _message(error: Exception) -> str:
    """One line of DuckDB's message: what is wrong and what it proposes, without the drawing of the place."""
    text = str(error).partition("\n\nLINE ")[0]
    return " ".join(text.split())


def _warm_up(connection: duckdb.DuckDBPyConnection) -> None:
    """Has DuckDB's client import what it will need; nothing can be imported once the sandbox is closed."""
    connection.execute("SELECT 1.5::DECIMAL(9, 2), 'x', 'x'::BLOB, 1e0, true, 1::HUGEINT, json('[1]')").fetchall()
    connection.execute("SELECT strftime(TIMESTAMPTZ '2025-01-01', '%x')").fetchall()
