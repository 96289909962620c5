"""Runs very many mixed queries, some of them hostile, and checks that nothing adds up: memory, verdicts, workers.

    python benchmarks/soak.py --queries 200000 --workers 2 --hostile 0.05
    python benchmarks/soak.py --questions questions.jsonl --databases DIR --burn

Harmless queries are the gold queries of the questions, or of generated demo databases; hostile ones come from the corpus
in tests/attacks. Every query runs many times. Each verdict must be that of the first time, harmless ones that of a plain
sqlite3 connection, hostile ones what the corpus expects. With --burn all runs again while processes keep every core busy,
and must give the same.

Memory counts as flat if a process holds at most 5% more over the last fifth of the queries than over the fifth that
begins at 55%. What it holds is the least in each twentieth, between bombs, whose memory goes back some queries later.
Statements that only the death of a worker ends come in the first quarter alone, so that the workers measured have served
for long. The exit status is 1 if anything failed.

Left out: the result cache, which is off, and speed, which benchmarks/sql.py measures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import marshal
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from attacks import ATTACKS, databases

from rollout.errors import InfrastructureError
from rollout.sql import Executor, Result, clock
from rollout.sql.engines import MAX_RESULT_ROWS

ROOT = Path(__file__).resolve().parents[1]

MAX_VM_STEPS = 1_000_000
CPU_SECONDS = 2.0
BATCH = 8  # queries that a thread hands over at once
STUCK_SECONDS = 300.0  # without any batch done
GROWTH = 1.05
NOISE = 1 << 20  # bytes of growth that mean nothing
MEASURED_QUERIES = 50_000  # from this many on, memory is judged: before that, processes still warm up


@dataclass(frozen=True)
class Query:
    """`expected` are the statuses that are right; `same` says that the verdict must be the same every time."""

    db_id: str
    sql: str
    whole: bool
    expected: frozenset[str]
    same: bool = True
    kills: bool = False
    reference: bytes | None = None
    hostile: bool = False


class Sample(NamedTuple):
    done: float  # share of the queries
    parent: int  # bytes
    workers: dict[int, int]  # bytes by process id


class Ledger:
    """First verdicts, and all that was wrong since. Threads share one."""

    def __init__(self, queries: list[Query]) -> None:
        self.queries = queries
        self.statuses: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self._first = array("Q", bytes(8 * len(queries)))  # 0: not seen. Allocated at once, so that memory shows leaks.
        self._lock = threading.Lock()

    def record(self, index: int, status: str, mark: bytes, content: bytes) -> None:
        """A verdict: `mark` is of all that came back, `content` of columns and rows."""
        query = self.queries[index]
        seen = int.from_bytes(mark, "little") | 1
        with self._lock:
            self.statuses[("hostile " if query.hostile else "harmless ") + status] += 1
            first = self._first[index] or seen
            self._first[index] = first
            if status not in query.expected:
                self._fail(query, f"{status} instead of {' or '.join(sorted(query.expected))}")
            elif query.reference is not None and content != query.reference:
                self._fail(query, "not what sqlite3 gives")
            elif query.same and first != seen:
                self._fail(query, "not the first verdict")

    def _fail(self, query: Query, what: str) -> None:
        self.wrong[f"{what}: {query.db_id}: {query.sql[:200]!r}{' (whole)' if query.whole else ''}"] += 1


def hostile(scratch: Path) -> Iterator[Query]:
    for attack in ATTACKS.values():
        for statement in attack.statements:
            sql = statement.replace("{scratch}", str(scratch))
            certain = attack.kills is False and "|" not in attack.expected
            for whole in (True, False):
                expected = frozenset(attack.expected.split("|"))
                kills = attack.kills is not False
                yield Query(attack.database, sql, whole, expected, certain, kills, hostile=True)


def harmless(questions: Path, root: Path) -> Iterator[Query]:
    """Gold queries with what a plain connection gives. Those that throw dice have no reference."""
    pairs = {(row["db_id"], row["gold_sql"]) for row in map(json.loads, questions.read_text().splitlines())}
    for db_id, sql in sorted(pairs):
        status, content = reference(root / db_id / f"{db_id}.sqlite", sql)
        expected = frozenset({status})
        yield Query(db_id, sql, True, expected, reference=content if "random" not in sql.lower() else None)
        # Shown results are cut, so that one too large as a whole or too long to count may be fine.
        yield Query(db_id, sql, False, expected if status == "ok" else expected | {"ok"})


def reference(path: Path, sql: str) -> tuple[str, bytes | None]:
    """Status and content as a plain connection gives them within the same steps."""
    connection = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    steps = iter(range(MAX_VM_STEPS // 10_000 - 1))
    connection.set_progress_handler(lambda: next(steps, None) is None, 10_000)
    try:
        cursor = connection.execute(sql)
        rows = cursor.fetchmany(MAX_RESULT_ROWS + 1)
    except sqlite3.Error as error:
        return ("timeout" if "interrupted" in str(error) else "error"), None
    finally:
        connection.close()
    if len(rows) > MAX_RESULT_ROWS:
        return "error", None
    return "ok", digest(tuple(column[0] for column in cursor.description), rows)


def digest(*parts: Any) -> bytes:
    # Version 2 of the format has no references, which depend on what else holds an object.
    return hashlib.blake2b(marshal.dumps(parts, 2), digest_size=8).digest()


class Soak:
    """One run over `count` queries, drawn by `seed` alone."""

    def __init__(self, ledger: Ledger, executor: Executor, count: int, share: float, seed: int, threads: int) -> None:
        self.ledger, self._executor, self._share, self._seed, self._threads = ledger, executor, share, seed, threads
        self._batches = max(1, count // BATCH)
        indices = range(len(ledger.queries))
        self._harmless = [i for i in indices if not ledger.queries[i].hostile]
        self._hostile = [i for i in indices if ledger.queries[i].hostile]
        self._gentle = [i for i in self._hostile if not ledger.queries[i].kills]
        self.done, self._shown = 0, -1
        self.samples: list[Sample] = []

    def run(self) -> bool:
        """Whether it came to its end. Shows progress."""
        pool = ThreadPoolExecutor(self._threads)
        waiting = {pool.submit(self._thread, number) for number in range(self._threads)}
        last, since = 0, time.monotonic()
        while waiting:
            finished, waiting = wait(waiting, timeout=0.5)
            for future in finished:
                future.result()
            self.samples.append(self._sample())
            if self.done != last:
                last, since = self.done, time.monotonic()
            elif time.monotonic() - since > STUCK_SECONDS:
                return False
            self._show()
        if sys.stderr.isatty():
            print(file=sys.stderr)
        return True

    def _thread(self, number: int) -> None:
        for batch in range(number, self._batches, self._threads):
            draw = random.Random(f"{self._seed}/{batch}")
            pool = self._hostile if batch < self._batches // 4 else self._gentle
            indices = [
                draw.choice(pool) if draw.random() < self._share else draw.choice(self._harmless) for _ in range(BATCH)
            ]
            self._ask(indices)
            self.done += len(indices)

    def _ask(self, indices: list[int]) -> None:
        """A batch in one call where no query of it may find its database broken, which would end the call."""
        queries = self.ledger.queries
        together = [i for i in indices if "broken" not in queries[i].expected]
        for whole in (True, False):
            some = [i for i in together if queries[i].whole is whole]
            results = self._executor.run_many([(queries[i].db_id, queries[i].sql) for i in some], whole)
            for index, result in zip(some, results, strict=True):
                self._record(index, result)
        for index in set(indices) - set(together):
            query = queries[index]
            try:
                self._record(index, self._executor.run(query.db_id, query.sql, query.whole))
            except InfrastructureError:
                self.ledger.record(index, "broken", b"\1", b"")

    def _record(self, index: int, result: Result) -> None:
        content = digest(result.columns, list(result.rows))
        mark = digest(result.status, content, result.truncated, result.observation, result.error)
        self.ledger.record(index, result.status, mark, content)

    def _sample(self) -> Sample:
        workers = {pid: size for pid in self._executor.worker_pids() if (size := resident(pid))}
        return Sample(self.done / (self._batches * BATCH), resident(os.getpid()), workers)

    def _show(self) -> None:
        done, parent, workers = self.samples[-1]
        terminal = sys.stderr.isatty()
        if not terminal and int(done * 10) == self._shown:
            return
        self._shown = int(done * 10)
        memory = ", ".join(f"{size / 1e6:.0f}" for size in workers.values())
        line = f"{self.done:>8} queries ({done:4.0%}), {self.ledger.wrong.total()} wrong, "
        line += f"MB: parent {parent / 1e6:.0f}, workers {memory}   "
        print(f"\r{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)


def resident(pid: int) -> int:
    """Bytes of memory that a process holds; 0 if it is gone or the system doesn't tell."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def growth(samples: list[Sample]) -> list[tuple[str, int, int]]:
    """Bytes of the parent and of each worker that served to the end, over the fifth from 55% on and over the last."""
    sizes: dict[str, list[tuple[float, int]]] = {"parent": [(s.done, s.parent) for s in samples]}
    for pid in sorted(samples[-1].workers):
        sizes[f"worker {pid}"] = [(s.done, s.workers[pid]) for s in samples if pid in s.workers]
    rows = []
    for name, series in sizes.items():
        early, late = (_held(series, start) for start in (0.55, 0.8))
        if early and late:
            rows.append((name, early, late))
    return rows


def _held(series: list[tuple[float, int]], start: float) -> int:
    """The mean over four twentieths of what was least in each; 0 where one of them wasn't seen."""
    least = [
        min((size for done, size in series if start + 0.05 * i <= done <= start + 0.05 * (i + 1)), default=0)
        for i in range(4)
    ]
    return round(sum(least) / 4) if all(least) else 0


def grew(before: int, after: int) -> bool:
    return after > before * GROWTH and after - before > NOISE


@contextmanager
def burning(cores: int) -> Iterator[None]:
    """Keeps cores busy with processes that do nothing but compute."""
    burners = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(cores)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def report(soak: Soak, ended: bool, seconds: float, stats: dict[str, int]) -> bool:
    """Prints what was seen; whether all is well."""
    print(f"{soak.done} queries in {seconds:.0f} s ({soak.done / seconds:.0f}/s)")
    for status, count in sorted(soak.ledger.statuses.items()):
        print(f"  {status:<20}{count:>9}")
    judged = soak.done >= MEASURED_QUERIES
    print("memory in MB        55-75%   80-100%" + ("" if judged else "   (too few queries to judge)"))
    rows = growth(soak.samples)
    for name, before, after in rows:
        mark = "  GREW" if judged and grew(before, after) else ""
        print(f"  {name:<16}{before / 1e6:>9.1f} {after / 1e6:>9.1f}{mark}")
    print("workers:", ", ".join(f"{name} {count}" for name, count in stats.items()) or "no counts")
    for what, count in soak.ledger.wrong.most_common(20):
        print(f"WRONG {count}x {what}")
    if not ended:
        print(f"STUCK: no answer for {STUCK_SECONDS:.0f} s")
    return ended and not soak.ledger.wrong and not (judged and any(grew(before, after) for _, before, after in rows))


def prepare(folder: Path, arguments: argparse.Namespace) -> list[Query]:
    """Puts all databases into one root, with the queries on them."""
    root = folder / "databases"
    questions, source = arguments.questions, arguments.databases
    if questions is None:
        from sqlrl_jax.data.demo.generate import generate

        demo = generate(
            folder / "demo",
            seed=1,
            train_databases=40,
            heldout_databases=1,
            questions_per_database=20,
            demonstrations=False,
        )
        questions, source = demo / "train.jsonl", demo / "databases"
    shutil.copytree(source, root)
    for name in sorted({attack.database for attack in ATTACKS.values()}):
        databases.make(root, name)
    (folder / "scratch").mkdir()
    return [*harmless(questions, root), *hostile(folder / "scratch")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--hostile", type=float, default=0.05, help="share of hostile queries")
    parser.add_argument("--questions", type=Path, help="JSON lines with db_id and gold_sql; needs --databases")
    parser.add_argument("--databases", type=Path)
    parser.add_argument("--burn", action="store_true", help="run all again while every core is kept busy")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if (arguments.questions is None) != (arguments.databases is None):
        parser.error("--questions and --databases go together")
    clock.stop()  # for the plain connections
    good = True
    with tempfile.TemporaryDirectory(prefix="soak.") as folder:
        queries = prepare(Path(folder), arguments)
        print(f"{sum(not q.hostile for q in queries)} harmless and {sum(q.hostile for q in queries)} hostile queries")
        ledger = Ledger(queries)
        for burn in (False, True) if arguments.burn else (False,):
            print("with every core kept busy" if burn else "alone")
            with (
                burning((os.cpu_count() or 1) if burn else 0),
                Executor(Path(folder, "databases"), CPU_SECONDS, arguments.workers, MAX_VM_STEPS) as executor,
            ):
                soak = Soak(
                    ledger, executor, arguments.queries, arguments.hostile, arguments.seed, 2 * arguments.workers
                )
                start = time.monotonic()
                ended = soak.run()
                good = report(soak, ended, time.monotonic() - start, executor.stats()) and good
                if not ended:
                    os._exit(1)  # its threads would wait for ever
            ledger.statuses.clear()
        left = sorted(path.name for path in Path(folder, "scratch").iterdir())
        if left:
            print(f"FILES made by queries: {left}")
    print("all is well" if good and not left else "FAILED")
    return 0 if good and not left else 1


if __name__ == "__main__":
    sys.exit(main())
