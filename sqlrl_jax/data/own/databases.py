"""Finds a person's databases (SQLite or CSV files, alone or in a folder) and copies them to `<db_id>/<db_id>.sqlite`.

The originals are only read, and nothing is written beside them: SQLite's backup copies what a database holds, also what
still lies in its write-ahead log. Left out: other database systems; export their tables as CSV.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from sqlrl_jax.data.own.csv_tables import build_database
from sqlrl_jax.data.own.csv_text import SUFFIXES as CSV_SUFFIXES
from sqlrl_jax.data.progress import Progress, silent
from sqlrl_jax.data.tasks import DataError, is_name

SQLITE_SUFFIXES = (".sqlite", ".db", ".sqlite3")
MAGIC = b"SQLite format 3\0"
JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")
"""A rollback journal that counts begins so; one that is kept for the next transaction begins with zeros."""
LOCKED_SECONDS = 30.0
PAGES = 4096


@dataclass(frozen=True)
class Original:
    """A database as it was found: one SQLite file, or the CSV files of its tables."""

    db_id: str
    kind: Literal["sqlite", "csv"]
    files: tuple[Path, ...]

    @property
    def size(self) -> int:
        logs = [log for file in self.files if (log := _beside(file, "-wal")).exists()]
        return sum(file.stat().st_size for file in (*self.files, *logs))


def find_databases(path: Path, questions: Path | None = None) -> list[Original]:
    """The databases at `path`, by name. Raises DataError when there are none, or when it is not clear what they are.

    A folder may hold SQLite files, or a folder for each database with its SQLite file, or CSV files (one database of
    that folder's name), or folders of CSV files (a database each). The file of `questions` may lie among them.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder of databases")
    found = [_single(path)] if path.is_file() else _in_folder(path, questions)
    for original in found:
        if not is_name(original.db_id):
            raise DataError(f"{path}: {original.db_id!r} can't be a database's name; rename the file or folder")
    return found


def _in_folder(path: Path, questions: Path | None) -> list[Original]:
    here = _inside(path, questions)
    sqlite_files = [p for p in here if _is_sqlite(p)]
    tables = [p for p in here if _is_csv(p)]
    folders = [p for p in here if p.is_dir()]
    found = [Original(p.stem, "sqlite", (p,)) for p in sqlite_files] + [
        o for p in folders if (o := _folder(p, questions))
    ]
    if tables and found:
        raise DataError(
            f"{path}: holds CSV files ({tables[0].name}) and databases ({found[0].files[0].relative_to(path)}); "
            "point to a folder that holds one kind"
        )
    if tables:
        found = [Original(path.resolve().name, "csv", tuple(tables))]
    if not found:
        raise DataError(
            f"{path}: found no databases; expected files that end in {', '.join(SQLITE_SUFFIXES)} (also as "
            f"<name>/<name>.sqlite), or CSV files that end in {' or '.join(CSV_SUFFIXES)}"
        )
    seen: dict[str, Original] = {}
    for original in found:
        other = seen.setdefault(original.db_id.lower(), original)
        if other is not original:
            raise DataError(
                f"{path}: {other.files[0]} and {original.files[0]} would both be {original.db_id}; rename one"
            )
    return sorted(found, key=lambda original: original.db_id)


def copy_database(
    original: Original,
    target: Path,
    *,
    encoding: str | None = None,
    nulls: Collection[str] = (),
    progress: Progress = silent,
) -> list[str]:
    """Writes `target`, which must not exist, and returns notes for the person. Same input, same bytes."""
    if original.kind == "csv":
        tables = build_database(original.files, target, encoding=encoding, nulls=nulls, progress=progress)
        return [f"{file.name}: {note}" for file, t in zip(original.files, tables, strict=True) for note in t.notes]
    path = original.files[0]
    try:
        _copy_sqlite(path, target, progress)
        with closing(sqlite3.connect(target)) as copy:
            # Nobody writes to it: without the log, one file is all there is.
            copy.execute("PRAGMA journal_mode = DELETE")
            tables_found = copy.execute(
                "SELECT count(*) FROM sqlite_master WHERE type IN ('table', 'view')"
            ).fetchone()[0]
    except sqlite3.Error as error:
        raise DataError(f"{path}: can't be read as a SQLite database ({error})") from None
    if not tables_found:
        raise DataError(f"{path}: has no tables")
    return []


def _single(path: Path) -> Original:
    if _is_csv(path):
        return Original(path.stem, "csv", (path,))
    if _is_sqlite(path) or _head(path) == MAGIC:
        return Original(path.stem, "sqlite", (path,))
    raise DataError(
        f"{path}: is neither a SQLite database nor a CSV file ({', '.join((*SQLITE_SUFFIXES, *CSV_SUFFIXES))})"
    )


def _inside(folder: Path, questions: Path | None) -> list[Path]:
    """What a folder holds, but for hidden files and the questions."""
    try:
        found = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: can't be read ({error.strerror})") from None
    return [p for p in found if questions is None or p.resolve() != questions.resolve()]


def _folder(folder: Path, questions: Path | None) -> Original | None:
    """The database in a folder of its own: the SQLite file of the folder's name, the only one there, or CSV files."""
    inside = _inside(folder, questions)
    files = [p for p in inside if _is_sqlite(p)]
    named = [p for p in files if p.stem == folder.name] or files
    if len(named) == 1:
        return Original(folder.name, "sqlite", (named[0],))
    if files:
        names = ", ".join(p.name for p in files[:3])
        raise DataError(f"{folder}: which of {names} is the database? Expected {folder.name}.sqlite or just one file")
    tables = tuple(p for p in inside if _is_csv(p))
    return Original(folder.name, "csv", tables) if tables else None


def _is_sqlite(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in SQLITE_SUFFIXES


def _is_csv(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in CSV_SUFFIXES


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC))
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from None


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _copy_sqlite(path: Path, target: Path, progress: Progress) -> None:
    head = _head(path)
    if head != MAGIC:
        what = "is empty" if not head else "is not a SQLite database, or it is encrypted"
        raise DataError(f"{path}: {what}")
    journal = _beside(path, "-journal")
    if journal.exists() and _head(journal).startswith(JOURNAL_MAGIC):
        raise DataError(
            f"{path}: a program is writing to it, or was interrupted while it did ({journal.name} is there); "
            "close that program, or open the database once with sqlite3, and run again"
        )
    with path.open("rb") as file:
        file.seek(18)
        logged = file.read(1) == b"\2"
    log, index = _beside(path, "-wal"), _beside(path, "-shm")
    if not logged or index.exists():
        # Locks are respected and nothing new appears: a program that has it open brought the log's index with it.
        _backup(f"{_uri(path)}?mode=ro", path, target, progress)
    elif not log.exists() or not log.stat().st_size:
        _backup(f"{_uri(path)}?mode=ro&immutable=1", path, target, progress)
    else:
        # A log that nobody has open. Reading it where it lies would create its index beside the original.
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            copy = Path(scratch, path.name)
            shutil.copyfile(path, copy)
            shutil.copyfile(log, _beside(copy, "-wal"))
            _backup(_uri(copy), path, target, progress)


def _uri(path: Path) -> str:
    return f"file:{quote(os.fsencode(path.resolve()))}"


def _backup(uri: str, path: Path, target: Path, progress: Progress) -> None:
    """Copies page by page under one read lock, so that a writer can't make it start over."""
    stuck_since = time.monotonic()
    left = -1

    def step(status: int, remaining: int, total: int) -> None:
        nonlocal stuck_since, left
        if remaining != left:
            left, stuck_since = remaining, time.monotonic()
        elif time.monotonic() - stuck_since > LOCKED_SECONDS:
            raise DataError(f"{path}: stayed locked by another program; close it and run again")
        progress(f"copying {path.name}", total - remaining, total)

    with (
        closing(sqlite3.connect(uri, uri=True, isolation_level=None, timeout=LOCKED_SECONDS)) as source,
        closing(sqlite3.connect(target)) as copy,
    ):
        source.execute("BEGIN")
        source.execute("SELECT count(*) FROM sqlite_master").fetchone()
        source.backup(copy, pages=PAGES, progress=step)
