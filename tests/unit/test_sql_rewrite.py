"""Queries written anew: ties and loose columns one way and the other, on a real database in memory."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

import pytest

from rollout.sql import rewrite, rows

SCHEMA = """
CREATE TABLE p (id INTEGER PRIMARY KEY, name TEXT, team TEXT, age INT);
INSERT INTO p VALUES (1, 'a', 'x', 20), (2, 'b', 'x', 30), (3, 'c', 'y', 30), (4, 'd', 'y', 40), (5, 'e', 'z', 50);
CREATE TABLE q (team TEXT, city TEXT);
INSERT INTO q VALUES ('x', 'Rome'), ('y', 'Rome'), ('z', 'Oslo');
"""


@pytest.fixture(scope="module")
def connection() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:")
    connection.executescript(SCHEMA)
    yield connection
    connection.close()


def chance(connection: sqlite3.Connection, pair: rewrite.Pair | None) -> bool | None:
    """Whether the two ways give other rows; None where there was nothing to write anew."""
    if pair is None:
        return None
    one, other = (connection.execute(sql).fetchall() for sql in pair)
    return not rows.same_multiset(one, other)


def width(connection: sqlite3.Connection, sql: str) -> int:
    return len(connection.execute(sql).description)


@pytest.mark.parametrize(
    ("sql", "differs"),
    [
        ("SELECT name FROM p ORDER BY age LIMIT 1", False),
        ("SELECT name FROM p ORDER BY age LIMIT 2", True),  # two are 30
        ("SELECT name FROM p ORDER BY age LIMIT 3", False),
        ("SELECT age FROM p ORDER BY age LIMIT 2", False),  # tied rows look the same
        ("SELECT * FROM p ORDER BY age DESC LIMIT 2 OFFSET 1", True),
        ("SELECT name FROM p LIMIT 2", True),  # no order at all
        ("SELECT name FROM p LIMIT 5", False),
        ("SELECT team FROM p GROUP BY team ORDER BY count(*) DESC LIMIT 1", True),
        ("SELECT team FROM p GROUP BY team ORDER BY count(*) LIMIT 1", False),
        ("SELECT DISTINCT age FROM p ORDER BY age LIMIT 2", False),
        ("SELECT name FROM p UNION SELECT city FROM q ORDER BY 1 LIMIT 2", False),
        ("SELECT name FROM p WHERE team = (SELECT team FROM p GROUP BY team ORDER BY count(*) DESC LIMIT 1)", True),
        (
            "SELECT count(*) FROM p WHERE team = (SELECT team FROM p GROUP BY team ORDER BY count(*) DESC LIMIT 1)",
            False,
        ),
        ("SELECT max(age) FROM (SELECT age FROM p ORDER BY age LIMIT 2)", False),
        ("WITH t AS (SELECT name FROM p ORDER BY age LIMIT 2) SELECT * FROM t", True),
        ("SELECT name FROM p WHERE EXISTS (SELECT 1 FROM q LIMIT 1)", False),
        ("SELECT name FROM p ORDER BY age", None),
        ("SELECT name FROM p WHERE name = 'limit'", None),
        ("SELECT name FROM (SELECT * FROM p LIMIT 1)", None),  # the width of the star is not known
        ("SELECT 'limit", None),
    ],
)
def test_limits(connection: sqlite3.Connection, sql: str, differs: bool | None) -> None:
    columns = width(connection, sql) if sql.count("'") % 2 == 0 else 1
    assert chance(connection, rewrite.limits_broken(sql, columns)) is differs


@pytest.mark.parametrize(
    ("sql", "differs"),
    [
        ("SELECT name, count(*) FROM p GROUP BY team", True),
        ("SELECT team, count(*) FROM p GROUP BY team", None),
        ("SELECT p.name, count(*) FROM p JOIN q ON p.team = q.team GROUP BY p.id", False),  # one row in each group
        ("SELECT q.city FROM p JOIN q ON p.team = q.team GROUP BY q.team", False),
        ("SELECT q.team FROM p JOIN q ON p.team = q.team GROUP BY q.city", True),
        ("SELECT name, max(age) FROM p GROUP BY team", None),  # of the oldest
        ("SELECT team AS t, sum(age) FROM p GROUP BY t", None),
        ("SELECT team, sum(age) FROM p GROUP BY 1 ORDER BY 2", None),
        ("SELECT upper(team), sum(age) AS s FROM p GROUP BY upper(team) HAVING s > 1 ORDER BY s", None),
        ("SELECT count(*), name FROM p", True),
        ("SELECT count(*), age > 10 FROM p", False),
        ("SELECT team FROM p GROUP BY team HAVING age > 25", True),
        ("SELECT team FROM p GROUP BY team ORDER BY age", False),  # the order may change, the rows don't
        ("SELECT max(age, 25), count(*) FROM p GROUP BY team", True),  # max of two is no aggregate
        ("SELECT name FROM p WHERE age > (SELECT avg(age) FROM p)", None),
        ("SELECT team, (SELECT count(*) FROM q WHERE q.team = p.team) FROM p GROUP BY team", None),
        ("SELECT team, (SELECT count(*) FROM q WHERE q.city = 'Rome') FROM p GROUP BY team", None),
        ("SELECT team, rank() OVER (ORDER BY sum(age)) FROM p GROUP BY team", None),
        ("SELECT x.name FROM (SELECT name, count(*) AS n FROM p GROUP BY team) AS x WHERE x.n > 1", True),
        ("SELECT name FROM p", None),
        ("SELECT '", None),
    ],
)
def test_groups(connection: sqlite3.Connection, sql: str, differs: bool | None) -> None:
    assert chance(connection, rewrite.groups_broken(sql)) is differs


def test_long_statements_are_no_deep_ones(connection: sqlite3.Connection) -> None:
    terms = "+".join(["age"] * 900)
    assert chance(connection, rewrite.groups_broken(f"SELECT {terms}, count(*) FROM p")) is True
    for rewritten in (rewrite.groups_broken, lambda sql: rewrite.limits_broken(sql, 1)):
        rewritten(f"SELECT {'+'.join(['age'] * 9000)}, count(*) FROM p LIMIT 1")  # no matter what


@pytest.mark.parametrize(
    ("sql", "runs"),
    [
        ("SELECT name FROM p ORDER BY age", [1, 2, 1, 1]),
        ("SELECT name FROM p ORDER BY team DESC", [1, 2, 2]),
        ("SELECT age FROM p ORDER BY age", [1, 1, 1, 1, 1]),  # tied rows look the same
        ("SELECT name FROM p ORDER BY NULL", [5]),
        ("SELECT * FROM p ORDER BY team LIMIT 4", [2, 2]),
        ("SELECT name FROM p ORDER BY team LIMIT 3", None),  # the limit cuts through a tie
        ("SELECT team FROM p UNION ALL SELECT city FROM q ORDER BY team", [1] * 8),
        ("SELECT name FROM p", None),
    ],
)
def test_tied_runs(connection: sqlite3.Connection, sql: str, runs: list[int] | None) -> None:
    pair = rewrite.ties_broken(sql, width(connection, sql))
    if pair is None:
        assert runs is None
        return
    gold, one, other = (connection.execute(text).fetchall() for text in (sql, *pair))
    assert rows.tied_runs(gold, one, other) == runs


def test_rows_of_a_run_come_in_any_order() -> None:
    gold = [("a", 1), ("b", 2), ("c", 2), ("d", 3)]
    swapped = [("a", 1), ("c", 2), ("b", 2), ("d", 3)]
    assert not rows.same_rows(swapped, gold, ordered=True)
    assert rows.same_rows(swapped, gold, ordered=True, runs=[1, 2, 1])
    assert not rows.same_rows(swapped, gold, ordered=True, runs=[2, 2])
    turned = [(b, a) for a, b in swapped]
    assert not rows.same_rows(turned, gold, ordered=True, runs=[1, 2, 1])
    assert rows.same_rows(turned, gold, ordered=True, column_permutation=True, runs=[1, 2, 1])
    assert not rows.same_rows(turned[::-1], gold, ordered=True, column_permutation=True, runs=[1, 2, 1])
    mixed = [(1, "a"), (2, "b"), (2, "c")]
    assert rows.same_rows([("b", 2), ("a", 1), ("c", 2)], mixed, ordered=True, column_permutation=True, runs=[3])
    assert not rows.same_rows([("b", 1), ("a", 2), ("c", 2)], mixed, ordered=True, column_permutation=True, runs=[3])


def test_runs_that_are_not_the_golds_are_refused() -> None:
    assert rows.tied_runs([(1,), (2,)], [(1,), (2,)], [(2,), (1,)]) == [2]
    assert rows.tied_runs([(2,), (1,)], [(1,), (2,)], [(1,), (2,)]) is None
    assert rows.tied_runs([(1,)], [(1,), (2,)], [(2,), (1,)]) is None
    assert rows.tied_runs([], [], []) == []
