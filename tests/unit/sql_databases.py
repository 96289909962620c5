"""Small databases for the tests of the executor and its pool."""

from __future__ import annotations

import sqlite3
from pathlib import Path


def make_database(root: Path, db_id: str, *statements: str) -> Path:
    """Writes `<root>/<db_id>/<db_id>.sqlite`."""
    (root / db_id).mkdir()
    path = root / db_id / f"{db_id}.sqlite"
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()
    return path
