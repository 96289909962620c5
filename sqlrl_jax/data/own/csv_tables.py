"""CSV files to one SQLite database, a table a file, with types that lose nothing.

A column is INTEGER or REAL only if every value in it is written as such a number, and TEXT otherwise. Leading zeros
and plus signs (zip codes, phone numbers), thousands separators, decimal commas, integers beyond 64 bits, dates and
true/false are text. Empty fields are NULL. Blanks around a number and zeros at the end of a fraction are lost, nothing
else. Each file is read twice, once for the types and once for the rows, and never held. Left out: keys and indexes, which
a CSV file does not state.
"""

from __future__ import annotations

import math
import re
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from sqlrl_jax.data.own.csv_text import NAMES, CsvFile, Watch, open_csv
from sqlrl_jax.data.progress import Progress, silent
from sqlrl_jax.data.tasks import DataError

BATCH = 10_000
NUMBER = re.compile(
    r" *(?:(?P<whole>-?(?:0|[1-9][0-9]*))"
    # An exponent needs a sign or a fraction before it, as programs write it: 1E5 is as often a code as a number.
    r"|-?(?:0|[1-9][0-9]*)?\.[0-9]+(?:[eE][+-]?[0-9]+)?|-?(?:0|[1-9][0-9]*)[eE][+-][0-9]+) *"
)
DECIMAL_COMMA = re.compile(r" *-?[0-9]+(?:\.[0-9]{3})*,[0-9]+ *")
WORD = re.compile(r"[A-Za-z][A-Za-z/]{0,9}")
EXACT = 1 << 53
"""Integers up to here are exact as floats."""
Cell = str | int | float | None


@dataclass
class Guess:
    """What a column's values have shown so far."""

    name: str
    kind: str = ""
    wide: bool = False
    numbers: int = 0
    note: str = ""

    def see(self, value: str, line: int) -> bool:
        """Takes one value; False once the column is settled as text."""
        match = NUMBER.fullmatch(value)
        kind = "TEXT"
        if match and match["whole"] is not None:
            number = int(match["whole"]) if len(value) < 100 else 1 << 64
            self.wide = self.wide or abs(number) > EXACT
            kind = "INTEGER" if -(1 << 63) <= number < 1 << 63 else "TEXT"
        elif match:
            kind = "REAL" if math.isfinite(float(value)) else "TEXT"
        if "REAL" in (kind, self.kind) and kind != "TEXT":
            kind = "TEXT" if self.wide else "REAL"
        if kind == "TEXT":
            self._explain(value if len(value) <= 30 else value[:30] + "…", line)
        self.numbers += 1
        self.kind = kind
        return kind != "TEXT"

    def _explain(self, value: str, line: int) -> None:
        """Notes why it is text where a person may have expected numbers."""
        if DECIMAL_COMMA.fullmatch(value):
            self.note = f"column {self.name}: kept as text; {value!r} in line {line} looks like a decimal comma"
        elif self.numbers >= 2:
            self.note = (
                f"column {self.name}: kept as text because of {value!r} in line {line}; the {self.numbers} values "
                "before it are numbers"
            )
            if WORD.fullmatch(value):
                self.note += f"; if it means NULL, give --null {value}"


@dataclass(frozen=True)
class Table:
    """A table as it was written. `notes` say what a person should know about it."""

    name: str
    columns: tuple[tuple[str, str], ...]
    rows: int
    notes: tuple[str, ...] = field(default=())


def build_database(
    files: Sequence[Path],
    target: Path,
    *,
    encoding: str | None = None,
    nulls: Collection[str] = (),
    progress: Progress = silent,
) -> list[Table]:
    """Writes `target` (which must not exist) with a table for each file, named after it; same files, same bytes.

    `nulls` are texts that mean NULL besides the empty one, such as NA. Raises DataError naming file and line.
    """
    connection = sqlite3.connect(target, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("BEGIN")
        names = _table_names(files)
        tables = [_add(connection, name, file, encoding, frozenset(nulls), progress) for name, file in names]
        connection.execute("COMMIT")
        return tables
    finally:
        connection.close()


def _table_names(files: Sequence[Path]) -> list[tuple[str, Path]]:
    """Table names from file names; SQLite does not tell `a` from `A` and keeps `sqlite_…` to itself."""
    taken: dict[str, Path] = {}
    for file in files:
        key = file.stem.lower()
        if key in taken:
            raise DataError(f"{file}: {taken[key].name} would give a table of the same name; rename one of the files")
        if key.startswith("sqlite_"):
            raise DataError(f"{file}: SQLite keeps names that begin with sqlite_ to itself; rename the file")
        taken[key] = file
    return [(file.stem, file) for file in files]


def _add(
    connection: sqlite3.Connection,
    name: str,
    path: Path,
    encoding: str | None,
    nulls: frozenset[str],
    progress: Progress,
) -> Table:
    """Creates and fills one table."""
    file = open_csv(path, encoding)
    names, notes = column_names(file.header)
    if file.delimiter != "," and path.suffix.lower() != ".tsv":
        notes.append(f"delimiter: {NAMES[file.delimiter]}")
    size = path.stat().st_size
    guesses, rows = _guess(file, names, nulls, lambda at: progress(f"reading {path.name}", at, size))
    notes += [guess.note for guess in guesses if guess.note]
    if not rows:
        notes.append("has column names but no rows")
    columns = tuple((guess.name, guess.kind or "TEXT") for guess in guesses)
    definitions = ", ".join(f"{_quoted(column)} {kind}" for column, kind in columns)
    places = ", ".join("?" * len(columns))
    try:
        connection.execute(f"CREATE TABLE {_quoted(name)} ({definitions})")
        cells = _cells(file, [kind for _, kind in columns], nulls, progress)
        while batch := list(islice(cells, BATCH)):
            connection.executemany(f"INSERT INTO {_quoted(name)} VALUES ({places})", batch)
    except sqlite3.Error as error:
        raise DataError(f"{path}: SQLite can't hold this table ({error})") from None
    progress(f"writing {path.name}", size, size)
    return Table(name, columns, rows, tuple(notes))


def column_names(header: Sequence[str]) -> tuple[list[str], list[str]]:
    """Column names that are not empty and differ, and notes on those that had to be changed."""
    names: list[str] = []
    notes: list[str] = []
    given = {" ".join(text.split()).lower() for text in header}
    taken: set[str] = set()
    for position, text in enumerate(header, 1):
        wanted = " ".join(text.split()) or f"column_{position}"
        name, number = wanted, 1
        while name.lower() in taken or (number > 1 and name.lower() in given):
            number += 1
            name = f"{wanted}_{number}"
        taken.add(name.lower())
        names.append(name)
        if not text.strip():
            notes.append(f"column {position} has no name and is called {name}")
        elif name != wanted:
            notes.append(f"column {position} has the name of an earlier one, {wanted}, and is called {name}")
    if all(NUMBER.fullmatch(name) for name in names):
        notes.append(f"its first line has only numbers ({', '.join(names[:3])}); it should hold the column names")
    return names, notes


def _guess(file: CsvFile, names: Sequence[str], nulls: frozenset[str], watch: Watch) -> tuple[list[Guess], int]:
    """The first reading: types, and the number of rows."""
    guesses = [Guess(name) for name in names]
    open_columns = list(enumerate(guesses))
    rows = 0
    for line, record in file.records(watch):
        rows += 1
        settled = False
        for position, guess in open_columns:
            value = record[position]
            if value and value not in nulls and not guess.see(value, line):
                settled = True
        if settled:
            open_columns = [(p, g) for p, g in open_columns if g.kind != "TEXT"]
    return guesses, rows


def _cells(
    file: CsvFile, kinds: Sequence[str], nulls: frozenset[str], progress: Progress
) -> Iterator[tuple[Cell, ...]]:
    """The second reading: values."""
    size = file.path.stat().st_size
    convert = [{"INTEGER": int, "REAL": float, "TEXT": str}[kind] for kind in kinds]
    label = f"writing {file.path.name}"
    for _, record in file.records(lambda at: progress(label, at, size)):
        yield tuple(
            None if not value or value in nulls else make(value) for make, value in zip(convert, record, strict=True)
        )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
