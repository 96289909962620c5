"""Remembers what queries gave: the same SQL on the same content of a database gives the same again.

A database's content is known by its file (device, inode), size and times of change; a file that has just changed isn't
remembered, since it may change again within the same tick of its clock. Only verdicts that would come out the same on
any machine are kept: not a worker that was killed, not one that ran out of memory or CPU time, no fault of ours.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from typing import Any

from rollout.sql.result import Answer

SETTLED_NANOSECONDS = 2_000_000_000  # a file unchanged for so long has its last time of change
LARGEST_SHARE = 8  # a result that is more than one such part of the cache isn't kept
ENTRY_BYTES = 1000  # of Python's objects around an entry

Key = tuple[Any, ...]


class ResultCache:
    """Replies by query, the one longest unused going first. Threads may share one."""

    def __init__(self, max_bytes: int) -> None:
        self.hits = self.misses = self.bytes = 0
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._answers: OrderedDict[Key, tuple[Answer, int]] = OrderedDict()

    def get(self, key: Key) -> Answer | None:
        with self._lock:
            found = self._answers.get(key)
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._answers.move_to_end(key)
            return found[0]

    def put(self, key: Key, answer: Answer, size: int) -> None:
        """Keeps a answer; `size` in bytes, of the answer and the key."""
        size += ENTRY_BYTES
        if size > self._max_bytes // LARGEST_SHARE:
            return
        with self._lock:
            self._drop(key)
            self._answers[key] = (answer, size)
            self.bytes += size
            while self.bytes > self._max_bytes:
                self._drop(next(iter(self._answers)))

    def __len__(self) -> int:
        return len(self._answers)

    def _drop(self, key: Key) -> None:
        found = self._answers.pop(key, None)
        if found is not None:
            self.bytes -= found[1]


def content_of(path: str) -> tuple[int, ...] | None:
    """What tells a file's content from any other's; None if there is no file, or it changed a moment ago."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    changed = max(stat.st_mtime_ns, stat.st_ctime_ns)
    if time.time_ns() - changed < SETTLED_NANOSECONDS:
        return None
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
