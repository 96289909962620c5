"""Learner processes as threads of one test, which exchange bytes through a list."""

from __future__ import annotations

import threading

from sqlrl_jax.distributed import World


class ThreadWorld(World):
    """One of `count` threads."""

    def __init__(self, index: int, parts: list[bytes], barrier: threading.Barrier) -> None:
        self.index, self.count, self.parts, self.at = index, len(parts), parts, barrier

    def exchange(self, name: str, data: bytes) -> list[bytes]:
        self.parts[self.index] = data
        self.at.wait()
        out = list(self.parts)
        self.at.wait()
        return out


def worlds(count: int) -> list[ThreadWorld]:
    """All threads' worlds."""
    parts, barrier = [b""] * count, threading.Barrier(count, timeout=120)
    return [ThreadWorld(index, parts, barrier) for index in range(count)]
