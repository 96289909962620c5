"""When two lists of rows are equal: cell by cell, in order or as multisets, in the given order of columns or in some.

Cells are equal if both are NULL, both the same text or the same bytes, or both numbers: integers exactly, anything with a
float to 1e-6 relative. Text is never a number. Nearness of floats is not transitive, so comparing multisets of rows is a
matching problem; and comparing in some order of columns is a search. Both are exact up to a bound of work, past which the
answer is no: it takes thousands of rows that differ by less than the tolerance, or columns made to look alike.
"""

from __future__ import annotations

import functools
import itertools
import math
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

from rollout.sql.observation import Cell

RELATIVE = 1e-6
MAX_COMPARISONS = 200_000  # of rows, where nearly equal floats have to be paired off
MAX_COLUMN_CELLS = 2_000_000  # compared in the search for an order of columns

NUMBER = ()  # marks a number's place among the cells that have to be equal exactly

Row = tuple[Cell, ...]
Rows = Sequence[Row]
Numbers = tuple[int | float, ...]
Key = tuple[Cell | tuple[()], ...]
Same = Callable[[Rows, Rows], bool]


def same_rows(
    predicted: Rows, gold: Rows, ordered: bool, column_permutation: bool = False, runs: Sequence[int] | None = None
) -> bool:
    """Whether the rows are equal: pairwise in order, or paired off in some way; if asked, in some order of columns.

    `runs` divides the gold's rows, in order, into runs of that many rows each; inside of a run any order will do.
    """
    if len(predicted) != len(gold):
        return False
    same: Same = same_list if ordered else same_multiset
    if ordered and runs is not None:
        same, ordered = functools.partial(_same_in_runs, runs), False
    if same(predicted, gold):
        return True
    if not column_permutation:
        return False
    exact = not _has_float(predicted) and not _has_float(gold)
    return same_in_some_column_order(predicted, gold, ordered, same, exact)


def _same_in_runs(runs: Sequence[int], predicted: Rows, gold: Rows) -> bool:
    edges = [0, *itertools.accumulate(runs)]
    return all(same_multiset(predicted[i:j], gold[i:j]) for i, j in itertools.pairwise(edges))


def tied_runs(gold: Rows, upwards: Rows, downwards: Rows) -> list[int] | None:
    """The runs of rows that an order leaves open, from two results whose ties are broken in opposite ways.

    A run ends where as many first rows of both are the same multiset. None if the three are not the same rows, in these
    runs: then the ties say nothing about the gold.
    """
    if not len(gold) == len(upwards) == len(downwards):
        return None
    runs, start = [], 0
    difference: Counter[Row] = Counter()
    for end, (up, down) in enumerate(zip(upwards, downwards, strict=True), 1):
        for row, step in ((up, 1), (down, -1)):
            difference[row] += step
            if not difference[row]:
                del difference[row]
        if not difference:
            runs.append(end - start)
            start = end
    return runs if start == len(gold) and _same_in_runs(runs, upwards, gold) else None


def same_list(predicted: Rows, gold: Rows) -> bool:
    """Whether the rows are equal one by one."""
    return len(predicted) == len(gold) and all(map(same_row, predicted, gold))


def same_row(left: Row, right: Row) -> bool:
    """Whether two rows are equal, cell by cell."""
    return len(left) == len(right) and all(map(same_cell, left, right))


def same_cell(left: Cell, right: Cell) -> bool:
    """Whether two cells are equal (see the head of this file)."""
    if isinstance(left, int | float) and isinstance(right, int | float):
        exact = isinstance(left, int) and isinstance(right, int)
        return left == right if exact else math.isclose(left, right, rel_tol=RELATIVE)
    return type(left) is type(right) and left == right


def same_multiset(predicted: Rows, gold: Rows) -> bool:
    """Whether the rows can be paired off so that both of each pair are equal."""
    if len(predicted) != len(gold):
        return False
    if Counter(predicted) == Counter(gold):  # 1 and 1.0 hash alike, as they should
        return True
    if not _has_float(predicted) and not _has_float(gold):
        return False
    left, right = _by_exact_part(predicted), _by_exact_part(gold)
    if {key: len(rows) for key, rows in left.items()} != {key: len(rows) for key, rows in right.items()}:
        return False
    return all(_can_pair(left[key], right[key]) for key in left)


def same_in_some_column_order(predicted: Rows, gold: Rows, ordered: bool, same: Same, exact: bool) -> bool:
    """Whether the predicted columns can be put into an order in which the rows are the `same` as the gold's.

    In order, each column stands for itself and a matching of equal columns decides; otherwise columns are added one by
    one as long as the rows so far are equal. `exact`: no rows are the same but equal ones.
    """
    if len(predicted) != len(gold) or len({len(row) for row in (*predicted, *gold)}) > 1:
        return False
    left, right = list(zip(*predicted, strict=True)), list(zip(*gold, strict=True))
    if Counter(left) == Counter(right):
        return True
    try:
        search = _ColumnSearch(left, right, same, exact)
        return _matching(search.places) if ordered else search.run()
    except _TooMuch:
        return False


class _TooMuch(Exception):
    """The search has compared MAX_COLUMN_CELLS."""


class _ColumnSearch:
    """Which of the columns on the left may stand for each on the right (`places`), and whether all can do so at once."""

    def __init__(self, left: list[Row], right: list[Row], same: Same, exact: bool) -> None:
        self._left, self._right, self._same = left, right, same
        self._cells = 0
        looks = [_looks(column, exact) for column in left]
        self.places: list[list[int]] = []
        for number, wanted in enumerate(right):
            look = _looks(wanted, exact)
            self.places.append([j for j in range(len(left)) if looks[j] == look and self._equal([j], [number])])

    def run(self) -> bool:
        """Depth first over the right side, where there are the fewest places first; equal columns are tried once."""
        order = sorted(range(len(self._right)), key=lambda i: len(self.places[i]))
        chosen: list[int] = []
        levels = [self._different(self.places[order[0]])]
        while levels:
            place = next(levels[-1], None)
            if place is None:
                levels.pop()
                if chosen:
                    chosen.pop()
            elif self._equal([*chosen, place], order[: len(levels)]):
                if len(levels) == len(order):
                    return True
                chosen.append(place)
                levels.append(self._different([j for j in self.places[order[len(levels)]] if j not in chosen]))
        return False

    def _equal(self, left: list[int], right: list[int]) -> bool:
        self._cells += len(left) * len(self._left[0])
        if self._cells > MAX_COLUMN_CELLS:
            raise _TooMuch
        mine, wanted = (self._left[j] for j in left), (self._right[i] for i in right)
        return self._same(list(zip(*mine, strict=True)), list(zip(*wanted, strict=True)))

    def _different(self, places: list[int]) -> Iterator[int]:
        """The places without those whose column is, types and all, an earlier one's."""
        first: dict[tuple[Row, tuple[type, ...]], int] = {}
        for place in places:
            column = self._left[place]
            first.setdefault((column, tuple(map(type, column))), place)
        return iter(first.values())


def _looks(column: Row, exact: bool) -> tuple[int, int]:
    """Cheap to compare, and alike for columns that are the same in any order. Numbers only count, unless `exact`."""
    known = Counter(cell for cell in column if exact or not isinstance(cell, int | float))
    return sum(known.values()), hash(frozenset(known.items()))


def _has_float(rows: Rows) -> bool:
    return any(isinstance(cell, float) for row in rows for cell in row)


def _by_exact_part(rows: Rows) -> dict[Key, list[Numbers]]:
    """Numbers of the rows, grouped by everything else; numbers leave their place marked."""
    groups: dict[Key, list[Numbers]] = defaultdict(list)
    for row in rows:
        key = tuple(NUMBER if isinstance(cell, int | float) else cell for cell in row)
        groups[key].append(tuple(cell for cell in row if isinstance(cell, int | float)))
    return groups


def _can_pair(left: list[Numbers], right: list[Numbers]) -> bool:
    """Whether a one-to-one pairing of nearly equal rows exists.

    Pairing in sorted order nearly always succeeds. Where it doesn't, a matching decides.
    """
    left, right = sorted(left), sorted(right)
    if all(map(same_row, left, right)):
        return True
    neighbours = _neighbours(left, right)
    return neighbours is not None and _matching(neighbours)


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


def _matching(neighbours: list[list[int]]) -> bool:
    """Whether everyone gets one of their neighbours, each of whom goes to one only (augmenting paths, Kuhn)."""
    owner: dict[int, int] = {}
    return all(neighbours) and all(_augment(node, neighbours, owner) for node in range(len(neighbours)))


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
