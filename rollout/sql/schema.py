"""A database's schema, read through the executor like every other query, as text for the prompt.

How the text looks and what goes when it is too long is rollout.sql.schema_text's business.
"""

from __future__ import annotations

from dataclasses import replace

from rollout.errors import InfrastructureError
from rollout.sql.descriptions import Description, read_descriptions
from rollout.sql.executor import Executor, Result
from rollout.sql.observation import Cell
from rollout.sql.schema_catalogs import CATALOGS, Name, Rows
from rollout.sql.schema_text import Dialect, Fits, SchemaText, Style, Table

SAMPLES = 3
SAMPLED_ROWS = 50


def open_schema(executor: Executor, db_id: str, style: Style, fits: Fits = lambda text: True) -> SchemaText:
    """Reads a schema, to be told in what `fits`. Raises InfrastructureError if it can't be read or has no tables."""
    file = executor.locate(db_id)
    catalog = CATALOGS[executor.engine]

    def ask(queries: list[str]) -> list[Rows]:
        results = executor.run_many([(db_id, sql) for sql in queries], whole=True)
        for result in results:
            if result.status != "ok":
                raise InfrastructureError(f"database {db_id}: its schema can't be read: {result.error}")
        return [result.rows for result in results]

    names = catalog.names(ask)
    sampled = _sampled_rows(executor, db_id, names, catalog.dialect)
    names = [name for name in names if name in sampled]
    if not names:
        raise InfrastructureError(f"database {db_id}: has no tables that can be read")
    said = read_descriptions(file)
    tables = [
        _with_examples(table, sampled[name], said)
        for name, table in zip(names, catalog.tables(ask, names), strict=True)
    ]
    return SchemaText(tables, catalog.dialect, style, fits)


def _sampled_rows(executor: Executor, db_id: str, names: list[Name], dialect: Dialect) -> dict[Name, Result]:
    """The first rows of each table that can be read.

    A view that lost its tables can't be, nor a virtual table of an extension we don't load. One that is only too slow or
    too large to be looked at has no rows here.
    """

    def first(tables: list[Name], limit: int) -> dict[Name, Result]:
        queries = [(db_id, f"SELECT * FROM {dialect.table(*name)} LIMIT {limit}") for name in tables]
        results = zip(tables, executor.run_many(queries, whole=True), strict=True)
        return {table: result for table, result in results if result.status == "ok"}

    found = first(names, SAMPLED_ROWS)
    return {**found, **first([name for name in names if name not in found], 0)}


def _with_examples(table: Table, sampled: Result, said: dict[tuple[str, str], Description]) -> Table:
    """The table with sample values and with what its owner says about its columns."""
    columns = []
    for column, samples in zip(table.columns, _samples(sampled, len(table.columns)), strict=True):
        known = said.get((table.name.lower(), column.name.strip().lower()), Description(column.description, ""))
        columns.append(replace(column, description=known.column, values=known.values, samples=samples))
    return replace(table, columns=tuple(columns))


def _samples(sampled: Result, width: int) -> list[tuple[Cell, ...]]:
    """For each column the first distinct values that are not NULL nor bytes."""
    if len(sampled.columns) != width:
        return [()] * width
    columns = [dict.fromkeys(row[index] for row in sampled.rows) for index in range(width)]
    shown = [[value for value in values if value is not None and not isinstance(value, bytes)] for values in columns]
    return [tuple(values[:SAMPLES]) for values in shown]
