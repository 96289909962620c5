"""What is read off a statement's text: the outermost ORDER BY, DISTINCT, clock and dice."""

from __future__ import annotations

import sqlite3

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.sql import syntax

ORDERED = [
    "SELECT a FROM t ORDER BY a",
    "select a from t order \n  by a limit 3;",
    "SELECT a FROM t ORDER BY 1",
    "SELECT a FROM t ORDER BY (1)",
    "SELECT a FROM t ORDER BY 1 COLLATE NOCASE DESC",
    "SELECT a FROM t ORDER BY a COLLATE NOCASE",
    "SELECT a FROM t ORDER BY 'x', a",
    "SELECT a FROM t ORDER BY b IS NULL, b",
    "SELECT a FROM t ORDER BY -b",
    "SELECT a FROM t ORDER BY a NULLS LAST",
    "SELECT a FROM t ORDER BY length(a) ASC LIMIT 1 OFFSET 1",
    "SELECT a, count(*) FROM t GROUP BY a HAVING count(*) > 0 ORDER BY count(*) DESC",
    "SELECT a FROM t ORDER BY (SELECT b FROM u WHERE u.b = t.b)",
    "SELECT a FROM t ORDER BY CASE WHEN a = 1 THEN b ELSE 0 END",
    "SELECT a FROM t UNION SELECT b FROM t ORDER BY 1",
    "SELECT a FROM t UNION ALL SELECT b FROM u EXCEPT SELECT b FROM u ORDER BY a LIMIT 2",
    "WITH x AS (SELECT a FROM t) SELECT a FROM x ORDER BY a",
    "WITH x AS (SELECT a FROM t ORDER BY a) SELECT a FROM x UNION SELECT b FROM u ORDER BY 1",
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3) SELECT i FROM n ORDER BY i DESC",
    "SELECT * FROM (SELECT a FROM t ORDER BY a) ORDER BY a",
    'SELECT "order by" FROM w ORDER BY "order by"',
    "SELECT group_concat(a) FROM t GROUP BY b ORDER BY b",
    "SELECT a FROM t WINDOW w AS (ORDER BY a) ORDER BY a",
    "SELECT a FROM t INDEXED BY ti ORDER BY a",
    "SELECT a FROM t NOT INDEXED ORDER BY a",
    "SELECT a FROM t WHERE a GLOB '*)' ORDER BY a",
    "SELECT a FROM t WHERE (a, b) IN (VALUES (1, 2)) ORDER BY a",
    "SELECT a FROM t WHERE a NOTNULL ORDER BY a",
    "SELECT a FROM t, json_each('[1, 2]') ORDER BY a;;",
    "SELECT `a` FROM [t] ORDER BY `a`",
    "SELECT a FROM t GROUP BY a ORDER BY sum(b) FILTER (WHERE b > 0)",
]
UNORDERED = [
    "SELECT a FROM t",
    "SELECT a FROM (SELECT a FROM t ORDER BY a LIMIT 3)",
    "SELECT * FROM (SELECT a FROM t ORDER BY a)",
    "WITH x AS (SELECT a FROM t ORDER BY a) SELECT a FROM x",
    "SELECT rank() OVER (ORDER BY a) FROM t",
    "SELECT rank() OVER w FROM t WINDOW w AS (PARTITION BY b ORDER BY a)",
    "SELECT a FROM t WHERE b = 'x ORDER BY y'",
    'SELECT "order by" FROM w -- ORDER BY a',
    "SELECT [order by] FROM w",
    "SELECT `order by` FROM w",
    "SELECT 1 AS 'order by'",
    "SELECT a FROM t /* ORDER BY a */",
    "SELECT a FROM t WHERE a IN (SELECT b FROM u ORDER BY b)",
    "SELECT a FROM t WHERE a = (SELECT b FROM u ORDER BY b LIMIT 1) GROUP BY a",
    "SELECT a FROM t UNION SELECT * FROM (SELECT b FROM u ORDER BY b LIMIT 1)",
    "SELECT a FROM t WHERE EXISTS (SELECT 1 FROM u ORDER BY b) EXCEPT SELECT b FROM u",
    "SELECT a FROM t ORDER BY 'a'",
    "SELECT a FROM t ORDER BY NULL",
    "SELECT a FROM t ORDER BY 1 + 1, 2.5",
    "VALUES (1), (2)",
]
NOT_PARSED = [  # SQLite runs these; sqlglot's parser (30.3) does not read them, so the tokens decide
    ("SELECT a FROM t LEFT NATURAL JOIN u ORDER BY a", True),
    ("SELECT a FROM (SELECT a FROM t LEFT NATURAL JOIN u ORDER BY a)", False),
    ("SELECT a FROM t LEFT NATURAL JOIN u ORDER /* so */ BY a", True),
    ("SELECT a FROM t ORDER /* so */ BY a", True),
    ("SELECT a FROM t -- no\n ORDER -- so\n BY -- and so\n a", True),
    ("SELECT CAST(a AS 'x') FROM t -- ORDER BY a", False),
    ("SELECT CAST(a AS 'x'), rank() OVER (ORDER BY a) FROM t", False),
]
NEEDS_344 = [
    ("SELECT group_concat(a, ',' ORDER BY b) FROM t", False),
    ("SELECT group_concat(a ORDER BY b) FROM t", False),
]
NOT_SQL = [("SELECT '", False), ("", False), ("order by", True), ("ORDER", False), ("(" * 5000, False)]


@pytest.mark.parametrize("sql", ORDERED)
def test_ordered(sql: str) -> None:
    assert syntax.is_ordered(sql)


@pytest.mark.parametrize("sql", UNORDERED)
def test_unordered(sql: str) -> None:
    assert not syntax.is_ordered(sql)


@pytest.mark.parametrize(("sql", "ordered"), [*NOT_PARSED, *NEEDS_344, *NOT_SQL])
def test_what_cannot_be_parsed_or_run_gets_an_answer_too(sql: str, ordered: bool) -> None:
    assert syntax.is_ordered(sql) is ordered


def test_sqlite_runs_the_examples() -> None:
    connection = sqlite3.connect(":memory:")
    connection.executescript(
        'CREATE TABLE t (a, b); CREATE INDEX ti ON t (a); CREATE TABLE u (b); CREATE TABLE w ("order by")'
    )
    for sql in [*ORDERED, *UNORDERED, *(sql for sql, _ in NOT_PARSED)]:
        connection.execute(sql.rstrip(";"))
    connection.close()


def test_the_tokens_decide_only_where_there_is_no_tree() -> None:
    assert all(syntax.parse(sql) is None for sql, _ in NOT_PARSED)
    assert all(syntax.parse(sql) is not None for sql in [*ORDERED, *UNORDERED])


@pytest.mark.parametrize(
    ("sql", "reads"),
    [
        ("SELECT a FROM t", True),
        ("SELECT 5", False),
        ("SELECT 'x' AS name UNION ALL SELECT 'y'", False),
        ("VALUES (1, 'x'), (2, 'y')", False),
        ("WITH x AS (SELECT 5 AS a) SELECT a FROM x", False),
        ("WITH t AS (SELECT 5 AS a) SELECT a FROM t", False),  # the name of a table, but not the table
        ("WITH x AS (SELECT a FROM t) SELECT 5 FROM x", True),
        ("SELECT * FROM (SELECT 5)", False),
        ("SELECT * FROM (WITH t AS (SELECT 1) SELECT * FROM t), t", True),
        ("WITH t AS (SELECT 1) SELECT * FROM main.t", True),
        ("SELECT (SELECT count(*) FROM t)", True),
        ("SELECT 1 WHERE 1 IN t", True),
        ("SELECT 1 WHERE 1 IN (2, 1)", False),
        ("SELECT 1 WHERE EXISTS (SELECT 1 FROM t)", True),
        ("SELECT value FROM json_each('[1, 2]')", False),
        ("SELECT name FROM pragma_table_info('t')", False),
        ("SELECT count(*) FROM sqlite_master", False),
        ('SELECT * FROM "t"', True),
        ("SELECT a FROM t LEFT NATURAL JOIN u", True),  # not parsed
        ("SELECT CAST(5 AS 'INT')", True),  # not parsed: given the benefit of the doubt
        ("SELECT '", True),
    ],
)
def test_reading_a_table(sql: str, reads: bool) -> None:
    assert syntax.reads_a_table(sql) is reads


@pytest.mark.parametrize(
    ("sql", "without"),
    [
        ("SELECT DISTINCT a FROM t", "SELECT  a FROM t"),
        ("select\ndistinct(a) from t", "select\n(a) from t"),
        ("SELECT count(DISTINCT a), sum(distinct b) FROM t", "SELECT count( a), sum( b) FROM t"),
        ("SELECT 'DISTINCT', \"distinct\" FROM t -- DISTINCT", "SELECT 'DISTINCT', \"distinct\" FROM t -- DISTINCT"),
        ("SELECT a IS DISTINCT FROM b FROM t", "SELECT a IS DISTINCT FROM b FROM t"),
        ("SELECT a IS NOT DISTINCT FROM b FROM t", "SELECT a IS NOT DISTINCT FROM b FROM t"),
        ("SELECT 'é😀', count(DISTINCT a) FROM t", "SELECT 'é😀', count( a) FROM t"),
        ("SELECT DISTINCT '", "SELECT DISTINCT '"),  # not SQL: left as it is
    ],
)
def test_distinct_is_dropped(sql: str, without: str) -> None:
    assert syntax.without_distinct(sql) == without


@pytest.mark.parametrize(
    ("sql", "parts"),
    [
        ("SELECT random()", ["random()"]),
        ("SELECT a FROM t ORDER BY RANDOM ( ) LIMIT 1", ["random()"]),
        ("SELECT hex(randomblob(4))", ["randomblob()"]),
        ("SELECT uuid(), now() FROM today", ["uuid()", "now()"]),
        ("SELECT current_date, CURRENT_TIMESTAMP", ["CURRENT_DATE", "CURRENT_TIMESTAMP"]),
        ("SELECT date('now'), date('NOW', '-1 day')", ["date of now"]),
        ("SELECT date()", ["date of now"]),
        ("SELECT strftime('%Y')", ["strftime of now"]),
        ("SELECT strftime('%Y', 'now') - birth FROM t", ["strftime of now"]),
        ("SELECT strftime('%Y', date('now'))", ["date of now"]),
        ("SELECT julianday(\"now\") - julianday(a) FROM t", ["julianday of now"]),
        ("SELECT date(a), strftime('%Y', a) FROM t WHERE word = 'now'", []),
        ("SELECT date(a, max('now', b)) FROM t", []),
        ("SELECT random, date, \"current_date\" FROM t", []),
        ("SELECT t.current_date FROM t WHERE a = 'random()' -- random()", []),
        ("SELECT '", []),
    ],
)  # fmt: skip
def test_clock_and_dice_are_found(sql: str, parts: list[str]) -> None:
    assert syntax.volatile_parts(sql) == parts


WORDS = """SELECT ORDER BY FROM DISTINCT ( ) ' " ` [ ] -- /* */ ; , . date( now 'now' a 1 1e5 x' ? :x @y $z é"""
PIECES = st.sampled_from([*WORDS.split(), "\0", "\n", "\ud800"])


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(max_size=40), st.lists(PIECES, max_size=12).map(" ".join)))
def test_any_text_is_read_without_an_exception(sql: str) -> None:
    syntax.is_ordered(sql)
    syntax.volatile_parts(sql)
    syntax.reads_a_table(sql)
    kept = syntax.without_distinct(sql)
    assert kept.split() == sql.split() or "distinct" in sql.lower()
