"""Equality of rows: the documented cases, and slow obvious versions that must always agree."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.sql import rows as equality

NEAR = 1 + 0.7e-6  # within the tolerance; two of these steps are not

Rows = list[tuple[Any, ...]]


@pytest.mark.parametrize(
    ("predicted", "gold", "same"),
    [
        (1, 1, True),
        (1, 1.0, True),
        (1, 2, False),
        (1.0, 1.0000005, True),
        (1.0, 1.00001, False),
        (1000000, 1000001, False),  # integers are exact
        (1000000, 1000000.5, True),
        (0.0, 1e-300, False),
        (float("inf"), float("inf"), True),
        (float("inf"), 1e308, False),
        (2**62, 2**62 + 1, False),
        ("1", 1, False),
        ("1.0", 1.0, False),
        ("a", "A", False),
        ("a", "a ", False),
        ("a", b"a", False),
        (b"\x00", b"\x00", True),
        (None, None, True),
        (None, 0, False),
        (None, "", False),
        (None, "None", False),
        ("number", 1, False),
    ],
)
def test_cells(predicted: Any, gold: Any, same: bool) -> None:
    assert equality.same_cell(predicted, gold) is same
    for ordered in (True, False):
        assert equality.same_rows([(predicted, 0.5)], [(gold, 0.5)], ordered) is same
        assert equality.same_rows([(0.5, predicted)], [(gold, 0.5)], ordered, column_permutation=True) is same


def test_near_rows_are_paired_off_even_where_sorting_misleads() -> None:
    gold = [(1.0, 5), (NEAR, 9)]
    assert equality.same_rows([(NEAR, 5), (1.0, 9)], gold, ordered=False)
    assert not equality.same_rows([(NEAR, 5), (1.0, 8)], gold, ordered=False)


def test_many_near_rows_end_quickly_and_rightly() -> None:
    noise = random.Random(0)
    gold: Rows = [(noise.random(), noise.randint(0, 3), "x") for _ in range(5000)]
    moved: Rows = [(a * (1 + noise.uniform(-4e-7, 4e-7)), b, c) for a, b, c in gold]
    turned = [(c, a, b) for a, b, c in moved]
    assert equality.same_rows(turned, gold, ordered=True, column_permutation=True)
    noise.shuffle(moved)
    noise.shuffle(turned)
    assert equality.same_rows(moved, gold, ordered=False)
    assert equality.same_rows(turned, gold, ordered=False, column_permutation=True)
    assert not equality.same_rows(turned, gold, ordered=True, column_permutation=True)
    moved[17] = (moved[17][0] * 1.01, *moved[17][1:])
    assert not equality.same_rows(moved, gold, ordered=False)


def test_equal_columns_may_still_pair_other_rows() -> None:
    gold = [(1, 1), (2, 2)]
    assert not equality.same_rows([(1, 2), (2, 1)], gold, ordered=False, column_permutation=True)
    assert equality.same_rows([(2, 2), (1, 1)], gold, ordered=False, column_permutation=True)


def test_an_integer_does_not_stand_for_the_float_of_its_value() -> None:
    big = 10_000_000
    gold = [(big + 1, big + 0.5)]  # the first equals no other integer, the second equals both
    assert equality.same_rows([(float(big), big)], gold, ordered=False, column_permutation=True)
    assert equality.same_rows([(big, float(big))], gold, ordered=False, column_permutation=True)
    assert not equality.same_rows([(big, big)], gold, ordered=False, column_permutation=True)


@pytest.mark.parametrize("width", [2, 12, 300])
def test_columns_made_to_look_alike_end_quickly(width: int) -> None:
    dice = random.Random(width)
    values = list(range(60))
    columns = [dice.sample(values, 60) for _ in range(width)]
    gold = list(zip(*columns, strict=True))
    order = dice.sample(range(width), width)
    turned: Rows = [tuple(row[i] for i in order) for row in gold]
    assert equality.same_rows(turned, gold, ordered=True, column_permutation=True)
    columns[-1] = dice.sample(values, 60)
    other = list(zip(*columns, strict=True))
    assert not equality.same_rows(dice.sample(other, 60), gold, ordered=False, column_permutation=True)


def test_a_wide_shuffled_result_is_still_found() -> None:
    dice = random.Random(3)
    gold: Rows = [tuple(dice.randint(0, 9) for _ in range(30)) for _ in range(200)]
    order = dice.sample(range(30), 30)
    turned: Rows = dice.sample([tuple(row[i] for i in order) for row in gold], 200)
    assert equality.same_rows(turned, gold, ordered=False, column_permutation=True)
    turned[0] = (*turned[0][:-1], 77)
    assert not equality.same_rows(turned, gold, ordered=False, column_permutation=True)


def obvious_cell(a: Any, b: Any) -> bool:
    if isinstance(a, int | float) and isinstance(b, int | float):
        return a == b if isinstance(a, int) and isinstance(b, int) else abs(a - b) <= 1e-6 * max(abs(a), abs(b))
    return type(a) is type(b) and a == b


def obvious_list(predicted: Rows, gold: Rows) -> bool:
    return len(predicted) == len(gold) and all(
        len(p) == len(g) and all(map(obvious_cell, p, g)) for p, g in zip(predicted, gold, strict=True)
    )


def obvious(predicted: Rows, gold: Rows, ordered: bool, column_permutation: bool) -> bool:
    """Tries every order of columns and every order of rows."""
    width = len(predicted[0]) if predicted else 0
    columns = itertools.permutations(range(width)) if column_permutation else [tuple(range(width))]
    turned = [[tuple(row[i] for i in order) for row in predicted] for order in columns]
    if ordered:
        return any(obvious_list(rows, gold) for rows in turned)
    return any(obvious_list(list(order), gold) for rows in turned for order in itertools.permutations(rows))


CELLS = st.sampled_from([None, 0, 1, 1.0, NEAR, NEAR * NEAR, 1 / NEAR, 2, "1", "a", b"a", 0.0])


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Rows, Rows]:
    """Gold rows, and rows that are others, or the same ones with rows, columns and digits moved."""
    width = draw(st.integers(1, 3))
    one = st.lists(st.tuples(*[CELLS] * width), max_size=4)
    gold, predicted = draw(one), draw(one)
    if draw(st.booleans()):
        order = draw(st.permutations(range(width)))
        steps = {1: [1, 1.0, NEAR, 1 / NEAR], NEAR: [NEAR, 1.0, NEAR * NEAR]}
        predicted = [
            tuple(draw(st.sampled_from(steps.get(row[i], [row[i]]))) for i in order)
            for row in draw(st.permutations(gold))
        ]
    return predicted, gold


@settings(max_examples=300, deadline=None)
@given(pairs(), st.booleans(), st.booleans())
def test_agrees_with_trying_everything(pair: tuple[Rows, Rows], ordered: bool, column_permutation: bool) -> None:
    predicted, gold = pair
    expected = obvious(predicted, gold, ordered, column_permutation)
    assert equality.same_rows(predicted, gold, ordered, column_permutation) == expected


ANY_CELL = st.one_of(
    st.none(), st.integers(-(10**300), 10**300), st.floats(), st.text(max_size=5), st.binary(max_size=5)
)
ANY_ROWS = st.lists(st.lists(ANY_CELL, max_size=3).map(tuple), max_size=8)


@settings(max_examples=150, deadline=None)
@given(ANY_ROWS, ANY_ROWS, st.booleans(), st.booleans())
def test_any_rows_get_a_verdict(left: Rows, right: Rows, ordered: bool, permuted: bool) -> None:
    verdict = equality.same_rows(left, right, ordered, permuted)
    assert verdict == equality.same_rows(right, left, ordered, permuted)
    if not any(cell != cell for row in left for cell in row):
        assert equality.same_rows(left, list(left), ordered, permuted)
        assert equality.same_rows(left[::-1], left, False, permuted)
