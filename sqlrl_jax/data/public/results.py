"""Golds that are results, not SQL: Spider2-SQLite publishes CSV files of what the right query returns.

A question has one file, `<id>.csv`, or several that are all right, `<id>_a.csv`, `<id>_b.csv`. A file of JSON lines beside
them, the standard, says which columns count (`condition_cols`, all if empty) and whether the order of rows does
(`ignore_order`). Both are put into the task as `gold_results`, so that a prepared file stands alone; rollout.sql.gold_results
compares. Left out: training on such questions needs nothing more, but there is no gold SQL to check or to show.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from sqlrl_jax.data.own.csv_text import field_limit
from sqlrl_jax.data.tasks import DataError, json_lines


class GoldResults:
    """The published results of a set. Raises DataError for a missing or malformed standard."""

    def __init__(self, folder: Path, standard: Path) -> None:
        self._folder, self._standard = folder, standard
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder of results")
        self._rules = _read_standard(standard)
        self._files: dict[str, list[Path]] = {}
        for path in sorted(folder.glob("*.csv")):
            stem, _, letter = path.stem.rpartition("_")
            alternative = bool(stem) and len(letter) == 1 and "a" <= letter <= "z"
            self._files.setdefault(stem if alternative else path.stem, []).append(path)

    def of(self, instance: str, where: str) -> list[dict[str, Any]]:
        """The right results of a question, any of which will do: `names`, `columns` of texts or nulls, `ignore_order`."""
        rule = self._rules.get(instance)
        if rule is None:
            raise DataError(f"{where}: {self._standard} has no line for instance_id {instance!r}")
        files = self._files.get(instance, [])
        if not files:
            raise DataError(f"{where}: {self._folder} has no {instance}.csv")
        columns, ignore = self._spread(rule, len(files), where)
        return [_read_result(path, columns[i], ignore[i]) for i, path in enumerate(files)]

    def _spread(self, rule: dict[str, Any], count: int, where: str) -> tuple[list[list[int]], list[bool]]:
        """Columns and order for each of `count` results; one list or value stands for all."""
        columns, ignore = rule.get("condition_cols") or [], rule.get("ignore_order", False)
        nested = isinstance(columns, list) and bool(columns) and all(isinstance(c, list) for c in columns)
        per_file = columns if nested else [columns]
        orders = ignore if isinstance(ignore, list) else [ignore]
        per_file, orders = (v * count if len(v) == 1 else v for v in (per_file, orders))
        numbers = all(isinstance(part, list) and all(type(c) is int for c in part) for part in per_file)
        if (
            not numbers
            or len(per_file) != count
            or len(orders) != count
            or not all(isinstance(o, bool) for o in orders)
        ):
            raise DataError(
                f"{where}: {self._standard} does not fit its {count} results: condition_cols {columns!r}, "
                f"ignore_order {ignore!r}"
            )
        return per_file, orders


def _read_standard(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; it says which columns of a result count")
    rules = {}
    for number, rule in json_lines(path):
        if "instance_id" not in rule:
            raise DataError(f"{path}:{number}: field instance_id is missing")
        rules[str(rule["instance_id"])] = rule
    return rules


def _read_result(path: Path, columns: list[int], ignore_order: bool) -> dict[str, Any]:
    try:
        with field_limit(), path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file, strict=True) if row]
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise DataError(f"{path}: cannot be read as CSV: {error}") from None
    if not rows:
        raise DataError(f"{path}: is empty; expected a line of column names")
    names, *body = rows
    for number, row in enumerate(body, 2):
        if len(row) != len(names):
            raise DataError(f"{path}: line {number}: {len(row)} cells under {len(names)} column names")
    chosen = columns or list(range(len(names)))
    if max(chosen) >= len(names) or min(chosen) < 0:
        raise DataError(f"{path}: has {len(names)} columns, but column {max(chosen)} counts")
    return {
        "names": [names[i] for i in chosen],
        "columns": [[row[i] for row in body] for i in chosen],
        "ignore_order": ignore_order,
    }
