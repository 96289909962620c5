"""A database's schema as text for the prompt, read through the executor like every other query.

Two styles: `full` writes CREATE TABLE statements with keys and a few sample values, `short` one line a table. A schema too
long for a prompt loses its samples first, then its types and keys, then tables from the end.
"""

from __future__ import annotations

import re
from typing import Literal

from rollout.errors import InfrastructureError
from rollout.sql.executor import Executor, Result
from rollout.sql.observation import Cell, escape

Style = Literal["full", "short"]

MAX_SCHEMA_CHARS = 24_000  # about 6000 tokens
SAMPLES = 3
SAMPLE_CHARS = 40
TABLES = """
SELECT name FROM sqlite_master
WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'
ORDER BY rowid"""
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Words that SQLite does not take as a name without quotes.
_RESERVED_TEXT = """
add all alter and as autoincrement between by case check collate commit constraint create default deferrable delete
distinct drop else escape except exists foreign from group having in index insert intersect into is isnull join limit not
notnull null on or order primary references returning select set table then to transaction union unique update using
values when where
"""
_RESERVED = frozenset(_RESERVED_TEXT.split())


def describe(executor: Executor, db_id: str, style: Style, max_chars: int = MAX_SCHEMA_CHARS) -> str:
    """The schema of a database. Raises InfrastructureError if it can't be read or has no tables."""
    names = [str(row[0]) for row in _ask(executor, db_id, TABLES).rows]
    tables = [name for name in names if _works(executor, db_id, name)]
    if not tables:
        raise InfrastructureError(f"database {db_id}: has no tables that can be read")
    if style == "full":
        for samples in (True, False):
            text = "\n\n".join(_create_table(executor, db_id, table, samples) for table in tables)
            if len(text) <= max_chars:
                return text
    lines = [_line(executor, db_id, table) for table in tables]
    kept: list[str] = []
    size = 0
    for line in lines:
        size += len(line) + 1
        if size > max_chars and kept:
            return "\n".join([*kept, f"-- and {len(lines) - len(kept)} more tables"])
        kept.append(line[:max_chars])
    return "\n".join(kept)


def quote_name(name: str) -> str:
    """A table's or column's name as it has to be written in SQL."""
    return name if _PLAIN.fullmatch(name) and name.lower() not in _RESERVED else '"' + name.replace('"', '""') + '"'


def _ask(executor: Executor, db_id: str, sql: str) -> Result:
    result = executor.run(db_id, sql, whole=True)
    if result.status != "ok":
        raise InfrastructureError(f"database {db_id}: its schema can't be read: {result.error}")
    return result


def _works(executor: Executor, db_id: str, table: str) -> bool:
    """Whether it can be read. A view that lost its tables can't, nor a virtual table of an extension we don't load."""
    return executor.run(db_id, f"SELECT * FROM {quote_name(table)} LIMIT 0").status == "ok"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _columns(executor: Executor, db_id: str, table: str) -> list[tuple[Cell, ...]]:
    """(name, type, NOT NULL, position in the primary key or 0) of each visible column."""
    sql = f'SELECT name, type, "notnull", pk FROM pragma_table_xinfo({_literal(table)}) WHERE hidden <> 1 ORDER BY cid'
    return list(_ask(executor, db_id, sql).rows)


def _line(executor: Executor, db_id: str, table: str) -> str:
    names = ", ".join(quote_name(str(row[0])) for row in _columns(executor, db_id, table))
    return escape(f"{quote_name(table)}({names})")


def _create_table(executor: Executor, db_id: str, table: str, samples: bool) -> str:
    columns = _columns(executor, db_id, table)
    examples = _samples(executor, db_id, table, len(columns)) if samples else [""] * len(columns)
    key = [name for _, name in sorted((int(str(row[3])), str(row[0])) for row in columns if row[3])]
    definitions: list[tuple[str, str]] = []
    for (name, kind, not_null, _), example in zip(columns, examples, strict=True):
        words = [
            quote_name(str(name)),
            str(kind),
            "NOT NULL" if not_null else "",
            "PRIMARY KEY" if key == [name] else "",
        ]
        definitions.append((" ".join(word for word in words if word), example))
    if len(key) > 1:
        definitions.append((f"PRIMARY KEY ({', '.join(map(quote_name, key))})", ""))
    definitions += [(text, "") for text in _foreign_keys(executor, db_id, table)]
    lines = []
    for number, (definition, example) in enumerate(definitions, 1):
        comma = "," if number < len(definitions) else ""
        lines.append("  " + escape(definition) + comma + (f" -- e.g. {example}" if example else ""))
    return f"CREATE TABLE {escape(quote_name(table))} (\n" + "\n".join(lines) + "\n);"


def _foreign_keys(executor: Executor, db_id: str, table: str) -> list[str]:
    sql = f'SELECT id, "table", "from", "to" FROM pragma_foreign_key_list({_literal(table)}) ORDER BY id, seq'
    keys: dict[Cell, tuple[str, list[str], list[str]]] = {}
    for number, parent, child_column, parent_column in _ask(executor, db_id, sql).rows:
        _, own, theirs = keys.setdefault(number, (str(parent), [], []))
        own.append(quote_name(str(child_column)))
        if parent_column is not None:  # left out in the DDL: the parent's primary key is meant
            theirs.append(quote_name(str(parent_column)))
    return [
        f"FOREIGN KEY ({', '.join(own)}) REFERENCES {quote_name(parent)}" + (f"({', '.join(theirs)})" if theirs else "")
        for parent, own, theirs in keys.values()
    ]


def _samples(executor: Executor, db_id: str, table: str, width: int) -> list[str]:
    """For each column the first distinct values of the first rows, as SQL literals. A view that fails has none."""
    result = executor.run(db_id, f"SELECT * FROM {quote_name(table)} LIMIT 20")
    if result.status != "ok" or len(result.columns) != width:
        return [""] * width
    texts = []
    for column in range(width):
        values = dict.fromkeys(row[column] for row in result.rows if row[column] is not None)
        shown = [_sample(value) for value in values if not isinstance(value, bytes)]
        texts.append(", ".join(shown[:SAMPLES]))
    return texts


def _sample(value: Cell) -> str:
    if not isinstance(value, str):
        return str(value)
    return escape(_literal(value if len(value) <= SAMPLE_CHARS else value[:SAMPLE_CHARS] + "…"))
