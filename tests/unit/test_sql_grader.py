"""Grading: the documented verdicts of all gradings, the known wrong ones of others, votes, and slow obvious versions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rollout.sql import Result, grader

GRADINGS: list[grader.Grading] = ["rows", "bird_set", "spider_test_suite"]
PLAIN, SORTED = "SELECT x, y FROM t", "SELECT x, y FROM t ORDER BY x"

Rows = list[tuple[Any, ...]]


def ok(*rows: tuple[Any, ...], columns: int | None = None) -> Result:
    width = columns if columns is not None else len(rows[0])
    return Result("ok", tuple(f"c{i}" for i in range(width)), list(rows))


GOLD = ok((1, "a"), (2, "b"))


@pytest.mark.parametrize(
    ("predicted", "gold_sql", "verdicts"),  # in the order of GRADINGS
    [
        (ok((1, "a"), (2, "b")), PLAIN, (True, True, True)),
        (ok((1, "a"), (2, "b")), SORTED, (True, True, True)),
        (ok((2, "b"), (1, "a")), PLAIN, (True, True, True)),  # another order
        (ok((2, "b"), (1, "a")), SORTED, (False, True, False)),
        (ok((1, "a"), (2, "b"), (2, "b")), PLAIN, (False, True, False)),  # a row doubled
        (ok((1, "a"), (1, "a")), PLAIN, (False, False, False)),
        (ok(("a", 1), ("b", 2)), PLAIN, (False, False, True)),  # columns exchanged
        (ok(("a", 1), ("b", 2)), SORTED, (False, False, True)),
        (ok(("b", 1), ("a", 2)), PLAIN, (False, False, False)),
        (ok((1,), (2,)), PLAIN, (False, False, False)),  # a column less
        (ok((1, "a", 0), (2, "b", 0)), PLAIN, (False, False, False)),  # a column more
        (ok((1.0, "a"), (2, "b")), PLAIN, (True, True, True)),
        (ok((1.0000001, "a"), (2, "b")), PLAIN, (True, False, False)),
        (ok(("1", "a"), ("2", "b")), PLAIN, (False, False, False)),  # text is not a number
        (ok(columns=2), PLAIN, (False, False, False)),
        (ok((2, "b"), (1, "a")), "SELECT x, y FROM (SELECT * FROM t ORDER BY x)", (True, True, False)),
        (ok((2, "b"), (1, "a")), 'SELECT x, y AS "order by" FROM t', (True, True, False)),  # by text, as published
    ],
)
def test_verdicts(predicted: Result, gold_sql: str, verdicts: tuple[bool, ...]) -> None:
    for grading, verdict in zip(GRADINGS, verdicts, strict=True):
        assert grader.correct(predicted, GOLD, gold_sql, grading) is verdict, grading


def test_columns_may_be_exchanged_as_an_option() -> None:
    exchanged = ok(("b", 2.0000001), ("a", 1))
    assert grader.correct(exchanged, GOLD, PLAIN, column_permutation=True)
    assert not grader.correct(exchanged, GOLD, SORTED, column_permutation=True)
    assert grader.correct(ok(("a", 1), ("b", 2)), GOLD, SORTED, column_permutation=True)
    assert not grader.correct(ok(("a", 1), ("b", 2), ("b", 2)), GOLD, PLAIN, column_permutation=True)


def test_empty_results() -> None:
    verdicts = [grader.correct(ok(columns=1), ok(columns=2), PLAIN, grading) for grading in GRADINGS]
    assert verdicts == [False, True, True]
    assert all(grader.correct(ok(columns=2), ok(columns=2), PLAIN, grading) for grading in GRADINGS)


@pytest.mark.parametrize("grading", GRADINGS)
@pytest.mark.parametrize(
    "predicted",
    [
        *(Result(status, ("c0",)) for status in ("error", "timeout", "denied")),
        Result("ok", ()),  # a statement without columns, such as DELETE, when the gold is empty
        Result("ok", ("c0",), [], truncated=True),
    ],
)
def test_what_failed_or_is_no_query_or_a_part_is_never_correct(predicted: Result, grading: grader.Grading) -> None:
    assert not grader.correct(predicted, ok(columns=1), "SELECT a FROM t", grading)


@pytest.mark.parametrize("grading", GRADINGS)
def test_a_gold_that_failed_is_never_agreed_with(grading: grader.Grading) -> None:
    failed = Result("error", ("c0",))
    assert not grader.correct(ok(columns=1), failed, "SELECT a FROM t", grading)
    assert not grader.correct(failed, failed, "SELECT a FROM t", grading)


# The reference compares frozensets of rows. What it gets wrong, right here:


def test_the_reference_accepts_a_missing_distinct() -> None:
    assert not grader.correct(ok((1,), (1,), (2,)), ok((1,), (2,)), "SELECT DISTINCT a FROM t")


def test_the_reference_accepts_a_distinct_too_many() -> None:
    assert not grader.correct(ok((1,), (2,)), ok((1,), (1,), (2,)), "SELECT a FROM t")


def test_the_reference_accepts_any_order() -> None:
    assert not grader.correct(ok((2,), (1,)), ok((1,), (2,)), "SELECT a FROM t ORDER BY a")


def test_the_reference_accepts_a_join_that_doubles_rows() -> None:
    assert not grader.correct(ok(("x", 1), ("x", 1)), ok(("x", 1)), "SELECT a, b FROM t")


def test_the_reference_accepts_an_empty_result_of_other_columns() -> None:
    assert not grader.correct(ok(columns=3), ok(columns=1), "SELECT a FROM t WHERE a = 7")


def test_the_reference_refuses_the_same_mean_summed_in_another_order() -> None:
    assert grader.correct(ok((0.1 + 0.2,)), ok((0.3,)), "SELECT avg(a) FROM t")


@pytest.mark.parametrize(
    ("sql", "keep_distinct", "expected"),
    [
        ("SELECT DISTINCT a FROM t WHERE a > = 1", False, "SELECT  a FROM t WHERE a >= 1"),
        ("SELECT DISTINCT a FROM t WHERE a < = 1 OR a ! = 2", True, "SELECT DISTINCT a FROM t WHERE a <= 1 OR a != 2"),
        ("SELECT count(distinct a) FROM t", False, "SELECT count( a) FROM t"),
    ],
)
def test_the_test_suite_prepares_queries(sql: str, keep_distinct: bool, expected: str) -> None:
    assert grader.prepared(sql, keep_distinct) == expected


# Votes


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        (ok((1, "a"), (2, "b")), ok((2, "b"), (1, "a")), True),
        (ok((1, "a"), (2, "b")), ok((1, "a"), (2, "b"), (2, "b")), False),
        (ok((1,)), ok((1.0,)), True),
        (ok((1,)), ok(("1",)), False),
        (ok((None,)), ok(("None",)), False),
        (ok((None,)), ok(("",)), False),
        (ok(("a",)), ok((b"a",)), False),
        (ok(("a", "b")), ok(("a\x1fb",)), False),
        (ok(columns=1), ok(columns=2), False),
        (ok(columns=1), ok((None,)), False),
        (ok((0.1 + 0.2,)), ok((0.3,)), True),
        (ok((2.0,)), ok((1.9999999999,)), True),
        (ok((0.5,)), ok((0.49999999999999994,)), True),
        (ok((12345.65,)), ok((12345.650000000001,)), True),
        (ok((1234567.5,)), ok((1234567.4999999998,)), True),
        (ok((9.9999999999,)), ok((10,)), True),
        (ok((0.1,)), ok((0.09999999999999999,)), True),
        (ok((-2.5,)), ok((2.5,)), False),
        (ok((-0.0,)), ok((0,)), True),
        (ok((1000001,)), ok((1000002,)), False),  # integers stay exact
        (ok((123456789012.0,)), ok((123456789012,)), True),
        (ok((0.1234,)), ok((0.12345,)), False),
        (ok((float("inf"),)), ok((float("-inf"),)), False),
        (ok((1e300,)), ok((1e300,)), True),
        (ok((5e-324,)), ok((5e-324,)), True),
    ],
)
def test_fingerprints(left: Result, right: Result, equal: bool) -> None:
    assert (grader.fingerprint(left) == grader.fingerprint(right)) is equal
    assert len(grader.fingerprint(left)) == 16


def test_what_failed_has_no_fingerprint() -> None:
    assert grader.fingerprint(Result("error", ("a",))) == ""
    assert grader.fingerprint(Result("ok", ())) == ""
    assert grader.fingerprint(Result("ok", ("a",), [(1,)], truncated=True)) == ""


def test_columns_have_no_names_in_a_fingerprint() -> None:
    assert grader.fingerprint(Result("ok", ("a",), [(1,)])) == grader.fingerprint(Result("ok", ("b",), [(1,)]))


# Properties

EXACT = st.sampled_from([None, 0, 1, 1.0, 2, "1", "a", b"a", 2.5, 0.0])
SIZE = st.integers(1, 3)


def rows_of(width: int, cells: st.SearchStrategy[Any] = EXACT) -> st.SearchStrategy[Rows]:
    return st.lists(st.tuples(*[cells] * width), max_size=4)


@st.composite
def results(draw: st.DrawFn) -> tuple[Result, Result]:
    """A gold, and a prediction that is another or made from it by moving rows and columns and doubling a row."""
    width = draw(SIZE)
    gold = draw(rows_of(width))
    predicted = draw(rows_of(draw(st.sampled_from([width, width, 1]))))
    if draw(st.booleans()) and gold:
        order = draw(st.permutations(range(width)))
        predicted = [tuple(row[i] for i in order) for row in draw(st.permutations(gold))]
        predicted += predicted[:1] * draw(st.integers(0, 1))
    return ok(*predicted, columns=len(predicted[0]) if predicted else width), ok(*gold, columns=width)


def obvious_set(predicted: Rows, gold: Rows) -> bool:
    return all(row in gold for row in predicted) and all(row in predicted for row in gold)


def obvious_suite(predicted: Rows, gold: Rows, ordered: bool) -> bool:
    if not predicted and not gold:
        return True
    width = len(predicted[0]) if predicted else 0
    turned = [[tuple(row[i] for i in order) for row in predicted] for order in itertools.permutations(range(width))]
    if ordered:
        return gold in turned
    return any(gold == list(order) for rows in turned for order in itertools.permutations(rows))


@settings(max_examples=300, deadline=None)
@given(results(), st.sampled_from([PLAIN, SORTED]))
def test_published_measures_agree_with_trying_everything(pair: tuple[Result, Result], gold_sql: str) -> None:
    predicted, gold = pair
    mine, wanted = list(predicted.rows), list(gold.rows)
    assert grader.correct(predicted, gold, gold_sql, "bird_set") == obvious_set(mine, wanted)
    suite = obvious_suite(mine, wanted, gold_sql == SORTED)
    assert grader.correct(predicted, gold, gold_sql, "spider_test_suite") == suite


@settings(max_examples=200, deadline=None)
@given(results())
def test_without_near_numbers_equal_is_an_equal_fingerprint(pair: tuple[Result, Result]) -> None:
    predicted, gold = pair
    equal = grader.correct(predicted, gold, PLAIN)
    assert (grader.fingerprint(predicted) == grader.fingerprint(gold)) == equal


@settings(max_examples=300, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(-1e-13, 1e-13))
def test_sums_in_another_order_nearly_always_agree(value: float, noise: float) -> None:
    moved = value * (1 + noise)
    size = abs(value)
    assume(1e-290 < size < 1e12 and math.isfinite(moved))
    step = 10.0 ** max(grader.FINGERPRINT_DIGITS - 1 - math.floor(math.log10(size)), 0)
    edge = (size * step + grader.FINGERPRINT_OFFSET) % 1
    assume(1e-5 < edge < 1 - 1e-5)  # the documented edge
    assume(abs(value - round(value)) > 1e-9 * size or value == round(value))
    assert grader.fingerprint(ok((value,))) == grader.fingerprint(ok((moved,)))


ANY_CELL = st.one_of(
    st.none(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=5), st.binary(max_size=5)
)
ANY_ROWS = st.lists(st.lists(ANY_CELL, max_size=3).map(tuple), max_size=8)
ANY_RESULT = st.builds(
    Result, st.sampled_from(["ok", "error"]), st.lists(st.text(max_size=3), max_size=3).map(tuple), ANY_ROWS
)


@settings(max_examples=150, deadline=None)
@given(ANY_RESULT, ANY_RESULT, st.text(max_size=20), st.booleans())
def test_any_results_get_a_verdict(left: Result, right: Result, gold_sql: str, permuted: bool) -> None:
    for grading in GRADINGS:
        assert grader.correct(left, right, gold_sql, grading, permuted) in (True, False)
    assert isinstance(grader.fingerprint(left), str)
