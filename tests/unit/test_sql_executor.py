"""The executor's own life: results, workers that die, many threads, databases that are missing, strange or damaged."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sql_databases import make_database

from rollout.errors import InfrastructureError, UserError
from rollout.sql import Executor

BOMB = "SELECT instr(hex(zeroblob(1900000)), hex(zeroblob(900000)) || '1')"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("databases")
    make_database(
        root, "cars", "CREATE TABLE car (id INTEGER, name TEXT)", "INSERT INTO car VALUES (1, 'Kadett'), (2, NULL)"
    )
    make_database(root, "empty", "CREATE TABLE void (x)")
    return root


@pytest.fixture(scope="module")
def executor(root: Path) -> Iterator[Executor]:
    with Executor(root, timeout=2.0, workers=2, max_rows=3) as executor:
        yield executor


def test_a_result_has_rows_columns_and_text(executor: Executor) -> None:
    result = executor.run("cars", "SELECT id, name FROM car;")
    assert (result.status, result.columns, result.rows) == ("ok", ("id", "name"), [(1, "Kadett"), (2, None)])
    assert result.observation == "id | name\n1 | Kadett\n2 | NULL"
    assert not result.truncated
    assert executor.run("empty", "SELECT x FROM void").observation == "x\n(no rows)"


def test_only_the_first_rows_are_shown_but_all_can_be_had(executor: Executor) -> None:
    sql = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 12) SELECT i FROM n"
    shown, whole = executor.run("cars", sql), executor.run("cars", sql, whole=True)
    assert shown.rows == [(1,), (2,), (3,)]
    assert shown.truncated
    assert shown.observation == whole.observation == "i\n1\n2\n3\n(9 more rows)"
    assert whole.rows == [(i,) for i in range(1, 13)]
    assert not whole.truncated


def test_long_results_are_counted_up_to_a_bound(executor: Executor) -> None:
    sql = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 60000) SELECT i FROM n"
    assert executor.run("cars", sql).observation.splitlines()[-1] == "(more than 9997 more rows)"


def test_an_error_is_what_sqlite_says(executor: Executor) -> None:
    result = executor.run("cars", "SELECT nme FROM car")
    assert (result.status, result.observation) == ("error", "SQL Error: no such column: nme")
    assert result.rows == []


def test_run_many_keeps_the_order(executor: Executor) -> None:
    results = executor.run_many([("cars", f"SELECT {i}") if i % 3 else ("empty", "SELECT nope") for i in range(60)])
    assert [r.status for r in results] == ["ok" if i % 3 else "error" for i in range(60)]
    assert all(r.rows == [(i,)] for i, r in enumerate(results) if i % 3)


def test_threads_get_their_own_answers(executor: Executor) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: executor.run("cars", f"SELECT {i}, name FROM car").rows, range(200)))
    assert answers == [[(i, "Kadett"), (i, None)] for i in range(200)]


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(), st.text("SELCTFROMVAUES()*,;'\"`[]-/0123456789xX \0\ud800<>|?:@$%"), st.binary().map(repr)))
def test_any_text_as_sql_gives_a_result(executor: Executor, sql: str) -> None:
    result = executor.run("cars", sql)
    assert result.status in ("ok", "error", "denied")
    result.observation.encode()


@pytest.mark.parametrize(
    "db_id",
    [
        "",
        ".",
        "..",
        "../cars",
        "cars/../cars",
        "/etc/passwd",
        "a\\b",
        ".hidden",
        "x\0y",
        "cars/",
        "/cars",
        "a//b",
        "./cars",
        "a/.b/c",
    ],
)
def test_a_db_id_is_a_plain_name(executor: Executor, db_id: str) -> None:
    with pytest.raises(InfrastructureError, match="db_id"):
        executor.run(db_id, "SELECT 1")


def test_a_db_id_may_be_a_path_of_names(executor: Executor, root: Path) -> None:
    (root / "spider" / "database").mkdir(parents=True)
    path = make_database(root / "spider" / "database", "singers", "CREATE TABLE singer (id)")
    assert executor.run("spider/database/singers", "SELECT count(*) FROM singer").rows == [(0,)]
    assert executor.locate("spider/database/singers") == path.resolve()
    with pytest.raises(InfrastructureError, match=r"database/none/none\.sqlite"):
        executor.locate("spider/database/none")


def test_an_unknown_engine_is_named(root: Path) -> None:
    with pytest.raises(UserError, match="'oracle': expected one of sqlite, duckdb"):
        Executor(root, engine="oracle")


def test_a_missing_database_is_named(executor: Executor, root: Path) -> None:
    with pytest.raises(InfrastructureError, match=r"nowhere/nowhere\.sqlite"):
        executor.run("nowhere", "SELECT 1")
    with pytest.raises(InfrastructureError, match="no-such-root"):
        Executor(root / "no-such-root")


def test_links_may_not_lead_out_of_the_root(executor: Executor, root: Path, tmp_path: Path) -> None:
    outside = make_database(tmp_path, "secret", "CREATE TABLE s (x)")
    (root / "link").mkdir()
    (root / "link" / "link.sqlite").symlink_to(outside)
    with pytest.raises(InfrastructureError, match="leads out"):
        executor.run("link", "SELECT 1")
    (root / "alias").symlink_to(root / "cars")
    (root / "cars" / "alias.sqlite").symlink_to(root / "cars" / "cars.sqlite")
    assert executor.run("alias", "SELECT count(*) FROM car").status == "ok"


def test_a_damaged_database_is_not_the_querys_fault(executor: Executor, root: Path) -> None:
    (root / "text").mkdir()
    (root / "text" / "text.sqlite").write_text("this is not a database, whatever its name says" * 100)
    with pytest.raises(InfrastructureError, match=r"text\.sqlite.*not a database"):
        executor.run("text", "SELECT 1")
    path = make_database(root, "torn", "CREATE TABLE t (x)", "INSERT INTO t SELECT zeroblob(50000)")
    data = bytearray(path.read_bytes())
    data[4096:8192] = b"\xff" * 4096
    path.write_bytes(data)
    with pytest.raises(InfrastructureError, match=r"torn\.sqlite can't be read"):
        executor.run("torn", "SELECT length(x), x FROM t")


def test_a_database_with_unfinished_changes_is_refused(executor: Executor, root: Path) -> None:
    path = make_database(root, "wal", "CREATE TABLE t (x)")
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("INSERT INTO t VALUES (1)")
    connection.commit()
    with pytest.raises(InfrastructureError, match="unfinished changes"):
        executor.run("wal", "SELECT * FROM t")
    connection.close()
    assert executor.run("wal", "SELECT * FROM t").rows == [(1,)]


def test_a_lock_held_by_others_does_not_matter(executor: Executor, root: Path) -> None:
    path = make_database(root, "locked", "CREATE TABLE t (x)")
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    assert executor.run("locked", "SELECT count(*) FROM t").rows == [(0,)]
    connection.close()


def test_a_replaced_file_is_opened_anew(executor: Executor, root: Path, tmp_path: Path) -> None:
    make_database(root, "fresh", "CREATE TABLE t (x)")
    assert executor.run_many([("fresh", "SELECT count(*) FROM t")] * 4)[0].rows == [(0,)]
    other = make_database(tmp_path, "fresh", "CREATE TABLE t (x)", "INSERT INTO t VALUES (1)")
    os.replace(other, root / "fresh" / "fresh.sqlite")
    assert {tuple(r.rows) for r in executor.run_many([("fresh", "SELECT count(*) FROM t")] * 8)} == {((1,),)}


def test_more_databases_than_open_connections(executor: Executor, root: Path) -> None:
    for number in range(40):
        make_database(root, f"many{number}", f"CREATE TABLE t AS SELECT {number} AS x")
    for _ in range(2):
        results = executor.run_many([(f"many{number}", "SELECT x FROM t") for number in range(40)])
        assert [r.rows for r in results] == [[(number,)] for number in range(40)]


def test_the_same_budget_of_steps_gives_the_same_verdict(root: Path) -> None:
    sql = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT {}) SELECT count(*) FROM n"
    with Executor(root, timeout=60, workers=1, max_vm_steps=200_000) as executor:
        verdicts = [executor.run("cars", sql.format(size)).status for size in (1000, 40_000)]
        assert verdicts == ["ok", "timeout"]
        low, high = 1000, 40_000  # the exact size at which the verdict turns
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if executor.run("cars", sql.format(middle)).status == "ok" else (low, middle)
        for _ in range(3):
            assert executor.run("cars", sql.format(low)).status == "ok"
            assert executor.run("cars", sql.format(high)).status == "timeout"


def kill(executor: Executor) -> None:
    for pid in executor.worker_pids():
        os.kill(pid, signal.SIGKILL)


def test_an_idle_worker_that_died_is_replaced_unseen(root: Path) -> None:
    with Executor(root, workers=2) as executor:
        assert executor.run("cars", "SELECT 1").status == "ok"
        kill(executor)
        assert [r.status for r in executor.run_many([("cars", "SELECT 1")] * 6)] == ["ok"] * 6


def test_a_query_whose_worker_is_killed_runs_again(root: Path) -> None:
    with Executor(root, timeout=30, workers=1) as executor:
        assert executor.run("cars", "SELECT 1").status == "ok"
        with ThreadPoolExecutor(1) as pool:
            sql = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 500000) SELECT count(*) FROM n"
            answer = pool.submit(executor.run, "cars", sql)
            time.sleep(0.05)
            kill(executor)
            assert answer.result().rows == [(500000,)]


def test_a_query_that_kills_two_workers_is_an_error(root: Path) -> None:
    with Executor(root, timeout=30, workers=1) as executor:
        assert executor.run("cars", "SELECT 1").status == "ok"
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(executor.run, "cars", BOMB)
            while not answer.done():
                time.sleep(0.1)
                for pid in executor.worker_pids():
                    os.kill(pid, signal.SIGKILL)
            assert answer.result().status == "error"
            assert "crashed" in answer.result().observation
        assert executor.run("cars", "SELECT 1").status == "ok"


def test_a_worker_that_stands_still_is_an_infrastructure_failure(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.sql.executor.STALL_SECONDS", 0.2)
    with Executor(root, workers=1) as executor:
        monkeypatch.undo()
        assert executor.run("cars", "SELECT 1").status == "ok"
        os.kill(executor.worker_pids()[0], signal.SIGSTOP)
        with pytest.raises(InfrastructureError, match="stands still"):
            executor.run("cars", "SELECT 1")
        assert executor.run("cars", "SELECT 1").status == "ok"


def test_closing_ends_running_and_waiting_queries(root: Path) -> None:
    executor = Executor(root, timeout=30, workers=1)
    errors: list[BaseException] = []

    def query() -> None:
        try:
            executor.run("cars", BOMB)
        except InfrastructureError as error:
            errors.append(error)

    assert executor.run("cars", "SELECT 1").status == "ok"
    threads = [threading.Thread(target=query) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    pids = executor.worker_pids()
    executor.close()
    for thread in threads:
        thread.join(timeout=30)
    assert len(errors) == 3
    assert executor.worker_pids() == []
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    with pytest.raises(InfrastructureError, match="closed"):
        executor.run("cars", "SELECT 1")
    executor.close()


def test_a_worker_imports_next_to_nothing(root: Path) -> None:
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("needs /proc")
    with Executor(root, workers=1) as executor:
        executor.run("cars", "SELECT 1")
        maps = Path(f"/proc/{executor.worker_pids()[0]}/maps").read_text()
    assert "_sqlite3" in maps
    assert "site-packages" not in maps
