"""Runs SQL in a pool of worker processes, which any query may exhaust or crash without harm to this process.

Each worker runs one query at a time under the rules of its engine (rollout.sql.guard for SQLite). A query past its budget
of VM steps or CPU seconds is a timeout; one that can't be interrupted is killed by the kernel's CPU limit and its worker
replaced. Work is counted in steps and CPU time, never in wall time, so a busy machine gives the same verdicts; a worker
that stands still for a long while is an infrastructure failure and scores nothing.

How queries find workers is rollout.sql.pool; what is remembered, rollout.sql.result_cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from rollout.errors import InfrastructureError, UserError
from rollout.sql import observation as text
from rollout.sql.engines import ENGINES
from rollout.sql.guard import MAX_SQL_BYTES
from rollout.sql.pool import Job, Pool, Query, Worker
from rollout.sql.result import Answer, Result
from rollout.sql.result_cache import Key, ResultCache, content_of
from rollout.worker_process import STALL_SECONDS, boot

__all__ = ["Executor", "Result"]


class Executor:
    """Runs queries against `<database_root>/<db_id>/<db_id>.sqlite`, read-only. Threads may share one.

    A db_id may be a path of plain names: `a/b/shop` is `<database_root>/a/b/shop/shop.sqlite`, and `a/b/old.sqlite` is
    that file itself. `engine` is sqlite or duckdb, whose files end in `.duckdb`. A query may take `max_vm_steps` steps of
    SQLite's virtual machine and, as a backup, `timeout` CPU seconds; its observation has at most `max_rows` rows and
    `max_observation_chars` characters. Results are remembered in `cache_mb` megabytes; 0 runs every query.
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
        cache_mb: int = 0,
    ) -> None:
        self._root = Path(database_root)
        if engine not in ENGINES:
            raise UserError(f"engine {engine!r}: expected one of {', '.join(ENGINES)}")
        kind = self._kind = ENGINES[engine]
        if kind.site_packages and find_spec(engine) is None:
            raise UserError(
                f"environment.text2sql.engine = {engine}: the package is missing; install the extra {engine}"
            )
        self.engine = engine
        if not self._root.is_dir():
            raise InfrastructureError(
                f"database root {self._root}: no such folder; expected <db_id>/<db_id>{kind.suffix} in it"
            )
        self._timeout, self._shown = timeout, (max_rows, max_observation_chars)
        self._paths: dict[str, tuple[str, str]] = {}
        self._cache = ResultCache(cache_mb * 1_000_000) if cache_mb else None
        settings = (engine, timeout, max_vm_steps, max_rows, max_observation_chars, str(self._root.resolve()))
        arguments, stall_seconds = boot("rollout.sql.worker", kind.site_packages), STALL_SECONDS
        self._pool = Pool(lambda: Worker(arguments, settings, stall_seconds), workers)

    def run(self, db_id: str, sql: str, whole: bool = False) -> Result:
        """Runs one query. `whole` fetches every row (for grading), and a result past the bound is an error.

        Raises InfrastructureError if the database is missing, damaged or outside of the root, or no worker can be had.
        """
        query, known, key = self._prepare(db_id, sql, whole)
        return known or self._result(db_id, self._pool.answer((query,))[0], key)

    def run_many(self, requests: Iterable[tuple[str, str]], whole: bool = False) -> list[Result]:
        """Runs (db_id, SQL) pairs over all workers; results in the order of the requests."""
        asked = [(db_id, *self._prepare(db_id, sql, whole)) for db_id, sql in requests]
        jobs = iter(self._pool.answer([query for _, query, known, _ in asked if known is None]))
        return [known or self._result(db_id, next(jobs), key) for db_id, _, known, key in asked]

    def _prepare(self, db_id: str, sql: str, whole: bool) -> tuple[Query, Result | None, Key | None]:
        """The query; its result, if it is known already; otherwise the key to remember it by, if it can be."""
        path, uri = self._paths.get(db_id) or self._find(db_id)
        query = (path, uri, sql, whole)
        if len(sql) > MAX_SQL_BYTES:
            return query, self._failed(f"the statement is longer than {MAX_SQL_BYTES} characters"), None
        content = None if self._cache is None else content_of(path)
        if self._cache is None or content is None:
            return query, None, None
        key = (content, sql, whole)
        known = self._cache.get(key)
        return query, None if known is None else Result(*known[:6], 0.0, self._shown), key

    def locate(self, db_id: str) -> Path:
        """The file of a database, links followed. Raises InfrastructureError if it is missing or outside of the root."""
        return Path((self._paths.get(db_id) or self._find(db_id))[0])

    def stats(self) -> dict[str, int]:
        """Counts since the start: results remembered (hits) and not (misses), workers that ended at their work."""
        cache = self._cache
        hits, misses = (cache.hits, cache.misses) if cache is not None else (0, 0)
        return {"hits": hits, "misses": misses, "worker_deaths": self._pool.deaths}

    def close(self) -> None:
        """Stops all workers. Queries still running end with an InfrastructureError in their threads."""
        self._pool.close()

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def worker_pids(self) -> list[int]:
        """Process ids of the workers that live now."""
        return self._pool.pids()

    def _find(self, db_id: str) -> tuple[str, str]:
        parts = db_id.split("/")
        if not all(parts) or any(part.startswith(".") or "\\" in part or "\0" in part for part in parts):
            raise InfrastructureError(
                f"db_id {db_id!r}: expected the plain name of a folder in the database root, or such names with / between"
            )
        named = parts[-1].endswith(self._kind.suffix)
        path = self._root.joinpath(*parts, *([] if named else [parts[-1] + self._kind.suffix]))
        try:
            resolved = path.resolve(strict=True)
        except (OSError, UnicodeError, RuntimeError) as error:  # the last for links in a circle
            reason = error.strerror if isinstance(error, OSError) else error
            raise InfrastructureError(f"database {db_id}: {path} can't be opened: {reason}") from None
        if not resolved.is_relative_to(self._root.resolve()):
            raise InfrastructureError(f"database {db_id}: {path} leads out of the database root; copy it there")
        found = self._paths[db_id] = (str(resolved), f"file:{quote(os.fsencode(resolved))}?mode=ro&immutable=1")
        return found

    def _result(self, db_id: str, job: Job, key: Key | None) -> Result:
        reply = job.reply
        if isinstance(reply, tuple):
            answer: Answer = reply
            if answer[0] == "broken":
                raise InfrastructureError(answer[5])
            if key is not None and self._cache is not None and self._is_certain(answer):
                self._cache.put(key, answer, _size(job.query[2], answer))
            return Result(*answer, self._shown)
        if reply == "killed":
            return Result("timeout", observation=text.TIMEOUT, error=text.TIMEOUT, seconds=self._timeout)
        if reply == "crashed":
            return self._failed("the query crashed the database engine")
        if reply == "stalled":
            raise InfrastructureError(
                f"database {db_id}: a SQL worker stands still; is the disk of the database in order?"
            )
        raise reply

    def _failed(self, error: str) -> Result:
        return Result("error", observation=text.render_error(error, self._shown[1]), error=error)

    def _is_certain(self, answer: Answer) -> bool:
        """Whether the query would give the same again: not where the clock or the memory decided."""
        status, *_, error, seconds = answer
        return seconds < self._timeout if status == "timeout" else "out of memory" not in error


def _size(sql: str, answer: Answer) -> int:
    _, columns, rows, _, observation, error, _ = answer
    return sum(map(len, (sql, *columns, rows, observation or "", error)))
