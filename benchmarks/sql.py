"""Measures the SQL executor beside a raw reused sqlite3 connection and the reference's tool; prints Markdown tables.

    python benchmarks/sql.py --devset DIR

DIR holds questions.jsonl and databases/<db_id>/<db_id>.sqlite. The small database holds the tables of the few databases
with the most gold queries; the large one holds every row of them many times over, with keys of its own, until the file
has 100 MB. 200 gold queries run on both. CPU time counts every process that takes part. Contenders take turns, round by
round; a ratio compares the same round, and the tables show medians. "Raw" is `sqlite3.connect(file)`, reused, with
`execute(sql).fetchall()`; everyone else also writes what the model reads. A whole result is what grading asks for.

The reference's tool takes part where it can be imported (`pip install skyrl-gym`, or its folder in PYTHONPATH).
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import random
import sqlite3
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from rollout.sql import Executor
from rollout.sql.engines import COUNTED_ROWS

QUERIES = 200
LARGE_BYTES = 100_000_000
TOO_SLOW = 0.5  # seconds on the large database: a join without keys explodes there as it would not in life
WORKERS = 2
THREADS = 16
OTHER_KEY = (
    "CASE typeof({0}) WHEN 'integer' THEN {0} + n * 10000000 WHEN 'null' THEN NULL ELSE {0} || iif(n, '#' || n, '') END"
)


class Contender(NamedTuple):
    name: str
    run: Callable[[Sequence[str]], object]
    pids: Callable[[], list[int]] = list  # of processes that work for it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devset", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each contender in each round")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        queries = make_databases(root, args.devset)
        for db_id in ("small", "large"):
            size = (root / db_id / f"{db_id}.sqlite").stat().st_size
            print(f"\n{db_id}: {size / 1e6:.1f} MB, {len(queries)} queries\n")
            with contenders(root, db_id) as rivals:
                print_cpu(rivals, queries, args.rounds, args.seconds)
                print()
                print_load(rivals, queries, args.rounds, args.seconds)


def make_databases(root: Path, devset: Path) -> list[str]:
    """Writes both databases; returns the queries."""
    by_database: dict[str, set[str]] = defaultdict(set)
    for line in (devset / "questions.jsonl").read_text().splitlines():
        row = json.loads(line)
        by_database[row["db_id"]].add(row["gold_sql"])
    path = {db_id: devset / "databases" / db_id / f"{db_id}.sqlite" for db_id in by_database}
    chosen: list[str] = []
    tables: set[str] = set()
    golds: list[str] = []
    for db_id in sorted(by_database, key=lambda name: (-len(by_database[name]), name)):
        own = table_names(path[db_id])
        if path[db_id].stat().st_size < 100_000 and not own & tables and len(golds) < 1.6 * QUERIES:
            chosen.append(db_id)
            tables |= own
            golds += sorted(by_database[db_id])
    for name, size in (("small", 0), ("large", LARGE_BYTES)):
        (root / name).mkdir()
        merge([path[db_id] for db_id in chosen], root / name / f"{name}.sqlite", size)
    usable = [sql for sql in golds if is_usable(root / "large" / "large.sqlite", sql)]
    print(f"tables of {', '.join(chosen)}; {len(golds)} gold queries, {len(usable)} usable")
    return random.Random(0).sample(usable, QUERIES)


def table_names(path: Path) -> set[str]:
    with sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True) as connection:
        return {name.lower() for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def merge(sources: list[Path], path: Path, size: int) -> None:
    """All tables of the sources in one file; each row as often as it takes to reach a size in bytes, at least once."""
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        for number, source in enumerate(sources):
            connection.execute(f"ATTACH '{source}' AS s{number}")
            ddl = connection.execute(f"SELECT sql FROM s{number}.sqlite_master WHERE sql NOT NULL ORDER BY type DESC")
            for (statement,) in ddl.fetchall():
                connection.execute(statement)
        first, copies = 0, 1
        while first == 0 or path.stat().st_size < size:
            for number, source in enumerate(sources):
                for table in sorted(table_names(source)):
                    copy_rows(connection, f"s{number}", table, range(first, first + copies))
            connection.commit()
            first, copies = first + copies, max(1, min(50, size // path.stat().st_size))


def copy_rows(connection: sqlite3.Connection, schema: str, table: str, numbers: range) -> None:
    """Adds copies of a table's rows whose keys are their own, so that rows join within their copy."""
    about = connection.execute(f"PRAGMA {schema}.table_info({table})").fetchall()
    links = connection.execute(f"PRAGMA {schema}.foreign_key_list({table})").fetchall()
    keys = {row[1].lower() for row in about if row[5]} | {row[3].lower() for row in links}
    cells = [OTHER_KEY.format(f'"{row[1]}"') if row[1].lower() in keys else f'"{row[1]}"' for row in about]
    connection.execute(
        "WITH RECURSIVE copies(n) AS (SELECT ? UNION ALL SELECT n + 1 FROM copies WHERE n < ?) "
        f"INSERT INTO main.{table} SELECT {', '.join(cells)} FROM copies, {schema}.{table}",
        (numbers.start, numbers.stop - 1),
    )


def is_usable(path: Path, sql: str) -> bool:
    """Whether a query takes little time and gives no more rows than the executor counts, so that all do the same work."""
    with sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True) as connection:
        end = time.process_time() + TOO_SLOW
        connection.set_progress_handler(lambda: time.process_time() > end, 10_000)
        try:
            return len(connection.execute(sql).fetchmany(COUNTED_ROWS + 1)) <= COUNTED_ROWS
        except sqlite3.Error:
            return False


@contextmanager
def contenders(root: Path, db_id: str) -> Iterator[list[Contender]]:
    with ExitStack() as stack:
        file = str(root / db_id / f"{db_id}.sqlite")
        raw = Raw(file)
        unlocked = Raw(f"file:{file}?mode=ro&immutable=1")
        found = [
            Contender("raw reused connection", lambda queries: [raw(sql) for sql in queries]),
            Contender("raw, opened as immutable", lambda queries: [unlocked(sql) for sql in queries]),
        ]
        plain = stack.enter_context(Executor(root, workers=WORKERS))
        cached = stack.enter_context(Executor(root, workers=WORKERS, cache_mb=256))
        found += [
            rival("executor, one by one", plain, lambda queries: [plain.run(db_id, sql) for sql in queries]),
            rival("executor, one batch", plain, lambda queries: plain.run_many([(db_id, sql) for sql in queries])),
            rival(
                "executor, one batch, whole", plain, lambda queries: plain.run_many([(db_id, q) for q in queries], True)
            ),
            rival("executor, remembered", cached, lambda queries: [cached.run(db_id, sql) for sql in queries]),
        ]
        tool = reference_tool(root)
        if tool is not None:
            found.append(Contender("reference's tool", lambda queries: [tool(db_id, sql) for sql in queries]))
        yield found


class Raw:
    """A connection a thread, each reused."""

    def __init__(self, uri: str) -> None:
        self._uri, self._local = uri, threading.local()

    def __call__(self, sql: str) -> object:
        if not hasattr(self._local, "connection"):
            self._local.connection = sqlite3.connect(self._uri, uri=self._uri.startswith("file:"))
        return self._local.connection.execute(sql).fetchall()


def rival(name: str, executor: Executor, run: Callable[[Sequence[str]], object]) -> Contender:
    return Contender(name, run, executor.worker_pids)


def reference_tool(root: Path) -> Callable[[str, str], object] | None:
    try:
        module = importlib.import_module("skyrl_gym.tools.sql")
    except ImportError:
        return None
    group = module.SQLCodeExecutorToolGroup(db_file_path=str(root))
    return lambda db_id, sql: group.sql(db_id, sql, 5)


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time of this process and others, in nanoseconds' resolution (Linux: the clock of a process id)."""
    return time.process_time() + sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)


def print_cpu(rivals: list[Contender], queries: list[str], rounds: int, seconds: float) -> None:
    """CPU time a query, one query after the other or in one batch, by one thread."""
    measured: dict[str, list[float]] = defaultdict(list)
    for number in range(-1, rounds):  # the first round is for warming up
        for contender in rivals:
            pids = contender.pids()
            runs, start, end = 0, cpu_seconds(pids), time.monotonic() + seconds
            while not runs or (number >= 0 and time.monotonic() < end):
                contender.run(queries)
                runs += 1
            if number >= 0:
                measured[contender.name].append((cpu_seconds(pids) - start) / runs / len(queries))
    base = measured[rivals[0].name]
    print("| | CPU per query | over raw |")
    print("|---|---:|---:|")
    for name, values in measured.items():
        ratio = statistics.median(value / other for value, other in zip(values, base, strict=True))
        print(f"| {name} | {1e6 * statistics.median(values):,.0f} µs | {ratio:.2f} |")


def print_load(rivals: list[Contender], queries: list[str], rounds: int, seconds: float) -> None:
    """Queries a second and how long one takes, when many threads ask one query at a time."""
    latencies: dict[str, list[float]] = defaultdict(list)
    rates: dict[str, list[float]] = defaultdict(list)
    chosen = [rival for rival in rivals if "batch" not in rival.name]
    for number in range(-1, max(1, rounds // 3)):
        for contender in chosen:
            found, rate = under_load(contender, queries, 2 * seconds)
            if number >= 0:
                latencies[contender.name] += found
                rates[contender.name].append(rate)
    print(f"| {THREADS} threads | queries/s | p50 | p99 |")
    print("|---|---:|---:|---:|")
    for name, values in latencies.items():
        cuts = statistics.quantiles(values, n=100)
        rate = statistics.median(rates[name])
        print(
            f"| {name.removesuffix(', one by one')} | {rate:,.0f} | {1e3 * cuts[49]:.2f} ms | {1e3 * cuts[98]:.2f} ms |"
        )


def under_load(contender: Contender, queries: list[str], seconds: float) -> tuple[list[float], float]:
    start = time.monotonic()

    def ask(number: int) -> list[float]:
        order, found = random.Random(number).sample(queries, len(queries)), []
        for sql in itertools.cycle(order):
            before = time.monotonic()
            contender.run([sql])
            found.append(time.monotonic() - before)
            if time.monotonic() - start > seconds:
                break
        return found

    with ThreadPoolExecutor(THREADS) as pool:
        latencies = [latency for found in pool.map(ask, range(THREADS)) for latency in found]
    return latencies, len(latencies) / (time.monotonic() - start)


if __name__ == "__main__":
    main()
