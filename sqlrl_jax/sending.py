"""From the pieces of a push to frames on every service's stream, with bounded memory.

Pieces are cut into chunks of a frame's size on a fixed grid. The frames, which are views of the pieces, wait in short queues,
one a service, so the slowest service sets the pace and nobody's frames pile up. Each service's thread sends them; the first
to come to a chunk hashes it, for all. Differences are encoded by threads of their own, a few chunks ahead. One stream a
service: several were measured to be no faster.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from rollout import bridge_pb2 as pb
from rollout import delta, frames
from rollout.stub import Stub
from sqlrl_jax.buckets import Cut, Piece

CHUNK = frames.CHUNK
_QUEUE = 8  # frames of a service that wait
_THREADS = 8
_SAMPLE_BYTES = 8 << 20

# Work for a thread, and what the sending thread does with its result, in order.
_Job = tuple[Callable[[], Any], Callable[[Any], None]]


@dataclass(frozen=True)
class Spot:
    """Where a chunk lies."""

    tensor: int
    slice: int
    offset: int


@dataclass
class Encoded:
    """Differences of a push, by chunk: sent again after a broken transfer, and applied to the base once all have them."""

    payloads: dict[Spot, bytes] = field(default_factory=dict)
    changed: int = 0
    values: int = 0
    covered: int = 0
    """Bytes of weights."""
    seconds: float = 0.0
    """Of threads, not of the clock."""

    @property
    def nbytes(self) -> int:
        return sum(len(payload) for payload in self.payloads.values())


@dataclass
class Base:
    """The bytes of the version that all services took last, on the host: what differences are taken from.

    Only the slices that this process owns, so the hosts of a run hold one copy between them. `key` None: not whole.
    """

    key: pb.WeightsKey | None = None
    cuts: list[Cut] = field(default_factory=list)
    slices: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(data.nbytes for data in self.slices.values())

    def chunk(self, spot: Spot) -> np.ndarray:
        return self.slices[spot.tensor, spot.slice][spot.offset : spot.offset + CHUNK]

    def start(self, cuts: list[Cut]) -> None:
        """A push that sends everything begins: its bytes come by `keep` and count when `key` is set."""
        if self.cuts != cuts:
            self.slices = {}
        self.key, self.cuts = None, cuts

    def keep(self, piece: Piece) -> None:
        place = piece.tensor, piece.slice
        if place not in self.slices:
            self.slices[place] = np.empty(piece.data.nbytes, np.uint8)
        self.slices[place][:] = piece.data

    def advance(self, encoded: Encoded) -> None:
        """The base becomes what the differences lead to; set `key` afterwards."""
        self.key = None
        for spot, payload in encoded.payloads.items():
            delta.apply(self.chunk(spot), payload)


def estimate(base: Base, pieces: Sequence[Piece], limit: int = _SAMPLE_BYTES) -> float:
    """Bytes of differences for a byte of weights, from the first `limit` bytes of `pieces`; 1 without any."""
    seen = made = 0
    for piece in pieces:
        for offset in range(0, piece.data.nbytes, CHUNK):
            if seen >= limit:
                break
            data, old = piece.data[offset : offset + CHUNK], base.chunk(Spot(piece.tensor, piece.slice, offset))
            seen, made = seen + data.nbytes, made + len(delta.encode(old, data, piece.width)[0])
    return made / seen if seen else 1.0


class Stream:
    """What goes to one service, in a thread. `state` is what Begin answered; only what it says is missing is sent."""

    def __init__(self, stub: Stub, state: pb.PushState, timeout: float, pool: ThreadPoolExecutor) -> None:
        self.stub, self.delta = stub, state.delta
        self._missing: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for gap in state.missing:
            self._missing.setdefault((gap.tensor, gap.slice), []).append((gap.offset, gap.offset + gap.length))
        self._queue: queue.Queue[Callable[[], frames.Frame] | None] = queue.Queue(_QUEUE)
        waiting = (make() for make in iter(self._queue.get, None) if make is not None)
        self._sent = pool.submit(stub.push, state, waiting, timeout)

    def lacks(self, piece: Piece) -> bool:
        return (piece.tensor, piece.slice) in self._missing

    def wants(self, spot: Spot) -> bool:
        gaps = self._missing.get((spot.tensor, spot.slice), ())
        return any(start < spot.offset + CHUNK and end > spot.offset for start, end in gaps)

    def put(self, make: Callable[[], frames.Frame] | None) -> None:
        """Waits while the queue is full; a transfer that has ended takes nothing any more. None ends it."""
        while not self._sent.done():
            try:
                self._queue.put(make, timeout=0.1)
            except queue.Full:
                continue
            return

    def finish(self) -> int:
        """Waits for the service to have everything; returns the bytes. Raises BridgeError."""
        self.put(None)
        try:
            received: int = self._sent.result().bytes
        finally:  # of a call that ended early a thread of gRPC's may still wait for a frame
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(None)
        return received


class _Once:
    """A frame that is made by whoever asks first: hashed just before it is sent, while it is in that core's cache."""

    def __init__(self, make: Callable[[], frames.Frame]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._frame: frames.Frame | None = None

    def __call__(self) -> frames.Frame:
        with self._lock:
            if self._frame is None:
                self._frame = self._make()
            return self._frame


class Sender:
    """Frames a push's chunks for all its streams."""

    def __init__(self, push_id: int, base: Base | None, encoded: Encoded | None, *, refill: bool) -> None:
        """With `encoded`, differences from `base` are made (and kept there) for the streams that take them. With `refill` the
        base takes all pieces instead."""
        self._push, self._base, self._encoded, self._refill = push_id, base, encoded, refill
        self._threads = min(_THREADS, os.cpu_count() or 1)

    def send(self, buckets: Iterable[Sequence[Piece]], streams: Sequence[Stream]) -> None:
        """Sends every stream what it lacks. A stream that breaks is left behind; its `finish` tells."""
        with ThreadPoolExecutor(self._threads, thread_name_prefix="frames") as pool:
            ahead: deque[tuple[Future[Any], Callable[[Any], None]]] = deque()
            for bucket in buckets:
                for work, done in self._jobs(bucket, streams):
                    ahead.append((pool.submit(work), done))
                    if len(ahead) > 2 * self._threads:
                        future, after = ahead.popleft()
                        after(future.result())
            for future, after in ahead:
                after(future.result())

    def _jobs(self, bucket: Sequence[Piece], streams: Sequence[Stream]) -> Iterator[_Job]:
        """Puts a bucket's frames into the streams; yields what is to be done in other threads meanwhile."""
        for piece in bucket:
            if self._refill and self._base is not None:
                yield partial(self._base.keep, piece), lambda _: None
            takers, whole = [stream for stream in streams if stream.lacks(piece)], []
            for offset in range(0, piece.data.nbytes, CHUNK):
                spot = Spot(piece.tensor, piece.slice, offset)
                data = piece.data[offset : offset + CHUNK]
                whole.append(_Once(partial(self._frame, spot, data.data, frames.DATA)))
                wanting = [stream for stream in takers if stream.wants(spot)]
                _put([stream for stream in wanting if not stream.delta], whole[-1])
                if self._encoded is not None:
                    yield self._difference(piece, spot, data, [stream for stream in wanting if stream.delta])
            _put(takers, _Once(partial(self._end, piece, whole)))

    def _difference(self, piece: Piece, spot: Spot, data: np.ndarray, wanting: Sequence[Stream]) -> _Job:
        encoded, base = self._encoded, self._base
        assert encoded is not None
        assert base is not None

        def work() -> tuple[bytes, int, float]:
            known, started = encoded.payloads.get(spot), time.thread_time()
            payload, changed = (known, 0) if known is not None else delta.encode(base.chunk(spot), data, piece.width)
            return payload, changed, time.thread_time() - started

        def done(made: tuple[bytes, int, float]) -> None:
            payload, changed, seconds = made
            if spot not in encoded.payloads:
                encoded.payloads[spot] = payload
                encoded.changed += changed
                encoded.values += data.nbytes // piece.width
                encoded.covered += data.nbytes
                encoded.seconds += seconds
            _put(wanting, _Once(partial(self._frame, spot, memoryview(payload), frames.DELTA)))

        return work, done

    def _frame(self, spot: Spot, payload: memoryview, kind: int) -> frames.Frame:
        return frames.frame(self._push, spot.tensor, spot.slice, spot.offset, payload, kind)

    def _end(self, piece: Piece, whole: Sequence[_Once]) -> frames.Frame:
        checksum = frames.join(one().head.digest for one in whole)
        return frames.end(self._push, piece.tensor, piece.slice, piece.data.nbytes, checksum)


def _put(streams: Sequence[Stream], make: Callable[[], frames.Frame]) -> None:
    for stream in streams:
        stream.put(make)
