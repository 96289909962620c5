"""A SQL worker process: reads batches of queries, gives them to an engine, writes back what came out.

A batch is a tuple of (path, URI, SQL, whole result wanted); the answer is a tuple of replies to its first queries, with
their rows encoded. A batch that takes long or whose answer grows large is left unfinished, and the rest is asked again.
"""

from __future__ import annotations

import mmap
import os
import time
import traceback
from collections.abc import Callable
from typing import Any

from rollout.sql import sandbox
from rollout.sql.engines import Engine, Reply, load
from rollout.sql.result import encoded
from rollout.worker_process import serve

BATCH_SECONDS = 0.02  # after which no further query of a batch is begun
BATCH_BYTES = 1_000_000


def main() -> None:
    """Serves until standard input closes. Settings: the engine's name, the database root, the engine's arguments."""
    serve(_start)


def _start(page_file: int, engine_name: str, *settings: Any) -> Callable[..., tuple[Any, ...]]:
    os.environ["TZ"] = "UTC"
    time.tzset()
    page = mmap.mmap(page_file, mmap.PAGESIZE)
    os.close(page_file)
    engine = load(engine_name)(*settings)
    sandbox.close(settings[-1])  # the database root; last, because nothing can be imported afterwards

    def answer(*batch: tuple[str, str, str, bool]) -> tuple[Any, ...]:
        engine.begin()
        replies: list[tuple[Any, ...]] = []
        size = 0
        end = time.monotonic() + BATCH_SECONDS
        for index, query in enumerate(batch):
            page[0] = index
            status, columns, rows, truncated, text, error, seconds = _run(engine, query)
            data = encoded(rows)
            size += len(data)
            replies.append((status, columns, data, truncated, text, error, seconds))
            if size > BATCH_BYTES or time.monotonic() > end:
                break
        return tuple(replies)

    return answer


def _run(engine: Engine, query: tuple[str, str, str, bool]) -> Reply:
    try:
        return engine.run(*query)
    except Exception:  # a fault of this program must not be scored as the model's
        return ("broken", (), [], False, "", traceback.format_exc(), 0.0)
