"""Gives the memory that a bomb has left unused in a worker's heap back to the system.

glibc keeps what is freed between blocks that are still in use; a query that builds a huge statement leaves some 300 MB
behind that way, which would stay for as long as the worker lives. Left out: other C libraries, which have no such call.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

SLACK = 1.05  # what may be left lying before the heap is trimmed, which takes about a millisecond
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Memory:
    """This process's memory. To be made before the sandbox closes: it keeps a file of /proc open."""

    def __init__(self) -> None:
        self._statm = -1
        with contextlib.suppress(OSError):
            self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._live = 0  # bytes in use after the last trim

    def resident(self) -> int:
        """Bytes in use, 0 where the system doesn't tell."""
        return int(os.pread(self._statm, 100, 0).split()[1]) * _PAGE if self._statm >= 0 else 0

    def give_back(self) -> None:
        """Trims the heap if notably more is in use than what was needed since the last time."""
        if self._trim is None:
            return
        size = self.resident()
        if size <= self._live * SLACK:
            self._live = min(self._live, size)
            return
        self._trim(0)
        self._live = self.resident()
