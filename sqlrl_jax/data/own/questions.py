"""A person's questions (CSV, TSV, JSON lines or a JSON array) to tasks, and their split for training and validation.

Columns are found by the names that people give them. All bad rows are named together, by file, row and field. Left
out: running the SQL, which `launch.py prepare --check` does.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rollout.types import Task
from sqlrl_jax.data.own.csv_text import SUFFIXES as CSV_SUFFIXES
from sqlrl_jax.data.own.csv_text import open_csv
from sqlrl_jax.data.public.json_rows import json_rows
from sqlrl_jax.data.tasks import DataError, check_text, is_name, json_lines

NAMES: dict[str, tuple[str, ...]] = {
    "question": ("question", "nl_question", "natural_language_question", "utterance", "nl"),
    "gold_sql": ("gold_sql", "sql", "query", "sql_query", "gold_query", "gold", "answer_sql"),
    "db_id": ("db_id", "db", "database", "database_id", "db_name", "database_name"),
    "evidence": ("evidence", "hint", "hints", "external_knowledge", "knowledge"),
    "id": ("id", "question_id", "qid"),
    "source": ("source",),
}
SHOWN = 10
Row = dict[str, Any]


def read_questions(path: Path, db_ids: Sequence[str], encoding: str | None = None) -> tuple[list[Task], list[str]]:
    """(tasks in file order, notes). `db_ids` are the databases there are; with just one, rows need not name it.

    Raises DataError for a file that can't be used, and one for all bad rows together.
    """
    tasks: list[Task] = []
    problems: list[str] = []
    first: dict[str, str] = {}
    notes: list[str] = []
    columns: dict[str, str] = {}
    for number, where, row in _rows(path, encoding):
        if not columns:
            columns, unused = match_columns(row, path, len(db_ids) > 1)
            if unused:
                notes.append(f"{path.name}: not used: {', '.join(unused)}")
        try:
            task = _task(row, columns, db_ids, where, f"{path.stem}-{number:05d}", path.stem)
            if task.id in first:
                raise DataError(f"{where}: field id: {task.id!r} is already that of {first[task.id]}")
        except DataError as error:
            problems.append(str(error))
            continue
        first[task.id] = where
        tasks.append(task)
    if problems:
        more = f"\n… and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise DataError("\n".join(problems[:SHOWN]) + more)
    if not tasks:
        raise DataError(f"{path}: holds no questions")
    return tasks, notes


def match_columns(row: Mapping[str, Any], path: Path, needs_database: bool) -> tuple[dict[str, str], list[str]]:
    """Which column holds which field, by the first row; and the columns that hold none.

    Where two names would do, the first of NAMES whose value is text is taken (Spider's `sql` is a parse tree).
    """
    given = {_plain(name): name for name in row}
    columns: dict[str, str] = {}
    for field, names in NAMES.items():
        there = [given[name] for name in names if name in given]
        texts = [name for name in there if field == "id" or isinstance(row[name], str | None)]
        if texts or there:
            columns[field] = (texts or there)[0]
    for field in ("question", "gold_sql", *(["db_id"] if needs_database else [])):
        if field not in columns:
            why = " (there are several databases)" if field == "db_id" else ""
            raise DataError(
                f"{path}: no column for {field}{why}; expected one of {', '.join(NAMES[field])}, "
                f"found {', '.join(map(str, row))}"
            )
    return columns, [name for name in row if name not in columns.values()]


def split(tasks: Sequence[Task], share: float, seed: int) -> tuple[list[Task], list[Task]]:
    """(training, validation), each in the given order; by database if there are several, otherwise by question.

    Questions with the same SQL stay together, so that no validation question was trained on in other words. Both parts have
    at least one question where there are two groups; `share` 0 gives no validation.
    """
    several = len({task.fields["db_id"] for task in tasks}) > 1
    groups: dict[str, int] = {}
    for task in tasks:
        key = _group(task, several)
        groups[key] = groups.get(key, 0) + 1
    order = list(groups)
    random.Random(seed).shuffle(order)
    if not share or len(order) < 2:
        return list(tasks), []
    wanted = share * len(tasks)
    taken: set[str] = set()
    count = 0
    for key in order:
        if len(taken) < len(order) - 1 and abs(count + groups[key] - wanted) < abs(count - wanted):
            taken.add(key)
            count += groups[key]
    if not taken:
        taken.add(min(order, key=groups.__getitem__))
    return (
        [task for task in tasks if _group(task, several) not in taken],
        [task for task in tasks if _group(task, several) in taken],
    )


def _group(task: Task, by_database: bool) -> str:
    text: str = task.fields["db_id"] if by_database else task.fields["gold_sql"]
    return text if by_database else " ".join(text.lower().split()).rstrip("; ")


def _plain(name: str) -> str:
    return "_".join(str(name).strip().lower().replace("-", " ").replace("_", " ").split())


def _rows(path: Path, encoding: str | None) -> Iterator[tuple[int, str, Row]]:
    """(row from 1, file and line, row)."""
    suffix = path.suffix.lower()
    if not path.is_file():
        raise DataError(f"{path}: no such file of questions")
    if not is_name(path.stem):
        raise DataError(f"{path}: {path.stem!r} can't be part of the questions' ids; rename the file")
    if suffix in CSV_SUFFIXES:
        file = open_csv(path, encoding)
        doubled = {name for name in file.header if file.header.count(name) > 1}
        if doubled:
            raise DataError(f"{path}: has two columns named {', '.join(sorted(doubled))}")
        for number, (line, fields) in enumerate(file.records(), 1):
            yield number, f"{path}:{line}", dict(zip(file.header, fields, strict=True))
    elif suffix in (".jsonl", ".ndjson"):
        for number, (line, row) in enumerate(json_lines(path), 1):
            yield number, f"{path}:{line}", row
    elif suffix == ".json":
        for number, row in json_rows(path):
            yield number, f"{path}: row {number}", row
    else:
        raise DataError(f"{path}: expected questions as .csv, .tsv, .jsonl or .json")


def _task(
    row: Row, columns: Mapping[str, str], db_ids: Sequence[str], where: str, default_id: str, default_source: str
) -> Task:
    """One row, checked."""

    def text(field: str, default: str = "", empty: bool = True) -> str:
        name = columns.get(field, field)
        value = row.get(name)
        if value is None:
            value = default
        if field == "id" and isinstance(value, int):
            value = str(value)
        label = name if name == field else f"{name} ({field})"
        return check_text(value, label, where, empty) or default

    return Task(
        id=text("id", default_id),
        source=text("source", default_source),
        fields={
            "db_id": _database(text("db_id"), db_ids, where),
            "question": text("question", empty=False).strip(),
            "gold_sql": text("gold_sql", empty=False).strip(),
            "evidence": text("evidence").strip(),
        },
    )


def _database(name: str, db_ids: Sequence[str], where: str) -> str:
    """The database that a row means; capital letters do not matter."""
    name = name.strip()
    if not name and len(db_ids) == 1:
        return db_ids[0]
    if name in db_ids:
        return name
    same = [db_id for db_id in db_ids if db_id.lower() == name.lower()]
    if same:
        return same[0]
    if not name:
        raise DataError(f"{where}: field db_id is empty, and there are several databases")
    near = difflib.get_close_matches(name, db_ids, n=1) or sorted(db_ids)[:3]
    raise DataError(f"{where}: field db_id: there is no database {name!r}; did you mean {', '.join(near)}?")
