"""A database's schema, read through the executor like every other query, as text for the prompt.

How the text looks and what goes when it is too long is rollout.sql.schema_text's business.
"""

from __future__ import annotations

from collections import defaultdict

from rollout.errors import InfrastructureError
from rollout.sql.descriptions import Description, read_descriptions
from rollout.sql.executor import Executor, Result
from rollout.sql.observation import Cell
from rollout.sql.schema_text import SQLITE, Column, Fits, ForeignKey, SchemaText, Style, Table

MAX_SCHEMA_CHARS = 24_000
SAMPLES = 3
SAMPLED_ROWS = 50
TABLES = """
SELECT name FROM sqlite_master
WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'
ORDER BY rowid"""
COLUMNS = 'SELECT name, type, "notnull", pk FROM pragma_table_xinfo({}) WHERE hidden <> 1 ORDER BY cid'
# The key that was declared last has id 0.
FOREIGN_KEYS = 'SELECT id, "table", "from", "to" FROM pragma_foreign_key_list({}) ORDER BY id DESC, seq'
GENERATED = " GENERATED ALWAYS"  # SQLite counts it among the type's words


def describe(executor: Executor, db_id: str, style: Style, max_chars: int = MAX_SCHEMA_CHARS) -> str:
    """The schema's text in at most `max_chars` characters. Raises as `open_schema`."""
    return open_schema(executor, db_id, style, lambda text: len(text) <= max_chars).text()


def open_schema(executor: Executor, db_id: str, style: Style, fits: Fits) -> SchemaText:
    """Reads a schema. Raises InfrastructureError if it can't be read or has no tables."""
    tables = read_tables(executor, db_id)
    if not tables:
        raise InfrastructureError(f"database {db_id}: has no tables that can be read")
    return SchemaText(tables, SQLITE, style, fits)


def read_tables(executor: Executor, db_id: str) -> list[Table]:
    """Tables and views in the order of their making, without those that can't be read."""
    names = [str(row[0]) for row in _ask(executor, db_id, [TABLES])[0].rows]
    rows = _sampled_rows(executor, db_id, names)
    names = [name for name in names if name in rows]
    columns = _ask(executor, db_id, [COLUMNS.format(_literal(name)) for name in names])
    keys = _ask(executor, db_id, [FOREIGN_KEYS.format(_literal(name)) for name in names])
    descriptions = read_descriptions(executor.locate(db_id))
    return [
        _table(name, rows[name], found.rows, links.rows, descriptions)
        for name, found, links in zip(names, columns, keys, strict=True)
    ]


def _ask(executor: Executor, db_id: str, queries: list[str]) -> list[Result]:
    results = executor.run_many([(db_id, sql) for sql in queries], whole=True)
    for result in results:
        if result.status != "ok":
            raise InfrastructureError(f"database {db_id}: its schema can't be read: {result.error}")
    return results


def _sampled_rows(executor: Executor, db_id: str, names: list[str]) -> dict[str, Result]:
    """The first rows of each table that can be read.

    A view that lost its tables can't be, nor a virtual table of an extension we don't load. One that is only too slow or
    too large to be looked at has no rows here.
    """

    def first(tables: list[str], limit: int) -> dict[str, Result]:
        queries = [(db_id, f"SELECT * FROM {SQLITE.name(table)} LIMIT {limit}") for table in tables]
        results = zip(tables, executor.run_many(queries, whole=True), strict=True)
        return {table: result for table, result in results if result.status == "ok"}

    found = first(names, SAMPLED_ROWS)
    return {**found, **first([name for name in names if name not in found], 0)}


def _table(
    name: str,
    sampled: Result,
    columns: list[tuple[Cell, ...]] | tuple[()],
    links: list[tuple[Cell, ...]] | tuple[()],
    descriptions: dict[tuple[str, str], Description],
) -> Table:
    samples = _samples(sampled, len(columns))
    found = []
    for (column, kind, not_null, _), values in zip(columns, samples, strict=True):
        said = descriptions.get((name.lower(), str(column).strip().lower()), Description("", ""))
        type_name = str(kind).removesuffix(GENERATED)
        found.append(Column(str(column), type_name, bool(not_null), said.column, said.values, values))
    key = sorted((int(str(row[3])), str(row[0])) for row in columns if row[3])
    return Table(name, tuple(found), tuple(column for _, column in key), _foreign_keys(links))


def _foreign_keys(rows: list[tuple[Cell, ...]] | tuple[()]) -> tuple[ForeignKey, ...]:
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


def _samples(sampled: Result, width: int) -> list[tuple[Cell, ...]]:
    """For each column the first distinct values that are not NULL nor bytes."""
    if len(sampled.columns) != width:
        return [()] * width
    columns = [dict.fromkeys(row[index] for row in sampled.rows) for index in range(width)]
    shown = [[value for value in values if value is not None and not isinstance(value, bytes)] for values in columns]
    return [tuple(values[:SAMPLES]) for values in shown]


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
