"""Queries that share workers, connections and memory of results: none of them may notice."""

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

from rollout.errors import InfrastructureError
from rollout.sql import Executor, result_cache
from rollout.sql.pool import Job, Pool, Worker
from rollout.sql.result_cache import ResultCache

BOMB = "SELECT instr(hex(zeroblob(1900000)), hex(zeroblob(900000)) || '1')"  # can't be interrupted
SLOW = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT {}) SELECT count(*) FROM n"
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"

# What a query could try to leave behind for the next one on its connection.
TRACES = [
    "CREATE TEMP TABLE car AS SELECT 9 AS id",
    "CREATE TEMP VIEW car AS SELECT 9 AS id",
    "BEGIN",
    "BEGIN IMMEDIATE",
    "SAVEPOINT s",
    "COMMIT",
    "PRAGMA case_sensitive_like = ON",
    "PRAGMA reverse_unordered_selects = ON",
    "PRAGMA query_only = OFF",
    "PRAGMA full_column_names = ON",
    "PRAGMA empty_result_callbacks = ON",
    "PRAGMA temp_store = 1",
    "PRAGMA recursive_triggers = ON",
    "PRAGMA encoding = 'UTF-16'",
    "PRAGMA foreign_keys = ON",
    "PRAGMA max_page_count = 1",
    "PRAGMA soft_heap_limit = 1000",
    "PRAGMA hard_heap_limit = 1000",
    "PRAGMA cache_size = 1",
    "PRAGMA analysis_limit = 1",
    "ATTACH ':memory:' AS other",
    "DETACH main",
    "INSERT INTO car VALUES (3, 'x')",
    "UPDATE car SET id = 9 RETURNING id",
    "DROP TABLE car",
    "VACUUM",
    "ANALYZE",
    "SELECT random(), randomblob(8)",
    "SELECT * FROM car, car, car, car, car WHERE name GLOB '*'",
    "SELECT nope",
    "SELECT load_extension('x')",
    "SELECT zeroblob(100000000)",
    "SELECT sql FROM sqlite_stmt",
    "SELECT 1; SELECT 2",
    "",
    "\0",
    "SELECT '\ud800'",
    ENDLESS,
]
# Shows all of that: shadowed names, LIKE's and rows' order, names of columns, open transactions, dice, settings.
WITNESSES = [
    "SELECT car.id, name FROM car",
    "SELECT id FROM car WHERE name LIKE 'KADETT'",
    "SELECT c.id FROM car AS c",
    "SELECT count(*) FROM sqlite_temp_master",
    "SELECT name FROM pragma_table_list WHERE schema <> 'main' AND name NOT LIKE 'sqlite_%'",
    "SELECT random(), hex(randomblob(4))",
    "SELECT changes(), total_changes(), last_insert_rowid()",
    "SELECT id FROM car WHERE id > 9",
    "SELECT datetime('now')",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("databases")
    make_database(
        root, "cars", "CREATE TABLE car (id INTEGER, name TEXT)", "INSERT INTO car VALUES (1, 'Kadett'), (2, NULL)"
    )
    for number in range(40):
        make_database(root, f"many{number}", f"CREATE TABLE t AS SELECT {number} AS x")
    return root


@pytest.fixture(scope="module")
def executor(root: Path) -> Iterator[Executor]:
    with Executor(root, timeout=10.0, workers=1, max_vm_steps=2_000_000) as executor:
        yield executor


@pytest.fixture(scope="module")
def expected(root: Path) -> list[tuple[str, str]]:
    """What the witnesses say on connections that nobody used before."""
    said = []
    for sql in WITNESSES:
        with Executor(root, workers=1) as fresh:
            said.append((fresh.run("cars", sql).status, fresh.run("cars", sql).observation))
    return said


@pytest.mark.parametrize("whole", [False, True])
def test_no_query_leaves_a_trace_on_its_connection(
    executor: Executor, expected: list[tuple[str, str]], whole: bool
) -> None:
    pids = executor.worker_pids()
    for trace in TRACES:
        executor.run("cars", trace, whole)
        said = [(r.status, r.observation) for r in executor.run_many([("cars", sql) for sql in WITNESSES])]
        assert said == expected, trace
    assert executor.worker_pids() == pids  # it was one worker, and so one connection, all along


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([*TRACES[:-1], *WITNESSES]), max_size=40))
def test_a_query_in_a_batch_gives_what_it_gives_alone(
    executor: Executor, expected: list[tuple[str, str]], queries: list[str]
) -> None:
    results = executor.run_many([("cars", sql) for sql in queries])
    for sql, result in zip(queries, results, strict=True):
        if sql in WITNESSES:
            assert (result.status, result.observation) == expected[WITNESSES.index(sql)]
        else:
            assert result == executor.run("cars", sql)


def test_connections_are_closed_when_there_are_too_many(executor: Executor) -> None:
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc")
    for _ in range(3):
        results = executor.run_many([(f"many{number}", "SELECT x FROM t") for number in range(40)])
        assert [r.rows for r in results] == [[(number,)] for number in range(40)]
        files = os.listdir(f"/proc/{executor.worker_pids()[0]}/fd")
        assert len(files) < 45


def test_one_that_kills_its_worker_does_not_harm_its_batch(root: Path) -> None:
    """The kernel kills it, and it alone is blamed; what was answered but not sent runs again."""
    queries = [("cars", f"SELECT {i}, name FROM car") for i in range(12)]
    queries[5] = ("cars", BOMB)
    queries[9] = ("cars", "SELECT nope")
    with Executor(root, timeout=0.3, workers=1) as executor:
        results = executor.run_many(queries)
        assert [r.status for r in results] == ["ok"] * 5 + ["timeout"] + ["ok"] * 3 + ["error"] + ["ok"] * 2
        assert [r.rows[0][0] for r in results if r.status == "ok"] == [i for i in range(12) if i not in (5, 9)]
        assert executor.stats()["worker_deaths"] == 1


def test_one_that_crashes_is_judged_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[str]] = []
    ask = Pool._ask

    def watched(self: Pool, worker: Worker, batch: list[Job]) -> object:
        batches.append([job.query[2] for job in batch])
        if any("BOMB" in job.query[2] for job in batch):
            threading.Timer(0.3, executor._pool._alive.copy().pop().kill).start()
        return ask(self, worker, batch)

    bomb = BOMB.replace("SELECT", "SELECT /* BOMB */")
    with Executor(root, timeout=60, workers=1) as executor:
        executor.run("cars", "SELECT 1")
        monkeypatch.setattr(Pool, "_ask", watched)
        results = executor.run_many([("cars", "SELECT 1"), ("cars", bomb), ("cars", "SELECT 3")])
        assert [r.status for r in results] == ["ok", "error", "ok"]
        assert "crashed" in results[1].observation
        assert executor.stats()["worker_deaths"] == 2
    assert batches[0] == ["SELECT 1", bomb, "SELECT 3"]
    assert [bomb] in batches


def test_nobody_waits_behind_a_slow_query_while_a_worker_is_free(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[str] = []
    finish = Pool._finish

    def watched(self: Pool, job: Job, reply: object) -> None:
        finished.append(job.query[2])
        finish(self, job, reply)

    slow = SLOW.format(3_000_000)
    with Executor(root, timeout=60, workers=2, max_vm_steps=10**9) as executor:
        executor.run_many([("cars", "SELECT 1")] * 4)
        monkeypatch.setattr(Pool, "_finish", watched)
        results = executor.run_many([("cars", slow), *(("cars", f"SELECT {i}") for i in range(20))])
    assert [r.rows for r in results] == [[(3_000_000,)], *([(i,)] for i in range(20))]
    assert finished[-1] == slow
    assert sorted(finished[:-1]) == sorted(f"SELECT {i}" for i in range(20))


def test_a_crowd_gets_right_answers_while_workers_are_killed(root: Path) -> None:
    stop = threading.Event()

    def kill_now_and_then(executor: Executor) -> None:
        while not stop.wait(0.15):
            for pid in executor.worker_pids()[:1]:
                os.kill(pid, signal.SIGKILL)

    def ask(number: int) -> None:
        if number % 3:
            assert executor.run("cars", f"SELECT {number}, name FROM car").rows == [(number, "Kadett"), (number, None)]
        else:
            db_ids = [f"many{(number + i) % 40}" for i in range(12)]
            results = executor.run_many([(db_id, "SELECT x FROM t") for db_id in db_ids], whole=True)
            assert [f"many{r.rows[0][0]}" for r in results] == db_ids

    with Executor(root, timeout=30, workers=3) as executor:
        killer = threading.Thread(target=kill_now_and_then, args=(executor,))
        killer.start()
        try:
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(ask, range(600)))
        finally:
            stop.set()
            killer.join()
        assert executor.stats()["worker_deaths"] > 0


def test_an_interrupted_caller_leaves_the_pool_in_order(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Pool._ask

    def interrupted(self: Pool, worker: Worker, batch: list[Job]) -> object:
        ask(self, worker, batch)
        raise KeyboardInterrupt

    with Executor(root, workers=1) as executor:
        executor.run("cars", "SELECT 1")
        pids = executor.worker_pids()
        monkeypatch.setattr(Pool, "_ask", interrupted)
        with pytest.raises(KeyboardInterrupt):
            executor.run_many([("cars", f"SELECT {i}") for i in range(3)])
        monkeypatch.undo()
        assert [executor.run("cars", f"SELECT {i}").rows for i in range(5)] == [[(i,)] for i in range(5)]
        assert executor.worker_pids() != pids


def test_no_query_is_lost_in_a_crowd(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where callers give back what their worker hasn't begun, and lead for one another, all the time."""
    monkeypatch.setattr("rollout.sql.pool.PATIENCE_SECONDS", 0.0)  # everyone gives back all the time
    with Executor(root, timeout=30, workers=3) as executor, ThreadPoolExecutor(12) as pool:

        def ask(number: int) -> None:
            results = executor.run_many([("cars", f"SELECT {number + i}") for i in range(number % 7 + 1)])
            assert [r.rows for r in results] == [[(number + i,)] for i in range(number % 7 + 1)]

        answers = [pool.submit(ask, number) for number in range(1500)]
        for answer in answers:
            answer.result(timeout=60)
        assert len(executor.worker_pids()) == 3


def test_closing_ends_batches_that_wait(root: Path) -> None:
    executor = Executor(root, timeout=30, workers=1)
    executor.run("cars", "SELECT 1")
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(executor.run_many, [("cars", BOMB)] * 40) for _ in range(3)]
        time.sleep(0.2)
        executor.close()
        for answer in answers:
            with pytest.raises(InfrastructureError, match="closed"):
                answer.result(timeout=30)
    assert executor.worker_pids() == []


@pytest.fixture
def remembering(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Executor]:
    monkeypatch.setattr(result_cache, "SETTLED_NANOSECONDS", -1)  # files of a test are young
    with Executor(root, timeout=1.0, workers=1, max_vm_steps=300_000, cache_mb=1) as executor:
        yield executor


def hits(executor: Executor) -> tuple[int, int]:
    stats = executor.stats()
    return stats["hits"], stats["misses"]


def test_the_same_query_is_remembered(remembering: Executor) -> None:
    for sql in ("SELECT id, name FROM car", "SELECT nope", "DELETE FROM car", ENDLESS):
        for whole in (False, True):
            before = hits(remembering)
            first, second = (remembering.run("cars", sql, whole) for _ in range(2))
            assert first == second
            assert second.seconds == 0
            assert hits(remembering) == (before[0] + 1, before[1] + 1)
    assert remembering.run("cars", ENDLESS).status == "timeout"
    before = hits(remembering)
    remembering.run("cars", "SELECT id, name FROM car ")  # other text, other query
    remembering.run("many1", "SELECT nope")
    assert hits(remembering) == (before[0], before[1] + 2)


def test_what_someone_does_with_a_result_is_not_remembered(remembering: Executor) -> None:
    sql = "SELECT name FROM car ORDER BY id"
    for _ in range(3):
        rows = remembering.run("cars", sql).rows
        assert rows == [("Kadett",), (None,)]
        assert isinstance(rows, list)
        rows.clear()


def test_verdicts_of_chance_are_not_remembered(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_cache, "SETTLED_NANOSECONDS", -1)
    (root / "text").mkdir()
    (root / "text" / "text.sqlite").write_text("this is not a database" * 100)
    with Executor(root, timeout=0.1, workers=1, cache_mb=1) as executor:
        assert [executor.run("cars", BOMB).status for _ in range(2)] == ["timeout"] * 2  # killed by the kernel
        for _ in range(2):
            with pytest.raises(InfrastructureError):
                executor.run("text", "SELECT 1")
        assert executor.stats() == {"hits": 0, "misses": 4, "worker_deaths": 2}


def test_a_timeout_by_the_clock_is_not_remembered(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_cache, "SETTLED_NANOSECONDS", -1)
    with Executor(root, timeout=0.2, workers=1, max_vm_steps=10**12, cache_mb=1) as executor:
        assert [executor.run("cars", ENDLESS).status for _ in range(2)] == ["timeout"] * 2
        assert executor.stats()["hits"] == 0


def test_another_content_is_another_question(root: Path, remembering: Executor, tmp_path: Path) -> None:
    path = make_database(root, "fresh", "CREATE TABLE t (x)")
    count = "SELECT count(*) FROM t"
    assert [remembering.run("fresh", count).rows for _ in range(2)] == [[(0,)]] * 2
    other = make_database(tmp_path, "fresh", "CREATE TABLE t (x)", "INSERT INTO t VALUES (1)")
    os.utime(other, ns=(0, path.stat().st_mtime_ns))  # same size, same time of change
    assert other.stat().st_size == path.stat().st_size
    os.replace(other, path)
    assert [remembering.run("fresh", count).rows for _ in range(2)] == [[(1,)]] * 2
    connection = sqlite3.connect(path)  # in place
    connection.execute("INSERT INTO t VALUES (2)")
    connection.commit()
    connection.close()
    assert [remembering.run("fresh", count).rows for _ in range(2)] == [[(2,)]] * 2
    assert remembering.stats()["hits"] == 3


def test_a_file_that_changed_a_moment_ago_is_not_trusted(root: Path) -> None:
    make_database(root, "young", "CREATE TABLE t (x)")
    with Executor(root, workers=1, cache_mb=1) as executor:
        for _ in range(3):
            assert executor.run("young", "SELECT count(*) FROM t").rows == [(0,)]
        assert executor.stats()["hits"] == 0


def test_the_memory_is_bounded_and_forgets_the_oldest() -> None:
    cache = ResultCache(100_000)

    def answer(size: int) -> result_cache.Answer:
        return ("ok", ("a",), b"x" * size, False, None, "", 0.0)

    for number in range(1000):
        cache.put(((1,), str(number), True), answer(2000), 2000)
        assert cache.bytes <= 100_000
        assert cache.get(((1,), "0", True)) is not None  # used again and again
    assert len(cache) == 33
    assert cache.get(((1,), "999", True)) is not None
    assert cache.get(((1,), "900", True)) is None
    cache.put(((1,), "large", True), answer(50_000), 50_000)
    assert cache.get(((1,), "large", True)) is None
    cache.put(((1,), "999", True), answer(10), 10)
    assert len(cache) == 33
