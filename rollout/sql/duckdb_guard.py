"""What a query may do inside a DuckDB worker: one SELECT over the opened database, with a fixed clock and no dice.

Walls, from the inside out. The statement is parsed by DuckDB itself, and what the parse tree holds is judged before
anything runs: kinds of statements, system tables and table functions by allow-lists, all other functions by what DuckDB
says of them (what is not the same for the same arguments, now and later, is fixed or refused). The database is attached
read-only to an empty one in memory, alone, without extensions, network, temporary directory and any file outside of the
database root, with a locked configuration and bounded memory. Behind that stands the process: rollout.sql.guard's limits
and rollout.sql.sandbox.

DuckDB has no count of steps as SQLite's virtual machine has. The budget is CPU time of the worker, in one thread: at its
end the query is interrupted, and one that can't be is killed by the kernel a second later. So the verdict on a query near
the limit may differ from one machine to another; not between a busy and an idle one.

Left out: functions inside of views and macros that the database itself holds. Its owner may use what the model may not.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import duckdb

from rollout.sql.clock import NOW

MEMORY = "256MB"
SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    "threads": 1,
    "memory_limit": MEMORY,
    "temp_directory": "",
    "max_temp_directory_size": "0KB",
    "autoload_known_extensions": False,
    "autoinstall_known_extensions": False,
    "allow_community_extensions": False,
    "allow_unsigned_extensions": False,
    "allow_persistent_secrets": False,
    "python_enable_replacements": False,  # or FROM reads this program's own variables
    "python_scan_all_frames": False,
}

FIXED = {
    "now()": f"TIMESTAMPTZ '{NOW}+00'",
    "get_current_timestamp()": f"TIMESTAMPTZ '{NOW}+00'",
    "transaction_timestamp()": f"TIMESTAMPTZ '{NOW}+00'",
    "current_localtimestamp()": f"TIMESTAMP '{NOW}'",
    "current_date()": f"DATE '{NOW[:10]}'",
    "today()": f"DATE '{NOW[:10]}'",
    "get_current_time()": f"TIMETZ '{NOW[11:]}+00'",
    "current_localtime()": f"TIME '{NOW[11:]}'",
    "age(x)": f"system.main.age(TIMESTAMP '{NOW}', x), (x, y) AS system.main.age(x, y)",
}
_FIXED_NAMES = {call.partition("(")[0] for call in FIXED}
# The rest of what isn't the same for the same arguments is refused, and these.
_CONSTANT_HERE = {"current_database", "current_schema", "current_schemas", "in_search_path", "error", "vector_type"}
_ALSO_DENIED = {
    "reservoir_quantile",
    "json_serialize_plan",
    "json_execute_serialized_sql",
    "pg_sleep",
    "get_block_size",
}
_ALSO_DENIED |= {"parse_duckdb_log_message", "version"}

TABLE_FUNCTIONS = {"range", "generate_series", "unnest", "repeat", "repeat_row", "json_each", "json_tree"}
TABLE_FUNCTIONS |= {"pragma_table_info", "pragma_show", "duckdb_tables", "duckdb_columns", "duckdb_views"}
TABLE_FUNCTIONS |= {"duckdb_constraints", "duckdb_indexes", "duckdb_types", "duckdb_schemas", "duckdb_keywords"}
SYSTEM_VIEWS = {"sqlite_master", "sqlite_schema", "duckdb_columns", "duckdb_constraints", "duckdb_indexes"}
SYSTEM_VIEWS |= {"duckdb_schemas", "duckdb_tables", "duckdb_types", "duckdb_views"}
SYSTEM_VIEWS |= {"pg_tables", "pg_views", "pg_class", "pg_attribute", "pg_namespace", "pg_type", "pg_constraint"}
SYSTEM_VIEWS |= {"pg_index", "pg_indexes", "pg_description", "pg_enum"}
SHOWN = {"tables", "__show_tables_expanded"}
QUERY_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}


class Denied(Exception):
    """The query asks for what it may not have; the message names that."""


def connect(database_root: str) -> duckdb.DuckDBPyConnection:
    """An empty database in memory, to which nothing but files below the root can be attached, with every rule for good."""
    connection = duckdb.connect(":memory:", config=SETTINGS)
    for call, value in FIXED.items():
        connection.execute(f"CREATE TEMP MACRO {call} AS {value}")
    connection.execute("SET enable_progress_bar = false")
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute(f"SET allowed_directories = [{literal(database_root)}]")
    connection.execute("SET enable_external_access = false")  # beside SETTINGS it would forbid some of them
    connection.execute("SET lock_configuration = true")
    return connection


def literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


class Guard:
    """Judges statements, with an inventory of DuckDB's own functions and views."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection
        functions = connection.execute(
            "SELECT function_name, function_type, stability FROM duckdb_functions() WHERE internal"
        ).fetchall()
        views = connection.execute("SELECT schema_name, view_name FROM duckdb_views() WHERE internal").fetchall()
        tables = {name for name, kind, _ in functions if kind in ("table", "table_macro", "pragma")}
        unstable = {name for name, kind, stability in functions if kind == "scalar" and stability != "CONSISTENT"}
        self._denied_tables = tables - TABLE_FUNCTIONS
        self._denied_functions = (unstable | _ALSO_DENIED) - _CONSTANT_HERE - _FIXED_NAMES
        self._denied_views = {name for schema, name in views if schema != "information_schema"} - SYSTEM_VIEWS

    def check(self, sql: str) -> bool:
        """Whether the one statement is a SHOW, DESCRIBE or SUMMARIZE instead of a query.

        Raises Denied, a DuckDB error for what isn't SQL, ValueError for none or several statements.
        """
        serialize = "SELECT json_serialize_sql(?, skip_null := true, skip_empty := true)"
        ((text,),) = self._connection.execute(serialize, [sql]).fetchall()
        tree = json.loads(text)
        if tree["error"]:
            statements = self._connection.extract_statements(sql)  # raises the parser's own error, if it is one
            raise Denied(
                " and ".join(dict.fromkeys(statement.type.name for statement in statements)) or "the statement"
            )
        if len(tree["statements"]) != 1:
            found = len(tree["statements"])
            raise ValueError(f"expected one statement, found {found}" if found else "there is no statement")
        for node in _nodes(tree):
            refused = self._refusal(node)
            if refused:
                raise Denied(refused)
        return tree["statements"][0]["node"].get("from_table", {}).get("type") == "SHOW_REF"

    def _refusal(self, node: dict[str, Any]) -> str:
        """What of a node of the parse tree is refused; empty when it is allowed."""
        kind = str(node.get("type"))
        if kind.endswith("_NODE") and kind not in QUERY_NODES:
            return kind.removesuffix("_NODE").removesuffix("_QUERY").replace("_", " ")
        path = [str(part) for part in (node.get("qualified_name") or {}).get("path", [])]
        if kind == "TABLE_FUNCTION":
            name = str(node["function"]["function_name"]).lower()
            return f"table function {name}" if name in self._denied_tables else ""
        if "function_name" in node:
            name = str(node["function_name"]).lower()
            hidden = name in _FIXED_NAMES and len(path) > 1  # the original behind the fixed one
            return f"function {name}" if hidden or name in self._denied_functions else ""
        if kind == "BASE_TABLE":
            name = str(node.get("table_name", "")).lower()
            file = any("/" in part or "\\" in part for part in path)  # DuckDB takes an unknown table for a file
            return f"table {name}" if file or name in self._denied_views else ""
        if kind == "SHOW_REF":
            special = (
                str(node.get("show_type")) == "SHOW_SPECIAL" and str(node.get("table_name")).strip('"') not in SHOWN
            )
            return f"SHOW {node.get('table_name')}" if special else ""
        if "sample_size" in node:
            return "" if node.get("repeatable") and node.get("seed", -1) >= 0 else "a sample without REPEATABLE (seed)"
        return ""


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object of the parse tree."""
    open_ends = [tree]
    while open_ends:
        value = open_ends.pop()
        if isinstance(value, dict):
            yield value
            open_ends.extend(value.values())
        elif isinstance(value, list):
            open_ends.extend(value)


class Deadline:
    """Interrupts a query whose process has used up its CPU time, from a thread of its own.

    The thread sleeps for as long as it takes at the least to use so much, and then looks again; nobody has to wake it.
    """

    AGAIN = 0.05  # seconds between interrupts: one that comes between two statements is forgotten

    def __init__(self, connection: duckdb.DuckDBPyConnection, cpu_seconds: float) -> None:
        self._connection, self.cpu_seconds = connection, cpu_seconds
        self.passed = self._armed = False
        self._start = time.process_time()
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, name="deadline", daemon=True).start()

    def arm(self) -> None:
        with self._lock:
            self._armed, self.passed = True, False
            self._start = time.process_time()

    def disarm(self) -> None:
        with self._lock:
            self._armed = False

    def seconds(self) -> float:
        """CPU seconds since `arm`."""
        return time.process_time() - self._start

    def _watch(self) -> None:
        while True:
            with self._lock:
                left = self.cpu_seconds - self.seconds() if self._armed else self.cpu_seconds
                if left <= 0:
                    self.passed = True
                    self._connection.interrupt()
            time.sleep(left if left > 0 else self.AGAIN)
