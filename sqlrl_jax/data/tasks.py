"""Questions on disk: JSON lines of `{id, db_id, question, gold_sql, evidence, source, ...}`, one task a line.

Checks the shape of each line and names file, line and field when something is off. Whether the database exists and the
gold query answers is the SQL environment's business, because only it opens databases. Fields this file does not know are
kept, so that an environment of one's own can read them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rollout.errors import UserError
from rollout.types import Task

REQUIRED = ("id", "db_id", "question", "gold_sql")
OPTIONAL = ("evidence", "source", "schema", "prompt")


class DataError(UserError):
    """A file of questions is missing or malformed; the message names file, line and field."""


def read_tasks(path: str | Path) -> list[Task]:
    """All tasks of a file, in file order. Blank lines are skipped; `source` is the file's stem where it is not given.

    Raises DataError for a missing or empty file, a line that is not a JSON object, a missing or non-text field, an
    id that was seen before.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file of questions; expected JSON lines with {', '.join(REQUIRED)}")
    tasks: list[Task] = []
    first_line: dict[str, int] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            task = parse_task(line, f"{path}:{number}", default_source=path.stem)
            if task.id in first_line:
                raise DataError(
                    f"{path}:{number}: field id: {task.id!r} was already used in line {first_line[task.id]}; "
                    "ids must be unique in a file"
                )
            first_line[task.id] = number
            tasks.append(task)
    if not tasks:
        raise DataError(f"{path}: holds no questions; expected at least one JSON line")
    return tasks


def parse_task(line: str, where: str, default_source: str = "") -> Task:
    """One line to one task; `where` (file:line) opens every error message."""
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg} at column {error.colno}); one object a line") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
    for name in REQUIRED:
        if name not in row:
            raise DataError(f"{where}: field {name} is missing; required are {', '.join(REQUIRED)}")
        _check_text(row[name], name, where)
        if not row[name].strip():
            raise DataError(f"{where}: field {name} is empty")
    for name in OPTIONAL:
        if row.get(name) is not None and name != "prompt":
            _check_text(row[name], name, where)
    fields = {name: value for name, value in row.items() if name not in ("id", "source")}
    return Task(id=row["id"], source=row.get("source") or default_source, fields=fields)


def write_tasks(path: str | Path, tasks: Iterable[Task]) -> None:
    """Writes what read_tasks reads; the same tasks give the same bytes."""
    lines = (json.dumps({"id": t.id, "source": t.source, **t.fields}, ensure_ascii=False) + "\n" for t in tasks)
    Path(path).write_text("".join(lines), encoding="utf-8")


def _check_text(value: Any, name: str, where: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{where}: field {name}: expected text, found {type(value).__name__}")
