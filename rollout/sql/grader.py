"""Whether two results are the same answer. Pure functions; nothing is run here.

Results are equal if they have as many columns and the same rows: in order where the gold's outermost query orders, else
as a multiset, so a missing DISTINCT or a doubled row is wrong. Cells are equal if both are NULL, both the same text or the
same bytes, or both numbers: integers exactly, anything with a float to 1e-6 relative. Text is never a number. Column names
don't matter, their order does.

Left out: BIRD's set comparison and the Spider test suite, which are other measures and not a reward's business.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence

from sqlglot import tokenize
from sqlglot.errors import SqlglotError
from sqlglot.tokens import TokenType

from rollout.sql.executor import Result
from rollout.sql.observation import Cell

RELATIVE = 1e-6
MAX_COMPARISONS = 200_000  # of rows, where nearly equal floats have to be paired off

NUMBER = ()  # marks a number's place among the cells that have to be equal exactly

Row = tuple[Cell, ...]
Numbers = tuple[int | float, ...]
Key = tuple[Cell | tuple[()], ...]


def correct(predicted: Result, gold: Result, gold_sql: str) -> bool:
    """Whether a prediction's whole result is the gold's. A prediction that failed or returned no columns never is."""
    if predicted.status != "ok" or gold.status != "ok" or predicted.truncated or gold.truncated:
        return False
    if not predicted.columns or len(predicted.columns) != len(gold.columns):
        return False
    return same_rows(predicted.rows, gold.rows, is_ordered(gold_sql))


def same_rows(predicted: Sequence[Row], gold: Sequence[Row], ordered: bool) -> bool:
    """Whether the rows are equal: pairwise in order, or paired off in some way."""
    if len(predicted) != len(gold):
        return False
    if ordered:
        return all(map(same_row, predicted, gold))
    if Counter(predicted) == Counter(gold):  # 1 and 1.0 hash alike, as they should
        return True
    if not _has_float(predicted) and not _has_float(gold):
        return False
    left, right = _by_exact_part(predicted), _by_exact_part(gold)
    if {key: len(rows) for key, rows in left.items()} != {key: len(rows) for key, rows in right.items()}:
        return False
    return all(_can_pair(left[key], right[key]) for key in left)


def same_row(left: Row, right: Row) -> bool:
    """Whether two rows are equal, cell by cell."""
    return len(left) == len(right) and all(map(same_cell, left, right))


def same_cell(left: Cell, right: Cell) -> bool:
    """Whether two cells are equal (see the head of this file)."""
    if isinstance(left, int | float) and isinstance(right, int | float):
        exact = isinstance(left, int) and isinstance(right, int)
        return left == right if exact else math.isclose(left, right, rel_tol=RELATIVE)
    return type(left) is type(right) and left == right


@functools.lru_cache(maxsize=65536)
def is_ordered(sql: str) -> bool:
    """Whether the outermost query has an ORDER BY: one outside of every parenthesis, in SQLite's grammar."""
    try:
        tokens = tokenize(sql, read="sqlite")
    except SqlglotError:
        return False
    depth = 0
    for index, token in enumerate(tokens):
        depth += (token.token_type == TokenType.L_PAREN) - (token.token_type == TokenType.R_PAREN)
        if depth == 0 and token.token_type == TokenType.ORDER_BY:
            return True
        if depth == 0 and token.token_type == TokenType.VAR and token.text.lower() == "order":  # ORDER /* */ BY
            return index + 1 < len(tokens) and tokens[index + 1].text.lower() == "by"
    return False


def _has_float(rows: Sequence[Row]) -> bool:
    return any(isinstance(cell, float) for row in rows for cell in row)


def _by_exact_part(rows: Sequence[Row]) -> dict[Key, list[Numbers]]:
    """Numbers of the rows, grouped by everything else; numbers leave their place marked."""
    groups: dict[Key, list[Numbers]] = defaultdict(list)
    for row in rows:
        key = tuple(NUMBER if isinstance(cell, int | float) else cell for cell in row)
        groups[key].append(tuple(cell for cell in row if isinstance(cell, int | float)))
    return groups


def _can_pair(left: list[Numbers], right: list[Numbers]) -> bool:
    """Whether a one-to-one pairing of nearly equal rows exists. Nearness isn't transitive, so this is a matching problem.

    Pairing in sorted order nearly always succeeds. Where it doesn't, augmenting paths (Kuhn) decide; past
    MAX_COMPARISONS the answer is no, which takes thousands of rows that differ by less than the tolerance.
    """
    left, right = sorted(left), sorted(right)
    if all(map(same_row, left, right)):
        return True
    neighbours = _neighbours(left, right)
    if neighbours is None or not all(neighbours):
        return False
    owner: dict[int, int] = {}
    return all(_augment(node, neighbours, owner) for node in range(len(left)))


def _neighbours(left: list[Numbers], right: list[Numbers]) -> list[list[int]] | None:
    """For each row on the left the nearly equal ones on the right; None if there is too much to compare. Both sorted."""
    first = [row[0] for row in right]
    result: list[list[int]] = []
    comparisons = 0
    for row in left:
        margin = 2 * RELATIVE * abs(row[0])
        low, high = bisect_left(first, row[0] - margin), bisect_right(first, row[0] + margin)
        comparisons += high - low
        if comparisons > MAX_COMPARISONS:
            return None
        result.append([index for index in range(low, high) if same_row(row, right[index])])
    return result


def _augment(start: int, neighbours: list[list[int]], owner: dict[int, int]) -> bool:
    """Finds a place on the right for `start`, moving others if need be (breadth first). `owner`: place → left row."""
    reached_by: dict[int, int] = {}  # place → left row
    home = {start: -1}  # left row → the place it would give up
    queue = [start]
    for node in queue:
        for place in neighbours[node]:
            if place in reached_by:
                continue
            reached_by[place] = node
            if place in owner:
                home[owner[place]] = place
                queue.append(owner[place])
                continue
            while place >= 0:  # back along the path: everyone moves one place on
                owner[place] = reached_by[place]
                place = home[owner[place]]
            return True
    return False
