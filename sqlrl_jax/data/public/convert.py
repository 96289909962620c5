"""Rows of a public set to questions in our format, one at a time, every bad row named with file, row and field.

A bad row is counted and left out; whoever calls decides whether any bad row is too many. What makes a whole file unusable
(it is missing, it is no JSON, its gold file belongs to other questions) raises DataError at once. Left out: running the gold
queries, which `launch.py prepare --check` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rollout.types import Task
from sqlrl_jax.data.public.json_rows import json_rows
from sqlrl_jax.data.public.results import GoldResults
from sqlrl_jax.data.public.skyrl import parquet_rows, skyrl_id, skyrl_task
from sqlrl_jax.data.public.sources import Source
from sqlrl_jax.data.tasks import DataError, check_text

SHOWN = 20
"""Problems that are told in full; the rest are counted."""
SQLITE_MAGIC = b"SQLite format 3\0"


class Problems:
    """The bad rows of one set: how many, and what is wrong with the first ones."""

    def __init__(self) -> None:
        self.rows = 0
        self.notes: list[str] = []
        """What a person should know though no row is bad."""
        self._first: dict[str, str] = {}
        self._more: dict[str, int] = {}
        self._hidden = 0

    def add(self, message: str, kind: str = "") -> None:
        """Counts a row. Rows of the same `kind` are told once, with their number."""
        self.rows += 1
        kind = kind or message
        if kind in self._first:
            self._more[kind] = self._more.get(kind, 0) + 1
        elif len(self._first) < SHOWN:
            self._first[kind] = message
        else:
            self._hidden += 1

    def lines(self) -> list[str]:
        told = [
            message + (f" (and {counted(self._more[kind], 'more row')} like it)" if kind in self._more else "")
            for kind, message in self._first.items()
        ]
        return told + ([f"… and {counted(self._hidden, 'more bad row')}"] if self._hidden else [])


class Databases:
    """Whether a row's database is there; each file is looked at once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[tuple[str, str], str] = {}

    def problem(self, db_root: str, db_id: str) -> str:
        """What is wrong with the database; empty when it is there."""
        key = (db_root, db_id)
        if key not in self._known:
            self._known[key] = self._look(db_root, db_id)
        return self._known[key]

    def _look(self, db_root: str, db_id: str) -> str:
        if "/" in db_id or "\\" in db_id or "\0" in db_id or db_id.startswith("."):
            return f"{db_id!r} is not a plain name"
        path = self._root / db_root / db_id / f"{db_id}.sqlite"
        if not path.is_file():
            return f"its database {path} does not exist"
        try:
            with path.open("rb") as file:
                start = file.read(len(SQLITE_MAGIC))
        except OSError as error:
            return f"{path} cannot be read: {error.strerror or error}"
        return "" if start == SQLITE_MAGIC else f"{path} is not a SQLite database"


def convert(
    source: Source, questions: Path, root: Path, problems: Problems, read: Callable[[int], None] = lambda count: None
) -> Iterator[Task]:
    """The good rows of a set as tasks, in file order; bad ones go to `problems`, `read` is told the bytes read.

    Raises DataError when the file as a whole is unusable.
    """
    databases = Databases(root)
    first_row: dict[str, int] = {}
    golds = GoldFile(root / source.gold_file) if source.gold_file and (root / source.gold_file).exists() else None
    results = GoldResults(root / source.gold_results, root / source.gold_standard) if source.gold_results else None
    number = 0
    for number, row in parquet_rows(questions) if source.skyrl_data else json_rows(questions, read):
        where = f"{questions}: row {number}"
        try:
            if source.skyrl_data:
                task = skyrl_task(row, where, skyrl_id(questions.stem, number))
            else:
                task = to_task(source, row, number, where, golds, results)
        except DataError as error:
            problems.add(str(error))
            continue
        missing = databases.problem(task.fields["db_root"], task.fields["db_id"])
        if missing:
            problems.add(f"{where}: field db_id: {missing}", kind=missing)
        elif source.id and task.id in first_row:
            problems.add(f"{where}: field {source.id}: {task.id!r} was already used in row {first_row[task.id]}")
        else:
            if source.id:
                first_row[task.id] = number
            yield task
    if number == 0:
        raise DataError(f"{questions}: holds no questions")
    if golds is not None:
        golds.finish(number, questions)
        problems.notes += golds.notes(questions)
    if number != source.rows and source.split != "train":
        problems.notes.append(f"{questions} has {counted(number, 'row')}; the published set has {source.rows:,}")


def to_task(
    source: Source,
    row: dict[str, Any],
    number: int,
    where: str,
    golds: GoldFile | None = None,
    results: GoldResults | None = None,
) -> Task:
    """One row of a JSON file as a task. Raises DataError naming the field."""
    db_id = check_text(_field(row, ("db_id",), where), "db_id", where)
    name, question = _named(row, source.question, where)
    fields: dict[str, Any] = {
        "db_id": db_id,
        "db_root": source.databases,
        "question": check_text(question, name, where),
    }
    own_id = f"{number:0{max(5, len(str(source.rows)))}d}"
    if source.id:
        own_id = _own_id(_field(row, (source.id,), where), source.id, where)
    if results is None:
        name, sql = _named(row, source.gold_sql, where)
        sql = check_text(sql, name, where)
        fields["gold_sql"] = golds.check(number, db_id, sql, where) if golds is not None else sql
    else:
        fields["gold_results"] = results.of(own_id, where)
    evidence = next((row[name] for name in source.evidence if row.get(name) is not None), "")
    fields["evidence"] = check_text(evidence, "/".join(source.evidence), where, empty=True)
    for theirs, ours in source.keep.items():
        if isinstance(row.get(theirs), str | int | float):
            fields[ours] = row[theirs]
    return Task(id=f"{source.name}-{own_id}", source=source.name, fields=fields)


class GoldFile:
    """Lines of `SQL<tab>db_id`, one a question, in the questions' order.

    The published evaluation grades by this file, so its query is the one that counts. Queries that differ from the questions'
    file in more than white space are counted and told.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: byte {error.start} is not UTF-8 text") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
        self._golds = [self._split(line, number) for number, line in enumerate(lines, 1)]
        self._differ: list[int] = []

    def _split(self, line: str, number: int) -> tuple[str, str]:
        sql, tab, db_id = line.rpartition("\t")
        if not tab or not sql.strip() or not db_id.strip():
            raise DataError(f"{self._path}:{number}: expected SQL, a tab and db_id")
        return sql.strip(), db_id.strip()

    def check(self, number: int, db_id: str, sql: str, where: str) -> str:
        """The gold query of row `number`. Raises DataError when the file's line belongs to another question."""
        if number > len(self._golds):
            raise DataError(f"{where}: {self._path} has only {len(self._golds)} queries")
        gold, gold_db = self._golds[number - 1]
        if gold_db != db_id:
            raise DataError(f"{where}: field db_id: {db_id!r}, but query {number} of {self._path} is for {gold_db!r}")
        if _plain(gold) != _plain(sql):
            self._differ.append(number)
        return gold

    def finish(self, rows: int, questions: Path) -> None:
        """Raises DataError when there are more queries than questions."""
        if rows != len(self._golds):
            raise DataError(f"{self._path} has {len(self._golds):,} queries, {questions} has {rows:,} questions")

    def notes(self, questions: Path) -> list[str]:
        if not self._differ:
            return []
        rows = ", ".join(map(str, self._differ[:5])) + (", …" if len(self._differ) > 5 else "")
        return [
            f"the gold query of {counted(len(self._differ), 'row')} of {questions} differs from {self._path} "
            f"(row {rows}); the latter is used, as in the published evaluation"
        ]


def counted(count: int, what: str) -> str:
    """`1 row`, `1,034 rows`."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def _plain(sql: str) -> str:
    return " ".join(sql.split()).rstrip("; ")


def _named(row: dict[str, Any], names: tuple[str, ...], where: str) -> tuple[str, Any]:
    for name in names:
        if name in row:
            return name, row[name]
    raise DataError(f"{where}: field {' or '.join(names)} is missing; the row has {', '.join(row) or 'none'}")


def _field(row: dict[str, Any], names: tuple[str, ...], where: str) -> Any:
    return _named(row, names, where)[1]


def _own_id(value: Any, name: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
        raise DataError(f"{where}: field {name}: expected a number or text, found {value!r}")
    return check_text(str(value), name, where)
