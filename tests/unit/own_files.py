"""Small databases and files of questions, for tests of one's own data."""

from __future__ import annotations

import csv
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path


def sqlite_file(path: Path, rows: int = 3, mode: str = "delete") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA journal_mode = {mode}")
        connection.execute("CREATE TABLE pets (id INTEGER PRIMARY KEY, name TEXT)")
        connection.executemany("INSERT INTO pets VALUES (?, ?)", [(i, f"pet {i}") for i in range(rows)])
        connection.commit()
    return path


def questions_file(path: Path, rows: Sequence[tuple[str, ...]], header: str = "question,sql") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return path
