"""Where each kind of database keeps what it knows of its tables: the queries, and tables out of their answers.

Left out: indexes, checks and defaults, which a query hardly ever depends on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from rollout.sql.observation import Cell
from rollout.sql.schema_text import DUCKDB, SQLITE, Column, Dialect, ForeignKey, Table

Rows = Sequence[tuple[Cell, ...]]
Ask = Callable[[list[str]], list[Rows]]  # runs queries, all of which must succeed
Name = tuple[str, str]  # schema (empty for the usual one), table

_TABLES = """
SELECT name FROM sqlite_master
WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'
ORDER BY rowid"""
_COLUMNS = 'SELECT name, type, "notnull", pk FROM pragma_table_xinfo({}) WHERE hidden <> 1 ORDER BY cid'
# The key that was declared last has id 0.
_FOREIGN_KEYS = 'SELECT id, "table", "from", "to" FROM pragma_foreign_key_list({}) ORDER BY id DESC, seq'
_GENERATED = " GENERATED ALWAYS"  # SQLite counts it among the type's words

_HERE = "database_name = current_database() AND NOT internal"
_DUCKDB_TABLES = f"""
SELECT schema_name, table_name, table_oid FROM duckdb_tables() WHERE {_HERE}
UNION ALL SELECT schema_name, view_name, view_oid FROM duckdb_views() WHERE {_HERE} ORDER BY 3"""
_DUCKDB_COLUMNS = f"""
SELECT schema_name, table_name, column_name, data_type, CAST(NOT is_nullable AS INTEGER), comment
FROM duckdb_columns() WHERE {_HERE} ORDER BY table_oid, column_index"""
_DUCKDB_KEYS = """
SELECT schema_name, table_name, unnest(constraint_column_names)
FROM duckdb_constraints() WHERE database_name = current_database() AND constraint_type = 'PRIMARY KEY'"""
_DUCKDB_FOREIGN_KEYS = """
SELECT schema_name, table_name, constraint_index, referenced_table,
       unnest(constraint_column_names), unnest(referenced_column_names)
FROM duckdb_constraints() WHERE database_name = current_database() AND constraint_type = 'FOREIGN KEY' ORDER BY 1, 2, 3"""


class Catalog(NamedTuple):
    """`names` in the order of their making; `tables` describes those that it is given, in this order."""

    dialect: Dialect
    names: Callable[[Ask], list[Name]]
    tables: Callable[[Ask, list[Name]], list[Table]]


def _sqlite_names(ask: Ask) -> list[Name]:
    return [("", str(row[0])) for row in ask([_TABLES])[0]]


def _sqlite_tables(ask: Ask, names: list[Name]) -> list[Table]:
    columns = ask([_COLUMNS.format(_literal(name)) for _, name in names])
    links = ask([_FOREIGN_KEYS.format(_literal(name)) for _, name in names])
    return [
        Table(
            name,
            tuple(Column(str(row[0]), str(row[1]).removesuffix(_GENERATED), bool(row[2])) for row in found),
            tuple(column for _, column in sorted((int(str(row[3])), str(row[0])) for row in found if row[3])),
            _foreign_keys(keys),
        )
        for (_, name), found, keys in zip(names, columns, links, strict=True)
    ]


def _duckdb_names(ask: Ask) -> list[Name]:
    return [(str(row[0]), str(row[1])) for row in ask([_DUCKDB_TABLES])[0]]


def _duckdb_tables(ask: Ask, names: list[Name]) -> list[Table]:
    columns, keys, links = map(_by_table, ask([_DUCKDB_COLUMNS, _DUCKDB_KEYS, _DUCKDB_FOREIGN_KEYS]))
    return [
        Table(
            name[1],
            tuple(
                Column(str(c), str(kind), bool(not_null), str(said or "")) for c, kind, not_null, said in columns[name]
            ),
            tuple(str(row[0]) for row in keys[name]),
            _foreign_keys(links[name]),
            schema="" if name[0] == "main" else name[0],
        )
        for name in names
    ]


def _by_table(rows: Rows) -> dict[Name, list[tuple[Cell, ...]]]:
    found: dict[Name, list[tuple[Cell, ...]]] = defaultdict(list)
    for schema, table, *rest in rows:
        found[str(schema), str(table)].append(tuple(rest))
    return found


def _foreign_keys(rows: Iterable[tuple[Cell, ...]]) -> tuple[ForeignKey, ...]:
    """From (number of the key, parent, own column, parent's column or NULL where the primary key is meant)."""
    keys: dict[Cell, list[tuple[Cell, ...]]] = defaultdict(list)
    for row in rows:
        keys[row[0]].append(row)
    return tuple(
        ForeignKey(
            columns=tuple(str(row[2]) for row in group),
            parent=str(group[0][1]),
            parent_columns=tuple(str(row[3]) for row in group if row[3] is not None),
        )
        for group in keys.values()
    )


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


# By the engine's name.
CATALOGS = {
    "sqlite": Catalog(SQLITE, _sqlite_names, _sqlite_tables),
    "duckdb": Catalog(DUCKDB, _duckdb_names, _duckdb_tables),
}
