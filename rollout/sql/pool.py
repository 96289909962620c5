"""A pool of SQL worker processes that many threads put queries to, in batches where queries wait.

There is no thread between the callers and the workers. A caller that finds a worker free takes what waits (its own query
and others', up to a fair share) to that worker in one frame, hands out the answers and goes on; so a query on an idle
pool costs one round trip, and a crowd's queries travel together. A worker stops a batch that takes long, and a caller
that waits long gives back what its worker hasn't begun, so that nobody waits behind a slow query while a worker is free.

A shared page tells which query of its batch a worker runs. If it dies, that one is to blame: past its CPU time it is a
timeout; otherwise it is tried once more, alone. The others of the batch run again.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rollout.errors import InfrastructureError
from rollout.worker_process import Died, Stalled, WorkerProcess

MAX_BATCH = 32  # queries in one frame; at most 255, the page's count
MAX_BATCH_CHARS = 1_000_000
PATIENCE_SECONDS = 0.05  # until waiting queries are given back by a caller whose worker is silent
CLOSE_SECONDS = 10.0

Query = tuple[str, str, str, bool]  # path, URI, SQL, whole


class Job:
    """One query on its way.

    `reply` is the worker's, a rollout.sql.result.Answer; or "killed" (out of CPU time), "crashed" (two workers) or
    "stalled"; or an InfrastructureError.
    """

    __slots__ = ("alone", "caller", "query", "reply")

    def __init__(self, query: Query, caller: _Caller) -> None:
        self.query, self.caller = query, caller
        self.reply: Any = None
        self.alone = False  # it had a worker's death upon it before


class _Caller:
    """A thread that waits for its jobs. Changed under the pool's lock."""

    __slots__ = ("bell", "left", "serving")

    def __init__(self, jobs: int) -> None:
        self.left = jobs
        self.serving = False  # it is with a worker, and will look what waits when it is back
        self.bell: threading.Lock | None = None  # held; it sleeps until this is released

    def wake(self) -> None:
        if self.bell is not None:
            self.bell.release()
            self.bell = None


class Worker(WorkerProcess):
    """A worker process with a page of memory in which it counts the queries of its batch."""

    def __init__(self, arguments: Sequence[str], settings: tuple[Any, ...], stall_seconds: float) -> None:
        file = _page_file()
        try:
            self._page = mmap.mmap(file, mmap.PAGESIZE)
            super().__init__(arguments, (file, *settings), stall_seconds, pass_fds=(file,))
        finally:
            os.close(file)

    def begin(self) -> None:
        """Before a batch is asked."""
        self._page[0] = 0

    @property
    def at(self) -> int:
        """Index, in its batch, of the query that the worker runs."""
        return self._page[0]


def _page_file() -> int:
    if sys.platform == "linux":
        file = os.memfd_create("sql-worker")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.ftruncate(file, mmap.PAGESIZE)
    return file


class Pool:
    """Workers and the queries that wait for one. `start` makes a worker or raises OSError."""

    def __init__(self, start: Callable[[], Worker], size: int) -> None:
        self._start = start
        self._size = size
        self._lock = threading.Lock()
        self._gone = threading.Condition(self._lock)
        self._waiting: deque[Job] = deque()
        self._free: list[Worker | None] = []  # None stands for one that is to be started
        self._alive: set[Worker] = set()
        self._closed = False
        self.deaths = 0  # workers that ended while they had something to do
        self._helpers = ThreadPoolExecutor(max(1, size), thread_name_prefix="sql")
        try:
            for _ in range(size):
                self._free.append(self._started())
        except InfrastructureError:
            self.close()
            raise

    def answer(self, queries: Sequence[Query]) -> list[Job]:
        """Runs queries; returns their jobs, done."""
        caller = _Caller(len(queries))
        jobs = [Job(query, caller) for query in queries]
        with self._lock:
            if self._closed:
                raise closed_error()
            self._waiting.extend(jobs)
            taken = self._next(caller)
        try:
            while taken is not None or caller.left:
                if taken is not None:
                    taken = self._serve(*taken, caller)
                    continue
                bell = caller.bell
                if bell is not None:
                    bell.acquire()
                with self._lock:
                    taken = self._next(caller)
        except BaseException:  # Ctrl-C: what it asked for must not hold up the others
            with self._lock:
                caller.serving = True
                self._call_others()
            raise
        return jobs

    def _next(self, caller: _Caller) -> tuple[Worker | None, list[Job]] | None:
        """What a caller is to do now: a batch to take to a worker, or nothing but to sleep or to leave. With the lock."""
        taken = self._take() if caller.left else None
        caller.serving = taken is not None
        if self._waiting:
            self._call_others()
        caller.bell = None
        if taken is None and caller.left:
            caller.bell = threading.Lock()
            caller.bell.acquire()
        return taken

    def close(self) -> None:
        """Stops all workers. Queries that wait or run end with an InfrastructureError."""
        with self._lock:
            self._closed = True
            for worker in self._alive:
                worker.kill()
            while self._waiting:
                self._finish(self._waiting.popleft(), closed_error())
            idle, self._free = self._free, []
        for spare in idle:
            if spare is not None:
                self._bury(spare)
        self._helpers.shutdown()
        with self._gone:  # the others are buried by those who wait for their answers
            self._gone.wait_for(lambda: not self._alive, CLOSE_SECONDS)

    def pids(self) -> list[int]:
        with self._lock:
            return sorted(worker.pid for worker in self._alive)

    def _take(self) -> tuple[Worker | None, list[Job]] | None:
        """A free worker and a batch for it, if there are any. With the lock."""
        waiting = self._waiting
        if not waiting or not self._free:
            return None
        share = min(MAX_BATCH, -(-len(waiting) // self._size))
        batch = [waiting.popleft()]
        if share == 1:
            return self._free.pop(), batch
        chars = len(batch[0].query[2])
        while len(batch) < share and not batch[0].alone and not waiting[0].alone:
            chars += len(waiting[0].query[2])
            if chars > MAX_BATCH_CHARS:
                break
            batch.append(waiting.popleft())
        return self._free.pop(), batch

    def _call_others(self) -> None:
        """Sees to it that someone comes for what waits, if a worker is free. With the lock."""
        if self._waiting and self._free:
            caller = self._waiting[0].caller
            if caller.serving:  # with more queries than one batch, or given back by another
                self._helpers.submit(self._help)
            else:
                caller.wake()

    def _help(self) -> None:
        """Does a caller's part while that one is with another worker."""
        helper = _Caller(1)  # who has something left for as long as there is something to take
        with self._lock:
            taken = self._next(helper)
        while taken is not None:
            taken = self._serve(*taken, helper)

    def _serve(
        self, worker: Worker | None, batch: list[Job], caller: _Caller
    ) -> tuple[Worker | None, list[Job]] | None:
        """Takes a batch to a worker; afterwards each of its jobs is done or waits again. Returns what is next."""
        replies: Sequence[Any] = ()
        blamed: tuple[int, object] | None = None
        usable = interrupted = True
        try:
            worker = worker or self._started()
            replies, blamed = self._ask(worker, batch)
            usable, interrupted = blamed is None, False
        except InfrastructureError as error:  # no worker can be started
            blamed, usable, interrupted = (0, error), False, False
        finally:
            usable = usable and not interrupted
            if not usable and worker is not None:
                self._bury(worker)
            with self._lock:
                self._settle(batch, replies, blamed)
                if not self._closed:
                    self._free.append(worker if usable else None)
                taken = None if interrupted else self._next(caller)
                if interrupted:
                    self._call_others()
            if self._closed and usable and worker is not None:
                self._bury(worker)
        return taken

    def _ask(self, worker: Worker, batch: list[Job]) -> tuple[Sequence[Any], tuple[int, object] | None]:
        """The replies to the first queries of a batch, or which one is to blame, and why."""
        worker.begin()
        try:
            if len(batch) == 1:
                return worker.ask((batch[0].query,)), None
            request = tuple([job.query for job in batch])
            return worker.ask(request, PATIENCE_SECONDS, lambda: self._give_back(batch, worker.at)), None
        except Died:
            at, code = worker.at, worker.bury()
            if not worker.started and code >= 0:  # by itself, not by a signal
                reason = "a SQL worker process ends before it is ready; what it said stands on standard error"
                return (), (at, InfrastructureError(reason))
            return (), (at, "killed" if code == -signal.SIGXCPU else "crashed")
        except Stalled:
            return (), (worker.at, "stalled")

    def _settle(self, batch: list[Job], replies: Sequence[Any], blamed: tuple[int, object] | None) -> None:
        """Gives each job of a batch its answer or puts it back in front. With the lock."""
        again = []
        for index, job in enumerate(batch):
            if index < len(replies):
                self._finish(job, replies[index])
            elif self._closed:
                self._finish(job, closed_error())
            elif blamed is None or blamed[0] != index:
                again.append(job)
            elif blamed[1] == "crashed" and not job.alone:
                job.alone = True
                again.append(job)
            else:
                self._finish(job, blamed[1])
        self._waiting.extendleft(reversed(again))

    def _give_back(self, batch: list[Job], running: int) -> None:
        """Lets others have what a silent worker hasn't begun. If it does it nonetheless, the first answer counts."""
        with self._lock:
            if self._closed:  # nobody would come for it; it ends with its batch
                return
            back = batch[running + 1 :]
            del batch[running + 1 :]
            self._waiting.extendleft(reversed(back))
            self._call_others()

    def _finish(self, job: Job, reply: Any) -> None:
        job.reply = reply
        job.caller.left -= 1
        if not job.caller.left:
            job.caller.wake()

    def _started(self) -> Worker:
        with self._lock:
            if self._closed:
                raise closed_error()
            try:
                worker = self._start()
            except OSError as error:
                raise InfrastructureError(f"a SQL worker process can't be started: {error}") from None
            self._alive.add(worker)
            return worker

    def _bury(self, worker: Worker) -> None:
        worker.bury()
        with self._lock:
            self._alive.discard(worker)
            self.deaths += not self._closed
            self._gone.notify_all()


def closed_error() -> InfrastructureError:
    return InfrastructureError("the SQL executor is closed")
