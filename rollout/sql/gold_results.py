"""Compares what a query returned with published results, as the evaluation of Spider 2 does.

A result is right when each column that counts is found among the predicted columns, in any place and under any name; more
columns do no harm. Numbers may differ by 0.01; cells are compared as they read in a CSV file, where a column of numerals is
numbers and an empty cell is no value. Where order does not count, columns are sorted one by one, as published: two columns
that are right apart count even if their rows do not belong together. Left out: what makes a published script fail
(unhashable mixtures), which here is simply unequal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rollout.errors import InfrastructureError
from rollout.types import Task

TOLERANCE = 1e-2
NO_VALUE = frozenset(
    (
        *("", "NA", "N/A", "n/a", "NaN", "-NaN", "nan", "-nan", "NULL", "null", "None", "<NA>"),
        *("#NA", "#N/A", "#N/A N/A", "-1.#IND", "-1.#QNAN", "1.#IND", "1.#QNAN"),
    )
)
"""Texts that the published evaluation reads as no value."""

Cell = float | str | None


def of(task: Task) -> list[dict[str, Any]]:
    """The right results of a task, any of which will do; none when it is graded by SQL. Raises InfrastructureError."""
    golds = task.fields.get("gold_results")
    if golds is None:
        return []
    if not isinstance(golds, list) or not golds or not all(_is_result(gold) for gold in golds):
        raise InfrastructureError(
            f"task {task.id}: field gold_results: expected a list of objects with `columns`, lists of texts or nulls of one "
            "length, and `ignore_order`, true or false"
        )
    return golds


def matches(rows: Sequence[Sequence[Any]], golds: Sequence[dict[str, Any]]) -> bool:
    """Whether `rows` is any of the right results: `columns` of texts, `ignore_order`."""
    predicted = [_column([_text(cell) for cell in column]) for column in zip(*rows, strict=True)]
    return any(_is(predicted, gold) for gold in golds)


def _is_result(gold: Any) -> bool:
    columns = gold.get("columns") if isinstance(gold, dict) else None
    return (
        isinstance(columns, list)
        and len(columns) > 0
        and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns)
        and all(cell is None or isinstance(cell, str) for column in columns for cell in column)
        and isinstance(gold.get("ignore_order"), bool)
    )


def _is(predicted: list[list[Cell]], gold: dict[str, Any]) -> bool:
    ignore_order = bool(gold["ignore_order"])
    candidates = [sorted(column, key=_key) for column in predicted] if ignore_order else predicted
    for texts in gold["columns"]:
        wanted = _column(texts)
        if ignore_order:
            wanted.sort(key=_key)
        if wanted and not any(_equal(wanted, column) for column in candidates):
            return False
        if not wanted and any(candidates):
            return False
    return True


def _equal(left: list[Cell], right: list[Cell]) -> bool:
    return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))


def _same(a: Cell, b: Cell) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, abs_tol=TOLERANCE)
    return a == b


def _column(texts: Sequence[str | None]) -> list[Cell]:
    """Numbers if every cell with a value reads as one, otherwise texts."""
    present = [None if text is None or text in NO_VALUE else text for text in texts]
    numbers = [None if text is None else _number(text) for text in present]
    if all(number is not None for number, text in zip(numbers, present, strict=True) if text is not None):
        return list(numbers)
    return list(present)


def _number(text: str) -> float | None:
    if text in ("True", "False"):
        return float(text == "True")
    if "_" in text:
        return None
    try:
        number = float(text)
    except ValueError:
        return None
    return None if math.isnan(number) else number


def _text(cell: Any) -> str | None:
    return None if cell is None else str(cell)


def _key(cell: Cell) -> tuple[int, float, str]:
    if cell is None:
        return (2, 0.0, "")
    return (0, cell, "") if isinstance(cell, float) else (1, 0.0, cell)
