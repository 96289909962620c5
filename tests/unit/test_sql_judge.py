"""Verdicts with real databases: ties, several measures at once, test suites, golds that fail."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout.errors import InfrastructureError
from rollout.sql import Executor
from rollout.sql.judge import Judge, Suites

# In the first database the wrong queries below are right by chance; the others tell.
CONTENTS = {
    "shop": "INSERT INTO item VALUES (1, 'pen', 2), (2, 'ink', 2), (3, 'pad', 5)",
    "shop_1": "INSERT INTO item VALUES (1, 'pen', 9), (2, 'ink', 2), (3, 'ink', 2), (4, NULL, 1)",
    "shop_2": "INSERT INTO item VALUES (7, 'cup', 1), (8, 'pad', 4)",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("suite")
    for folder in ("shop", "lonely"):
        (root / folder).mkdir()
    for name, insert in [*CONTENTS.items(), ("../lonely/lonely", CONTENTS["shop"])]:
        connection = sqlite3.connect(root / "shop" / f"{name}.sqlite")
        connection.executescript(f"CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price INT); {insert}")
        connection.close()
    (root / "shop" / "._shop.sqlite").write_bytes(b"what some archivers put beside a file")
    return root


@pytest.fixture(scope="module")
def executor(root: Path) -> Iterator[Executor]:
    with Executor(root, workers=1, timeout=2.0, max_vm_steps=1_000_000) as executor:
        yield executor


@pytest.fixture(scope="module")
def suites(root: Path, executor: Executor) -> Suites:
    return Suites(root, executor, keep_distinct=False)


def verdict(judge: Judge, executor: Executor, sql: str, gold: str, database: str = "shop") -> dict[str, bool]:
    return dict(judge.verdicts("t1", database, sql, executor.run(database, sql, whole=True), gold))


@pytest.mark.parametrize(
    ("sql", "right"),
    [
        ("SELECT name FROM item WHERE price < 5", False),
        ("SELECT name FROM item WHERE price = 2", True),
        ("SELECT DISTINCT name FROM item WHERE price = 2", True),  # DISTINCT is dropped, as published
        ("SELECT name FROM item WHERE price > = 2 AND price < = 2", True),  # blanks are closed, as published
        ("SELECT name FROM item WHERE id < 3", False),
        ("SELECT 'pen' UNION ALL SELECT 'ink'", False),
        ("SELECT nme FROM item", False),
        ("DELETE FROM item", False),
    ],
)
def test_the_test_suite_needs_agreement_on_every_database(
    executor: Executor, suites: Suites, sql: str, right: bool
) -> None:
    judge = Judge(executor, "spider_test_suite", suites=suites)
    assert verdict(judge, executor, sql, "SELECT name FROM item WHERE price = 2") == {"spider_test_suite": right}


def test_distinct_may_be_kept(root: Path, executor: Executor) -> None:
    gold, sql = "SELECT name FROM item WHERE price = 2", "SELECT DISTINCT name FROM item WHERE price = 2"
    judge = Judge(executor, "spider_test_suite", suites=Suites(root, executor, keep_distinct=True))
    assert verdict(judge, executor, sql, gold) == {"spider_test_suite": False}
    assert verdict(judge, executor, gold, gold) == {"spider_test_suite": True}


def test_measures_stand_beside_the_grading(executor: Executor, suites: Suites) -> None:
    judge = Judge(executor, "rows", ("bird_set", "spider_test_suite"), suites=suites)
    gold = "SELECT name, price FROM item WHERE price < 5"
    assert verdict(judge, executor, "SELECT price, name FROM item WHERE price < 5", gold) == {
        "rows": False,
        "bird_set": False,
        "spider_test_suite": True,
    }
    assert verdict(judge, executor, "SELECT name, 2 FROM item WHERE id < 3", gold) == {
        "rows": True,
        "bird_set": True,
        "spider_test_suite": False,
    }
    assert not any(verdict(judge, executor, "SELECT nme FROM item", gold).values())


def test_a_measure_without_a_suite_is_left_out_and_a_grading_is_not(root: Path, executor: Executor) -> None:
    suites_of_none = Suites(root / "shop", executor, False)
    gold = "SELECT name FROM item"
    measured = Judge(executor, "rows", ("spider_test_suite",), suites=suites_of_none)
    assert verdict(measured, executor, gold, gold) == {"rows": True}
    graded = Judge(executor, "spider_test_suite", suites=suites_of_none)
    with pytest.raises(InfrastructureError, match=r"task t1: no databases in .*shop.*test_suite_root"):
        verdict(graded, executor, gold, gold)


def test_the_suite_of_a_database_in_a_folder_goes_by_its_own_name(root: Path, executor: Executor) -> None:
    with Executor(root.parent, workers=1) as outer:
        judge = Judge(outer, "rows", ("spider_test_suite",), suites=Suites(root, executor, False))
        gold = "SELECT name FROM item"
        assert verdict(judge, outer, gold, gold, f"{root.name}/shop") == {"rows": True, "spider_test_suite": True}


def test_a_gold_that_fails_is_never_the_models_fault(executor: Executor, suites: Suites) -> None:
    for sql in ("SELECT 1", "SELECT nme FROM item"):
        with pytest.raises(InfrastructureError, match=r"task t1: its gold query on shop failed \(no such column: nix"):
            verdict(Judge(executor), executor, sql, "SELECT nix FROM item")
    judge = Judge(executor, "spider_test_suite", suites=suites)
    with pytest.raises(InfrastructureError, match=r"task t1: its gold query failed on shop/shop\.sqlite"):
        verdict(judge, executor, "SELECT 1", "SELECT nix FROM item")


@pytest.mark.parametrize(
    ("sql", "right"),
    [
        ("SELECT name FROM item ORDER BY price", True),
        ("SELECT name FROM item ORDER BY price, id DESC", True),  # pen and ink tie
        ("SELECT name FROM item ORDER BY price, name", True),
        ("SELECT name FROM item ORDER BY price DESC", False),
        ("SELECT name FROM item ORDER BY name DESC", False),
        ("SELECT name FROM item WHERE price = 2 ORDER BY price", False),
    ],
)
def test_rows_that_tie_come_in_any_order(executor: Executor, sql: str, right: bool) -> None:
    gold = "SELECT name FROM item ORDER BY price"
    assert verdict(Judge(executor), executor, sql, gold) == {"rows": right}


def test_ties_with_columns_in_another_order(executor: Executor) -> None:
    gold = "SELECT name, price FROM item ORDER BY price"
    sql = "SELECT price, name FROM item ORDER BY price, name"
    assert verdict(Judge(executor), executor, sql, gold) == {"rows": False}
    assert verdict(Judge(executor, column_permutation=True), executor, sql, gold) == {"rows": True}
    assert verdict(Judge(executor, column_permutation=True), executor, sql + " DESC", gold) == {"rows": True}
    wrong = "SELECT price, name FROM item ORDER BY price DESC"
    assert verdict(Judge(executor, column_permutation=True), executor, wrong, gold) == {"rows": False}


def test_an_order_that_decides_everything_leaves_nothing_open(executor: Executor) -> None:
    gold = "SELECT name FROM item ORDER BY price, name"
    assert verdict(Judge(executor), executor, "SELECT name FROM item ORDER BY price, id", gold) == {"rows": False}
    by_token = "SELECT CAST(name AS 'TEXT') FROM item ORDER BY price"  # not parsed: as strict as can be
    assert verdict(Judge(executor), executor, "SELECT name FROM item ORDER BY price, name", by_token) == {"rows": False}


@pytest.mark.parametrize("sql", ["DELETE FROM item", "UPDATE item SET price = 0", "CREATE TABLE x (y)", ""])
def test_the_reference_accepts_a_delete_where_the_gold_is_empty(executor: Executor, suites: Suites, sql: str) -> None:
    judge = Judge(executor, "rows", ("bird_set", "spider_test_suite"), suites=suites)
    gold = "SELECT name FROM item WHERE price > 100"
    assert not any(verdict(judge, executor, sql, gold).values())
    assert all(verdict(judge, executor, "SELECT name FROM item WHERE id > 100", gold).values())


@pytest.mark.parametrize(
    ("sql", "gold", "right"),
    [
        ("SELECT 3", "SELECT count(*) FROM item", False),  # copied from what was seen
        ("VALUES ('pen'), ('ink')", "SELECT name FROM item WHERE price = 2", False),
        ("WITH item AS (SELECT 3 AS n) SELECT n FROM item", "SELECT count(*) FROM item", False),
        ("SELECT 3 FROM item LIMIT 1", "SELECT count(*) FROM item", True),  # can't be told by the result
        ("SELECT 1 + 1", "SELECT 2", True),
        ("SELECT 2 FROM item LIMIT 1", "SELECT 2", True),
    ],
)
def test_the_reference_accepts_literals_in_place_of_a_query(
    executor: Executor, sql: str, gold: str, right: bool
) -> None:
    judge = Judge(executor, "rows", ("bird_set",))
    assert verdict(judge, executor, sql, gold) == {"rows": right, "bird_set": True}


def test_several_databases_tell_literals_from_answers(executor: Executor, suites: Suites) -> None:
    judge = Judge(executor, "spider_test_suite", suites=suites)
    gold = "SELECT count(*) FROM item"
    assert verdict(judge, executor, "SELECT 3 FROM item LIMIT 1", gold) == {"spider_test_suite": False}
    assert verdict(judge, executor, "SELECT count(id) FROM item", gold) == {"spider_test_suite": True}
