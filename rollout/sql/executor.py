"""Runs SQL in a pool of worker processes, which any query may exhaust or crash without harm to this process.

Each worker runs one query at a time under rollout.sql.guard. A query past its budget of VM steps or CPU seconds is a
timeout; one that can't be interrupted is killed by the kernel's CPU limit and its worker replaced. Work is counted in
steps and CPU time, never in wall time, so a busy machine gives the same verdicts; a worker that stands still for a long
while is an infrastructure failure and scores nothing.

Left out: a cache of results and batches in one frame; queries are independent here.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from rollout.errors import InfrastructureError, UserError
from rollout.sql import observation as text
from rollout.sql.engines import ENGINES
from rollout.sql.guard import MAX_SQL_BYTES
from rollout.worker_process import STALL_SECONDS, Died, Stalled, WorkerProcess, boot


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


class Executor:
    """Runs queries against `<database_root>/<db_id>/<db_id>.sqlite`, read-only. Threads may share one.

    A db_id may be a path of plain names: `a/b/shop` is `<database_root>/a/b/shop/shop.sqlite`, and `a/b/old.sqlite` is
    that file itself. `engine` is sqlite or
    duckdb, whose files end in `.duckdb`.
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
        engine: str = "sqlite",
    ) -> None:
        self._root = Path(database_root)
        if engine not in ENGINES:
            raise UserError(f"engine {engine!r}: expected one of {', '.join(ENGINES)}")
        self._engine = ENGINES[engine]
        if not self._root.is_dir():
            raise InfrastructureError(
                f"database root {self._root}: no such folder; expected <db_id>/<db_id>{self._engine.suffix} in it"
            )
        self._timeout = timeout
        self._settings = (engine, str(self._root.resolve()), timeout, max_vm_steps, max_rows, max_observation_chars)
        self._max_chars = max_observation_chars
        self._paths: dict[str, tuple[str, str]] = {}
        self._closed = False
        self._lock = threading.Lock()
        self._workers: set[WorkerProcess] = set()
        self._free: queue.LifoQueue[WorkerProcess | None] = queue.LifoQueue()
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
                except Stalled:
                    self._discard(worker)
                    raise InfrastructureError(
                        f"database {db_id}: a SQL worker stands still; is the disk of the database in order?"
                    ) from None
                except Died:
                    if self._discard(worker) == -signal.SIGXCPU:
                        return Result("timeout", (), (), False, text.TIMEOUT, text.TIMEOUT, self._timeout)
                    if last:  # twice in a row: it is the query's doing
                        return self._failed("the query crashed the database engine")
        if reply[0] == "broken":
            raise InfrastructureError(reply[5])
        return Result(*reply)

    def run_many(self, requests: Iterable[tuple[str, str]], whole: bool = False) -> list[Result]:
        """Runs (db_id, SQL) pairs over all workers; results in the order of the requests."""
        return list(self._pool.map(lambda request: self.run(request[0], request[1], whole), requests))

    def locate(self, db_id: str) -> Path:
        """The file of a database, links followed. Raises InfrastructureError if it is missing or outside of the root."""
        return Path(self._locate(db_id)[0])

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

    def _start(self) -> WorkerProcess:
        with self._lock:
            if self._closed:
                raise InfrastructureError("the SQL executor is closed")
            try:
                worker = WorkerProcess(
                    boot("rollout.sql.worker", self._engine.site_packages), self._settings, STALL_SECONDS
                )
            except OSError as error:
                raise InfrastructureError(f"a SQL worker process can't be started: {error}") from None
            self._workers.add(worker)
            return worker

    def _discard(self, worker: WorkerProcess) -> int:
        code = worker.bury()
        with self._lock:
            self._workers.discard(worker)
        return code

    @contextmanager
    def _worker(self) -> Iterator[WorkerProcess]:
        """A free worker, for one exchange. The queue holds None in the place of one that was discarded."""
        slot: WorkerProcess | None = self._free.get()
        try:
            if slot is None:
                slot = self._start()
            yield slot
        finally:
            self._free.put(slot if slot in self._workers else None)

    def _locate(self, db_id: str) -> tuple[str, str]:
        known = self._paths.get(db_id)
        if known is None:
            parts = db_id.split("/")
            if not all(parts) or any(part.startswith(".") or "\\" in part or "\0" in part for part in parts):
                raise InfrastructureError(
                    f"db_id {db_id!r}: expected the plain name of a folder in the database root, or such names with / between"
                )
            named = parts[-1].endswith(self._engine.suffix)
            path = self._root.joinpath(*parts, *([] if named else [parts[-1] + self._engine.suffix]))
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
