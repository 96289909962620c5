"""What a database's owner says about its columns: CSV files beside the database, in the layout of BIRD.

`database_description/<table>.csv` has a line for each column: original_column_name, column_name, column_description,
data_format, value_description. The files are often made by hand: any encoding, stray blanks and other columns are
taken. One that can't be read is left out with a warning, because a question can be answered without it.
"""

from __future__ import annotations

import csv
import io
import logging
from pathlib import Path
from typing import NamedTuple

FOLDER = "database_description"
MAX_FILE_BYTES = 1_000_000

_log = logging.getLogger(__name__)


class Description(NamedTuple):
    column: str
    values: str


def read_descriptions(database: Path) -> dict[tuple[str, str], Description]:
    """Descriptions by (table, column), both in lower case, of the database file `database`. Empty if there are none."""
    found: dict[tuple[str, str], Description] = {}
    for path in sorted((database.parent / FOLDER).glob("*.csv")):
        try:
            for column, description in _read(path).items():
                found[path.stem.strip().lower(), column] = description
        except (OSError, ValueError, csv.Error) as error:
            _log.warning("%s: left out: %s", path, error)
    return found


def _read(path: Path) -> dict[str, Description]:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", "replace")  # what spreadsheets write
    rows = csv.DictReader(io.StringIO(text.replace("\0", "")))
    if "original_column_name" not in (rows.fieldnames or ()):
        raise ValueError(f"no column original_column_name; found {', '.join(rows.fieldnames or ()) or 'nothing'}")
    found = {}
    for row in rows:
        name = _clean(row.get("original_column_name"))
        longer, meaning = _clean(row.get("column_name")), _clean(row.get("column_description"))
        if _letters(longer) in (_letters(name), _letters(meaning)):
            longer = ""  # says nothing new
        if _letters(meaning) == _letters(name):
            meaning = ""
        column = ": ".join(part for part in (longer, meaning) if part)
        found[name.lower()] = Description(column, _clean(row.get("value_description")))
    return found


def _clean(text: str | None) -> str:
    return " ".join((text or "").split())


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text)).lower()
