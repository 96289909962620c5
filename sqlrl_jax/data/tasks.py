"""Questions on disk: JSON lines of `{id, db_id, question, gold_sql, evidence, source, ...}`, one task a line.

Checks the shape of each line and names file, line and field when something is off. Whether the database exists and the
gold query answers is the SQL environment's business, because only it opens databases. Fields this file does not know are
kept, so that an environment of one's own can read them. A file that ends in `.parquet` holds rows of SkyRL-SQL, which
sqlrl_jax.data.public.skyrl reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rollout.errors import UserError
from rollout.types import Task
from sqlrl_jax.data.disk import disk_errors

REQUIRED = ("id", "db_id", "question", "gold_sql")
OPTIONAL = ("evidence", "source", "schema", "prompt", "db_root")


class DataError(UserError):
    """A file of questions is missing or malformed; the message names file, line and field."""


def read_tasks(path: str | Path, required: Sequence[str] = REQUIRED) -> list[Task]:
    """All tasks of a file, in file order. Blank lines are skipped; `source` is the file's stem where it is not given.

    Raises DataError for a missing or empty file, a line that is not a JSON object, a missing or non-text field, an
    id that was seen before.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file of questions; expected JSON lines with {', '.join(required)}")
    if path.suffix.lower() in (".csv", ".tsv"):
        raise DataError(f"{path}: expected JSON lines; `python launch.py prepare own` makes them from a CSV file")
    tasks: list[Task] = []
    first_line: dict[str, int] = {}
    for number, task in _numbered(path, required):
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


def _numbered(path: Path, required: Sequence[str]) -> Iterator[tuple[int, Task]]:
    """Each task with its line, or row of a parquet file, from 1."""
    if path.suffix == ".parquet":
        from sqlrl_jax.data.public.skyrl import skyrl_tasks  # reads parquet with an optional library

        yield from skyrl_tasks(path)
        return
    for number, row in json_lines(path):
        yield number, _task(row, f"{path}:{number}", path.stem, required)


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line from 1, object) of each line that is not blank. Raises DataError naming file and line."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _json_object(line, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: after line {number}: not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg} at column {error.colno}); one object a line") from None
    except RecursionError:
        raise DataError(f"{where}: nested too deeply") from None
    except ValueError:  # Python's limit on the digits of a number
        raise DataError(f"{where}: holds a number with too many digits; write it as text") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def _task(row: dict[str, Any], where: str, default_source: str, required: Sequence[str]) -> Task:
    """One row to one task; `where` (file:line) opens every error message.

    Without `gold_sql` among the required fields it is another environment's task, whose fields mean what that says.
    """
    for name in required:
        if name == "gold_sql" and row.get("gold_results") is not None:
            continue  # graded by results instead
        if name not in row:
            raise DataError(f"{where}: field {name} is missing; required are {', '.join(required)}")
        check_text(row[name], name, where)
    for name in OPTIONAL if "gold_sql" in required else ("source",):
        if row.get(name) is not None and name != "prompt":
            check_text(row[name], name, where, empty=True)
    fields = {name: value for name, value in row.items() if name not in ("id", "source")}
    return Task(id=row["id"], source=row.get("source") or default_source, fields=fields)


def write_tasks(path: str | Path, tasks: Iterable[Task]) -> int:
    """Writes what read_tasks reads, and returns how many; the same tasks give the same bytes."""
    count = 0
    # Half of a surrogate pair in a field that nobody checks is written as JSON escapes it, which is Python's way too.
    with (
        replacing(Path(path)) as part,
        part.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file,
    ):
        for task in tasks:
            count += 1
            file.write(json.dumps({"id": task.id, "source": task.source, **task.fields}, ensure_ascii=False) + "\n")
    return count


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write that takes `path`'s place when the block ends well, and is removed when it does not.

    Folders are made. Raises DataError when the disk is full or the place can't be written.
    """
    part = path.with_name(path.name + ".part")
    with disk_errors(path, DataError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def check_text(value: Any, name: str, where: str, empty: bool = False) -> str:
    """`value` if it is text that can be stored, and not blank unless `empty`. Raises DataError naming the field."""
    if not isinstance(value, str):
        raise DataError(f"{where}: field {name}: expected text, found {type(value).__name__}")
    if not empty and not value.strip():
        raise DataError(f"{where}: field {name} is empty")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise DataError(f"{where}: field {name}: holds half of a surrogate pair, which is not a character")
    return value


def is_name(text: str) -> bool:
    """Whether a file's name can stand in other files: no control characters, no bytes that are not UTF-8."""
    return not any(c < " " or c == "\x7f" or "\ud800" <= c <= "\udfff" for c in text)
