"""Runs SQL in a pool of worker processes, which any query may exhaust or crash without harm to this process.

Each worker runs one query at a time under rollout.sql.guard. A query past its budget of VM steps or CPU seconds is a
timeout; one that can't be interrupted is killed by the kernel's CPU limit and its worker replaced. Work is counted in
steps and CPU time, never in wall time, so a busy machine gives the same verdicts; a worker that stands still for a long
while is an infrastructure failure and scores nothing.

Left out: a cache of results and batches in one frame; queries are independent here.
"""

from __future__ import annotations

import marshal
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rollout.errors import InfrastructureError
from rollout.sql import observation as text
from rollout.sql.guard import MAX_SQL_BYTES

PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from rollout.sql.worker import main; main()"
STALL_SECONDS = 30.0  # without an answer and without using CPU time; one that uses it meets its CPU limit


@dataclass(frozen=True, slots=True)
class Result:
    """What a query gave.

    `status` is ok, denied (not a read), error, or timeout. `rows` are all rows if the whole result was asked for,
    otherwise the first ones; `truncated` says that there are more. `observation` is what the model reads. `seconds` is
    CPU time.
    """

    status: str
    columns: tuple[str, ...] = ()
    rows: list[tuple[text.Cell, ...]] | tuple[()] = ()
    truncated: bool = False
    observation: str = ""
    error: str = ""
    seconds: float = 0.0


class _Died(Exception):
    """The worker's process ended before it answered."""


class _Stalled(Exception):
    """The worker neither answers nor computes."""


class _Worker:
    """One worker process and its pipes. One thread at a time uses it; `kill` may come from any."""

    def __init__(self, settings: tuple[Any, ...]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", BOOT, PACKAGE_ROOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for the parent
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._poll = select.poll()
        self._poll.register(self._stdout, select.POLLIN)
        self._settings: tuple[Any, ...] | None = settings

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: tuple[Any, ...]) -> tuple[Any, ...]:
        """One request, one reply. Raises _Died or _Stalled; the worker is then of no more use."""
        if self._settings is not None:
            self._exchange(self._settings)
            self._settings = None
        return self._exchange(request)

    def kill(self) -> None:
        self._process.kill()

    def bury(self) -> int:
        """Kills it if it still lives, frees everything, returns how it ended (negative: the signal)."""
        self._stdin.close()
        self._stdout.close()
        try:
            return self._process.wait(timeout=0.2)  # it ends by itself when its input closes, or has died already
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _exchange(self, request: tuple[Any, ...]) -> tuple[Any, ...]:
        body = marshal.dumps(request)
        data = memoryview(len(body).to_bytes(8, "little") + body)
        try:
            while data:
                data = data[os.write(self._stdin.fileno(), data) :]
        except OSError:
            raise _Died from None
        size = int.from_bytes(self._read(8), "little")
        reply: tuple[Any, ...] = marshal.loads(self._read(size))
        return reply

    def _read(self, size: int) -> bytearray:
        data = bytearray()
        used = -1.0
        while len(data) < size:
            if not self._poll.poll(STALL_SECONDS * 1000):
                before, used = used, _cpu_seconds(self.pid)
                if used == before:
                    raise _Stalled
                continue
            chunk = os.read(self._stdout.fileno(), min(size - len(data), 1 << 20))
            if not chunk:
                raise _Died
            data += chunk
        return data


def _cpu_seconds(pid: int) -> float:
    """CPU time of a process so far; -1 where the system doesn't tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Executor:
    """Runs queries against `<database_root>/<db_id>/<db_id>.sqlite`, read-only. Threads may share one.

    A query may take `max_vm_steps` steps of SQLite's virtual machine and, as a backup, `timeout` CPU seconds; its
    observation has at most `max_rows` rows and `max_observation_chars` characters.
    """

    def __init__(
        self,
        database_root: str | Path,
        timeout: float = 5.0,
        workers: int = 2,
        max_vm_steps: int = 50_000_000,
        max_rows: int = 50,
        max_observation_chars: int = 9000,
    ) -> None:
        self._root = Path(database_root)
        if not self._root.is_dir():
            raise InfrastructureError(
                f"database root {self._root}: no such folder; expected <db_id>/<db_id>.sqlite in it"
            )
        self._settings = (timeout, max_vm_steps, max_rows, max_observation_chars)
        self._max_chars = max_observation_chars
        self._paths: dict[str, tuple[str, str]] = {}
        self._closed = False
        self._lock = threading.Lock()
        self._workers: set[_Worker] = set()
        self._free: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="sql")
        for _ in range(workers):
            self._free.put(self._start())

    def run(self, db_id: str, sql: str, whole: bool = False) -> Result:
        """Runs one query. `whole` fetches every row (for grading), and a result past the bound is an error.

        Raises InfrastructureError if the database is missing, damaged or outside of the root, or no worker can be had.
        """
        path, uri = self._locate(db_id)
        if len(sql) > MAX_SQL_BYTES:
            return self._failed(f"the statement is longer than {MAX_SQL_BYTES} characters")
        for last in (False, True):
            with self._worker() as worker:
                try:
                    reply = worker.ask((path, uri, sql, whole))
                    break
                except _Stalled:
                    self._discard(worker)
                    raise InfrastructureError(
                        f"database {db_id}: a SQL worker stands still; is the disk of the database in order?"
                    ) from None
                except _Died:
                    if self._discard(worker) == -signal.SIGXCPU:
                        return Result("timeout", (), (), False, text.TIMEOUT, text.TIMEOUT, self._settings[0])
                    if last:  # twice in a row: it is the query's doing
                        return self._failed("the query crashed the database engine")
        if reply[0] == "broken":
            raise InfrastructureError(reply[5])
        return Result(*reply)

    def run_many(self, requests: Iterable[tuple[str, str]], whole: bool = False) -> list[Result]:
        """Runs (db_id, SQL) pairs over all workers; results in the order of the requests."""
        return list(self._pool.map(lambda request: self.run(request[0], request[1], whole), requests))

    def close(self) -> None:
        """Stops all workers. Queries still running end with an InfrastructureError in their threads."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for worker in self._workers:
                worker.kill()
        self._free.put(None)
        while self._workers:  # each is in the queue, or in a thread that finds it dead
            idle = self._free.get()
            if idle is not None:
                self._discard(idle)
        self._free.put(None)  # wakes every waiting thread in turn
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def worker_pids(self) -> list[int]:
        """Process ids of the workers that live now."""
        with self._lock:
            return sorted(worker.pid for worker in self._workers)

    def _start(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise InfrastructureError("the SQL executor is closed")
            try:
                worker = _Worker(self._settings)
            except OSError as error:
                raise InfrastructureError(f"a SQL worker process can't be started: {error}") from None
            self._workers.add(worker)
            return worker

    def _discard(self, worker: _Worker) -> int:
        code = worker.bury()
        with self._lock:
            self._workers.discard(worker)
        return code

    @contextmanager
    def _worker(self) -> Iterator[_Worker]:
        """A free worker, for one exchange. The queue holds None in the place of one that was discarded."""
        slot: _Worker | None = self._free.get()
        try:
            if slot is None:
                slot = self._start()
            yield slot
        finally:
            self._free.put(slot if slot in self._workers else None)

    def _locate(self, db_id: str) -> tuple[str, str]:
        known = self._paths.get(db_id)
        if known is None:
            if not db_id or db_id.startswith(".") or any(c in db_id for c in "/\\\0"):
                raise InfrastructureError(f"db_id {db_id!r}: expected the plain name of a folder in the database root")
            path = self._root / db_id / f"{db_id}.sqlite"
            try:
                resolved = path.resolve(strict=True)
            except (OSError, UnicodeError) as error:
                raise InfrastructureError(f"database {db_id}: {path} can't be opened: {error}") from None
            if not resolved.is_relative_to(self._root.resolve()):
                raise InfrastructureError(f"database {db_id}: {path} leads out of the database root; copy it there")
            known = self._paths[db_id] = (str(resolved), f"file:{quote(os.fsencode(resolved))}?mode=ro&immutable=1")
        return known

    def _failed(self, error: str) -> Result:
        return Result("error", observation=text.render_error(error, self._max_chars), error=error)
