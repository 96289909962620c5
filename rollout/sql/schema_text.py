"""A schema as text for the prompt, in two styles, made to fit a bound. Pure functions; nothing is read here.

`full` writes CREATE TABLE statements with keys, and behind each column a comment: what the column means, as far as the
database's owner says so, and a few of its values. `short` writes one line a table.

A text that is too long loses, in this order and only as far as needed: all sample values but one, the last sample value,
what values mean, what columns mean, types and keys (then it is one line a table, and the foreign keys as comments), the
foreign keys, and last whole tables and columns, the least likely needed first: those whose names share the fewest words
with the question. What is gone is counted in a comment. The bound may be anything that can be asked of a text (tokens,
characters); it is asked a few times, by bisection, not once a line.

Left out: values of the database that the question mentions. Finding them takes an index over every text column, and the
model can look for them itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rollout.sql.observation import Cell, clip, escape

Style = Literal["full", "short"]
Fits = Callable[[str], bool]

SAMPLE_CHARS = 40
DESCRIPTION_CHARS = 200
VALUES_CHARS = 300
_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN_TYPE = re.compile(r"[A-Za-z_][A-Za-z0-9_ ]*(\( ?\d+ ?(, ?\d+ ?)?\))?")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_A-Za-z]+")


@dataclass(frozen=True, slots=True)
class Column:
    """`description` says what the column means, `values` what its values mean; `samples` are some of them."""

    name: str
    type: str = ""
    not_null: bool = False
    description: str = ""
    values: str = ""
    samples: tuple[Cell, ...] = ()


@dataclass(frozen=True, slots=True)
class ForeignKey:
    """`parent_columns` may be empty: then the parent's primary key is meant."""

    columns: tuple[str, ...]
    parent: str
    parent_columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    name: str
    columns: tuple[Column, ...]
    key: tuple[str, ...] = ()
    foreign_keys: tuple[ForeignKey, ...] = ()
    schema: str = ""  # empty for the one that needs not be named


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a database writes names and types."""

    reserved: frozenset[str]
    literal_types: bool = False  # types are taken as the database shows them, however they look

    def name(self, name: str) -> str:
        """A table's or column's name as it has to be written in SQL."""
        plain = _PLAIN_NAME.fullmatch(name) and name.lower() not in self.reserved
        return name if plain else '"' + name.replace('"', '""') + '"'

    def table(self, schema: str, name: str) -> str:
        return f"{self.name(schema)}.{self.name(name)}" if schema else self.name(name)

    def names(self, names: Sequence[str]) -> str:
        return ", ".join(map(self.name, names))

    def type(self, text: str) -> str:
        text = " ".join(text.split())
        if self.literal_types or not text:
            return text
        plain = _PLAIN_TYPE.fullmatch(text) and not self.reserved & set(text.lower().split("(")[0].split())
        return text if plain else '"' + text.replace('"', '""') + '"'


# Words that SQLite does not take as a name without quotes, or takes for something else.
_SQLITE_RESERVED = """
add all alter and as autoincrement between by case cast check collate commit constraint create cross current_date
current_time current_timestamp default deferrable delete distinct drop else escape except exists false foreign from
full group having if in index indexed inner insert intersect into is isnull join left limit natural not nothing
notnull null on or order outer primary raise references returning right select set table then to transaction true
union unique update using values when where
"""
SQLITE = Dialect(frozenset(_SQLITE_RESERVED.split()))
# DuckDB's reserved words, and those that it takes for a type or function only.
_DUCKDB_RESERVED = """
all analyse analyze and anti any array as asc asof asymmetric at authorization binary both by case cast check collate
collation column concurrently constraint create cross default deferrable desc describe distinct do else end except
false fetch for foreign freeze from full glob group having ilike in initially inner intersect into is isnull join
lambda lateral leading left like limit natural not notnull null offset on only or order outer overlaps pivot
pivot_longer pivot_wider placing positional primary qualify references returning right select semi show similar some
summarize symmetric table tablesample then to trailing true union unique unpack unpivot using variadic verbose when
where window with
"""
DUCKDB = Dialect(frozenset(_DUCKDB_RESERVED.split()), literal_types=True)


class Detail(NamedTuple):
    samples: int
    values: bool
    descriptions: bool


DETAILS = [
    Detail(3, True, True),
    Detail(1, True, True),
    Detail(0, True, True),
    Detail(0, False, True),
    Detail(0, False, False),
]


class SchemaText:
    """The text of one database: the same for every question unless it is so long that tables have to go."""

    def __init__(self, tables: Sequence[Table], dialect: Dialect, style: Style, fits: Fits) -> None:
        self.tables, self.dialect, self.style, self.fits = tuple(tables), dialect, style, fits
        self._same_for_all = next((text for text in self._whole() if fits(text)), None)

    def text(self, question: str = "") -> str:
        """What of the schema fits. `question` decides which tables stay, where not all can."""
        return self._part(question) if self._same_for_all is None else self._same_for_all

    def _whole(self) -> Iterator[str]:
        """Every table with all its columns, from the longest text to the shortest."""
        lines = [_line(table, self.dialect) for table in self.tables]
        if self.style == "full":
            for detail in DETAILS:
                yield "\n\n".join(create_table(table, detail, self.dialect) for table in self.tables)
            yield "\n".join([*lines, *(link for table in self.tables for link in _links(table, self.dialect))])
        yield "\n".join(lines)

    def _part(self, question: str) -> str:
        order = _by_use(self.tables, question)

        def tables(count: int) -> str:
            kept = sorted(order[:count])
            lines = [_line(self.tables[index], self.dialect) for index in kept]
            return "\n".join([*lines, f"-- and {_count(len(order) - count, 'more table')}"])

        count = _most(len(order) - 1, lambda n: self.fits(tables(n)))
        return tables(count) if count else self._columns(self.tables[order[0]], question)

    def _columns(self, table: Table, question: str) -> str:
        """One table, and not even all of it: its key and the columns with the question's words."""
        words = _words(question)
        columns = table.columns
        order = sorted(
            range(len(columns)), key=lambda i: (columns[i].name not in table.key, -len(words & _words(columns[i].name)))
        )
        tail = f"\n-- and {_count(len(self.tables) - 1, 'more table')}" if len(self.tables) > 1 else ""

        def text(count: int) -> str:
            kept = self.dialect.names([columns[index].name for index in sorted(order[:count])])
            left = len(order) - count
            more = f" -- and {_count(left, 'more column')}" if left else ""
            return escape(f"{self.dialect.table(table.schema, table.name)}({kept})") + more + tail

        line = text(max(1, _most(len(order), lambda n: self.fits(text(n)))))
        return line if self.fits(line) else line[: _most(len(line), lambda n: self.fits(line[:n]))]


def create_table(table: Table, detail: Detail, dialect: Dialect) -> str:
    """A CREATE TABLE statement that the database itself would take, with comments."""
    definitions: list[tuple[str, str]] = []
    for column in table.columns:
        words = [dialect.name(column.name), dialect.type(column.type), "NOT NULL" if column.not_null else ""]
        words.append("PRIMARY KEY" if table.key == (column.name,) else "")
        definitions.append((" ".join(word for word in words if word), _comment(column, detail)))
    if len(table.key) > 1:
        definitions.append((f"PRIMARY KEY ({dialect.names(table.key)})", ""))
    for key in table.foreign_keys:
        parent = dialect.table(table.schema, key.parent) + (
            f"({dialect.names(key.parent_columns)})" if key.parent_columns else ""
        )
        definitions.append((f"FOREIGN KEY ({dialect.names(key.columns)}) REFERENCES {parent}", ""))
    lines = []
    for number, (definition, comment) in enumerate(definitions, 1):
        comma = "," if number < len(definitions) else ""
        lines.append("  " + escape(definition) + comma + (f" -- {comment}" if comment else ""))
    return f"CREATE TABLE {escape(dialect.table(table.schema, table.name))} (\n" + "\n".join(lines) + "\n);"


def _comment(column: Column, detail: Detail) -> str:
    parts = [escape(clip(column.description, DESCRIPTION_CHARS))] if detail.descriptions and column.description else []
    if detail.values and column.values:
        parts.append("values: " + escape(clip(column.values, VALUES_CHARS)))
    if detail.samples and column.samples:
        parts.append("e.g. " + ", ".join(map(_sample, column.samples[: detail.samples])))
    return "; ".join(parts)


def _sample(value: Cell) -> str:
    if not isinstance(value, str):
        return str(value)
    shown = value if len(value) <= SAMPLE_CHARS else value[:SAMPLE_CHARS] + "…"
    return escape("'" + shown.replace("'", "''") + "'")


def _line(table: Table, dialect: Dialect) -> str:
    return escape(
        f"{dialect.table(table.schema, table.name)}({dialect.names([column.name for column in table.columns])})"
    )


def _links(table: Table, dialect: Dialect) -> list[str]:
    return [
        escape(
            f"-- {dialect.table(table.schema, table.name)}({dialect.names(key.columns)}) refers to "
            + dialect.table(table.schema, key.parent)
            + (f"({dialect.names(key.parent_columns)})" if key.parent_columns else "")
        )
        for key in table.foreign_keys
    ]


def _by_use(tables: Sequence[Table], question: str) -> list[int]:
    """Numbers of the tables, the one most likely needed first.

    A word of the question in a table's name counts two, in a column's name one; half of a neighbour's score is added, for
    the tables that only join others.
    """
    words = _words(question)
    scores = []
    for table in tables:
        in_columns = set().union(*(_words(column.name) for column in table.columns)) & words
        scores.append(2.0 * len(_words(table.name) & words) + len(in_columns))
    numbers = {table.name.lower(): index for index, table in enumerate(tables)}
    best_neighbour = [0.0] * len(tables)
    for index, table in enumerate(tables):
        for key in table.foreign_keys:
            other = numbers.get(key.parent.lower())
            if other is not None:
                best_neighbour[index] = max(best_neighbour[index], scores[other])
                best_neighbour[other] = max(best_neighbour[other], scores[index])
    return sorted(range(len(tables)), key=lambda i: (-scores[i] - best_neighbour[i] / 2, i))


def _words(text: str) -> set[str]:
    """Stems of the words, in lower case; names are split at underscores and capitals."""
    return {_stem(match.group().lower()) for match in _WORD.finditer(text)}


def _stem(word: str) -> str:
    """The word without one ending, so that ordered, orders and order meet; crude, but only ranks tables."""
    for ending in ("ing", "ies", "ed", "es", "s", "e", "y"):
        if word.endswith(ending) and len(word) >= len(ending) + 3:
            return word.removesuffix(ending)
    return word


def _most(count: int, good: Callable[[int], bool]) -> int:
    """The largest number up to `count` that is good, if every smaller one is; 0 if none is."""
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good(middle) else (low, middle - 1)
    return low


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
