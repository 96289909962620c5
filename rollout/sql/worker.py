"""A SQL worker process: reads queries, gives them to an engine, writes back what came out.

A request is (path, URI, SQL, whole result wanted), a reply as rollout.sql.engines tells it.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from typing import Any

from rollout.sql import sandbox
from rollout.sql.engines import Reply, load
from rollout.worker_process import serve


def main() -> None:
    """Serves until standard input closes. Settings: the engine's name, the database root, the engine's arguments."""
    serve(_start)


def _start(engine_name: str, database_root: str, *settings: Any) -> Callable[..., Reply]:
    os.environ["TZ"] = "UTC"
    time.tzset()
    engine = load(engine_name)(*settings, database_root)
    sandbox.close(database_root)  # last: nothing can be imported afterwards

    def answer(path: str, uri: str, sql: str, whole: bool) -> Reply:
        try:
            return engine.run(path, uri, sql, whole)
        except Exception:  # a fault of this program must not be scored as the model's
            return ("broken", (), [], False, "", traceback.format_exc(), 0.0)

    return answer
