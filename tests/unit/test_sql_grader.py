"""Grading: the documented verdicts, and a slow obvious version that must always agree."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.sql import Executor, Result, grader

NEAR = 1 + 0.7e-6  # within the tolerance; two of these steps are not


def ok(*rows: tuple[object, ...], columns: int | None = None) -> Result:
    width = columns if columns is not None else len(rows[0])
    return Result("ok", tuple(f"c{i}" for i in range(width)), list(rows))


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
def test_cells(predicted: object, gold: object, same: bool) -> None:
    assert grader.same_cell(predicted, gold) is same
    for ordered in (True, False):
        assert grader.same_rows([(predicted, 0.5)], [(gold, 0.5)], ordered) is same


def test_rows_are_a_multiset_and_columns_are_in_order() -> None:
    gold = ok((1, "a"), (2, "b"))
    assert grader.correct(ok((2, "b"), (1, "a")), gold, "SELECT x, y FROM t")
    assert not grader.correct(ok((2, "b"), (1, "a")), gold, "SELECT x, y FROM t ORDER BY x")
    assert grader.correct(ok((1, "a"), (2, "b")), gold, "SELECT x, y FROM t ORDER BY x")
    assert not grader.correct(ok(("a", 1), ("b", 2)), gold, "SELECT x, y FROM t")
    assert not grader.correct(ok((1, "a"), (2, "b"), (2, "b")), gold, "SELECT x, y FROM t")  # a missing DISTINCT
    assert not grader.correct(ok((1, "a"), (1, "a")), gold, "SELECT x, y FROM t")
    assert not grader.correct(ok((1,), (2,)), gold, "SELECT x, y FROM t")


def test_empty_results_need_as_many_columns() -> None:
    assert grader.correct(ok(columns=2), ok(columns=2), "SELECT a, b FROM t")
    assert not grader.correct(ok(columns=1), ok(columns=2), "SELECT a, b FROM t")
    assert not grader.correct(ok(columns=0), ok(columns=0), "SELECT a, b FROM t")


@pytest.mark.parametrize("status", ["error", "timeout", "denied"])
def test_a_failed_query_is_never_correct(status: str) -> None:
    assert not grader.correct(Result(status, ("c0",)), ok(columns=1), "SELECT a FROM t")


def test_a_part_of_a_result_is_not_graded() -> None:
    part = Result("ok", ("c0",), [(1,)], truncated=True)
    assert not grader.correct(part, ok((1,)), "SELECT a FROM t")


@pytest.mark.parametrize(
    ("sql", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order \n  by a limit 3;", True),
        ("SELECT a FROM t ORDER /* so */ BY a", True),
        ("SELECT a FROM t UNION SELECT b FROM t ORDER BY 1", True),
        ("WITH x AS (SELECT a FROM t) SELECT a FROM x ORDER BY a", True),
        ("SELECT a FROM t", False),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a LIMIT 3)", False),
        ("WITH x AS (SELECT a FROM t ORDER BY a) SELECT a FROM x", False),
        ("SELECT rank() OVER (ORDER BY a) FROM t", False),
        ("SELECT a FROM t WHERE b = 'x ORDER BY y'", False),
        ('SELECT "order by" FROM t -- ORDER BY a', False),
        ("SELECT a FROM t /* ORDER BY a */", False),
        ("SELECT a FROM t WHERE a IN (SELECT b FROM u ORDER BY b)", False),
        ("SELECT '", False),
    ],
)
def test_only_the_outermost_order_by_counts(sql: str, ordered: bool) -> None:
    assert grader.is_ordered(sql) is ordered


def test_near_rows_are_paired_off_even_where_sorting_misleads() -> None:
    gold = [(1.0, 5), (NEAR, 9)]
    assert grader.same_rows([(NEAR, 5), (1.0, 9)], gold, ordered=False)
    assert not grader.same_rows([(NEAR, 5), (1.0, 8)], gold, ordered=False)


def test_many_near_rows_end_quickly_and_rightly() -> None:
    noise = random.Random(0)
    gold = [(noise.random(), noise.randint(0, 3), "x") for _ in range(5000)]
    moved = [(a * (1 + noise.uniform(-4e-7, 4e-7)), b, c) for a, b, c in gold]
    noise.shuffle(moved)
    assert grader.same_rows(moved, gold, ordered=False)
    moved[17] = (moved[17][0] * 1.01, *moved[17][1:])
    assert not grader.same_rows(moved, gold, ordered=False)


def obvious(predicted: list[tuple[object, ...]], gold: list[tuple[object, ...]]) -> bool:
    def same(a: object, b: object) -> bool:
        if isinstance(a, int | float) and isinstance(b, int | float):
            return a == b if isinstance(a, int) and isinstance(b, int) else abs(a - b) <= 1e-6 * max(abs(a), abs(b))
        return type(a) is type(b) and a == b

    return len(predicted) == len(gold) and any(
        all(len(p) == len(g) and all(map(same, p, g)) for p, g in zip(order, gold, strict=True))
        for order in itertools.permutations(predicted)
    )


CELLS = st.sampled_from([None, 0, 1, 1.0, NEAR, NEAR * NEAR, 1 / NEAR, 2, "1", "a", b"a", 0.0])
ROWS = st.integers(1, 2).flatmap(lambda width: st.lists(st.tuples(*[CELLS] * width), max_size=5))


@settings(max_examples=120, deadline=None)
@given(ROWS, ROWS, st.randoms(use_true_random=False))
def test_agrees_with_trying_all_orders(rows: list, others: list, dice: random.Random) -> None:
    shuffled = dice.sample(rows, len(rows))
    steps = {1: [1, 1.0, NEAR, 1 / NEAR], NEAR: [NEAR, 1.0, NEAR * NEAR]}
    moved = [
        tuple(dice.choice(steps.get(c, [c])) if isinstance(c, int | float) else c for c in row) for row in shuffled
    ]
    for predicted in (others, shuffled, moved):
        assert grader.same_rows(predicted, rows, ordered=False) == obvious(predicted, rows)
        in_order = len(predicted) == len(rows) and all(obvious([p], [g]) for p, g in zip(predicted, rows, strict=True))
        assert grader.same_rows(predicted, rows, ordered=True) == in_order


ANY_CELL = st.one_of(
    st.none(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=5), st.binary(max_size=5)
)
ANY_ROWS = st.lists(st.lists(ANY_CELL, max_size=3).map(tuple), max_size=8)


@settings(max_examples=100, deadline=None)
@given(ANY_ROWS, ANY_ROWS, st.booleans())
def test_any_rows_get_a_verdict(left: list, right: list, ordered: bool) -> None:
    assert grader.same_rows(left, right, ordered) == grader.same_rows(right, left, ordered)
    if not any(cell != cell for row in left for cell in row):
        assert grader.same_rows(left, list(left), ordered)
        assert grader.same_rows(left[::-1], left, ordered=False)


def test_real_gold_queries_are_correct_answers_to_themselves(shared_dir: Path) -> None:
    devset = shared_dir / "data" / "devset"
    rows = [json.loads(line) for line in (devset / "questions.jsonl").read_text().splitlines()]
    sample = random.Random(1).sample(rows, 200)
    requests = [(row["db_id"], row["gold_sql"]) for row in sample]
    with Executor(devset / "databases") as executor:
        predicted, gold = executor.run_many(requests, whole=True), executor.run_many(requests, whole=True)
        one_row_more = executor.run_many(
            [(d, f"SELECT * FROM ({q.rstrip('; ')}) UNION ALL SELECT * FROM ({q.rstrip('; ')})") for d, q in requests],
            whole=True,
        )
    verdicts = [grader.correct(p, g, row["gold_sql"]) for p, g, row in zip(predicted, gold, sample, strict=True)]
    assert [row["id"] for row, verdict in zip(sample, verdicts, strict=True) if not verdict] == []
    doubled = [grader.correct(p, g, row["gold_sql"]) for p, g, row in zip(one_row_more, gold, sample, strict=True)]
    assert not any(doubled)
