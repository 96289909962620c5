"""The connection between the processes of one run: who is there, who has gone, and bytes that all of them get.

A star of TCP connections around process 0, beside the accelerators' own network, so that it still speaks when those hang.
A process that ends closes its connection; one whose machine vanishes goes silent, heartbeat included. Either way every
other process is told within seconds, by name. No jax here, and nothing of training.

Left out: encryption, as in jax.distributed itself. Both need a network where only the run's hosts reach the ports.
"""

from __future__ import annotations

import queue
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rollout.errors import UserError

BEAT_SECONDS = 2.0
FLUSH_SECONDS = 3.0
_HEAD = struct.Struct("!cQ")  # kind, bytes that follow
_CHUNK = 1 << 20

# Kinds of messages.
HELLO, WELCOME, REFUSED, BEAT, PART, WHOLE, STOP, FAULT, BYE = (bytes([c]) for c in b"HWRBPASFE")

Event = Literal["stop", "end"]


class LinkError(UserError):
    """The processes of a run did not find each other, or one of them did not come to where the others wait."""


@dataclass(frozen=True)
class Peer:
    """One process of the run. `address` is where the others reach its host."""

    index: int
    host: str
    pid: int
    address: str

    def __str__(self) -> str:
        return f"process {self.index} on {self.host} (pid {self.pid})"


class _Line:
    """One TCP connection: a thread that writes what is queued, or a beat, and a time when something last came."""

    def __init__(self, connection: socket.socket, peer: Peer) -> None:
        self.connection, self.peer = connection, peer
        self.heard = time.monotonic()
        self.over = False  # it has said good-bye
        self._broken = False
        self._queue: queue.SimpleQueue[tuple[bytes, bytes, threading.Event | None]] = queue.SimpleQueue()
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def start(self, take: Callable[[_Line, bytes, bytes], None], lost: Callable[[_Line, str], None]) -> None:
        threading.Thread(target=self._write, name=f"link to {self.peer.index}", daemon=True).start()
        threading.Thread(target=self._read, args=(take, lost), name=f"link of {self.peer.index}", daemon=True).start()

    def send(self, kind: bytes, data: bytes = b"", wait: float = 0.0) -> None:
        """Queues a message; with `wait`, returns when it is on its way, or after so many seconds."""
        if self._broken:
            return
        sent = threading.Event() if wait else None
        self._queue.put((kind, data, sent))
        if sent is not None:
            sent.wait(wait)

    def _write(self) -> None:
        while True:
            try:
                kind, data, sent = self._queue.get(timeout=BEAT_SECONDS)
            except queue.Empty:
                kind, data, sent = BEAT, b"", None
            try:
                send_message(self.connection, kind, data)
            except OSError:  # the reading thread finds out why
                self._broken = True
            if sent is not None:
                sent.set()
            if self._broken:
                return

    def _read(self, take: Callable[[_Line, bytes, bytes], None], lost: Callable[[_Line, str], None]) -> None:
        try:
            while True:
                kind, data = read_message(self.connection, self._note)
                take(self, kind, data)
        except OSError:
            if not self.over:
                lost(self, "its connection has closed, so it was killed, or its machine went down")

    def _note(self) -> None:
        self.heard = time.monotonic()


class Link:
    """This process's place among `peers`. `on_event("stop", why)` and `on_event("end", sentence)` are called from threads:
    another process was asked to stop, or the run cannot go on.

    `lost_after`: seconds of silence after which a process counts as gone.
    """

    def __init__(
        self,
        index: int,
        peers: list[Peer],
        lines: dict[int, socket.socket],
        *,
        lost_after: float,
        on_event: Callable[[Event, str], None],
    ) -> None:
        self.index, self.peers = index, peers
        self._on_event, self._lost_after = on_event, lost_after
        self._lines = {i: _Line(connection, peers[i]) for i, connection in lines.items()}
        self._arrived = threading.Condition()
        self._parts: dict[str, dict[int, bytes]] = {}  # at process 0: what has come of each exchange
        self._done: dict[str, list[bytes]] = {}
        self._count: Counter[str] = Counter()
        self._closed = threading.Event()
        for line in self._lines.values():
            line.start(self._take, self._lost)
        threading.Thread(target=self._watch, name="link watch", daemon=True).start()

    def exchange(self, name: str, data: bytes, timeout: float) -> list[bytes]:
        """What every process gave under `name`, by process. All must call it, equally often. Raises LinkError."""
        self._count[name] += 1
        key = f"{name} {self._count[name]}"
        if self.index == 0:
            self._collect(0, key, data)
        else:
            self._lines[0].send(PART, _named(key, data))
        slack = (
            BEAT_SECONDS * 5 if self.index else 0.0
        )  # process 0 knows who is missing, so it should be the one to tell
        with self._arrived:
            if not self._arrived.wait_for(lambda: key in self._done, timeout + slack):
                raise LinkError(self._overdue(key, timeout))
            return self._done.pop(key)

    def stop(self, why: str) -> None:
        """Tells all other processes that this one was asked to stop. May be called in a signal handler."""
        self._tell(STOP, why.encode())

    def fault(self, sentence: str) -> None:
        """Tells all other processes that the run cannot go on; returns when that is on its way."""
        self._tell(FAULT, sentence.encode(), wait=FLUSH_SECONDS)

    def close(self) -> None:
        """Leaves in order: nobody takes this process for dead."""
        self._closed.set()
        self._tell(BYE, wait=FLUSH_SECONDS)

    def _tell(self, kind: bytes, data: bytes = b"", wait: float = 0.0, but: int = -1) -> None:
        for index, line in self._lines.items():
            if index != but:
                line.send(kind, data, wait)

    def _collect(self, index: int, key: str, data: bytes) -> None:
        """At process 0: one process's part of an exchange; the last one completes it for all."""
        with self._arrived:
            parts = self._parts.setdefault(key, {})
            parts[index] = data
            if len(parts) < len(self.peers):
                return
            whole = [parts[i] for i in range(len(self.peers))]
            del self._parts[key]
            self._done[key] = whole
            self._arrived.notify_all()
        self._tell(WHOLE, _named(key, b"".join(struct.pack("!Q", len(part)) + part for part in whole)))

    def _take(self, line: _Line, kind: bytes, data: bytes) -> None:
        if kind == PART:
            key, part = _unnamed(data)
            self._collect(line.peer.index, key, part)
        elif kind == WHOLE:
            key, joined = _unnamed(data)
            with self._arrived:
                self._done[key] = _split(joined)
                self._arrived.notify_all()
        elif kind in (STOP, FAULT):
            if self.index == 0:
                self._tell(kind, data, but=line.peer.index, wait=FLUSH_SECONDS if kind == FAULT else 0.0)
            self._on_event("stop" if kind == STOP else "end", data.decode(errors="replace"))
        elif kind == BYE:
            line.over = True

    def _lost(self, line: _Line, why: str) -> None:
        if self._closed.is_set():
            return
        sentence = f"{line.peer} is gone: {why}"
        if self.index == 0:
            self._tell(FAULT, sentence.encode(), wait=FLUSH_SECONDS, but=line.peer.index)
        self._on_event("end", sentence)

    def _watch(self) -> None:
        while not self._closed.wait(BEAT_SECONDS / 2):
            for line in self._lines.values():
                silent = time.monotonic() - line.heard
                if silent > self._lost_after and not line.over:
                    self._lost(
                        line,
                        f"nothing was heard of it for {silent:.0f} s (trainer.distributed.lost_after), so its machine "
                        f"hangs or the network between is cut",
                    )
                    return

    def _overdue(self, key: str, timeout: float) -> str:
        where = f"at {key!r} for {timeout:.0f} s (trainer.distributed.wait_timeout)"
        if self.index != 0:
            return f"process {self.index} waited {where}; what process 0 says tells who did not come"
        missing = [str(self.peers[i]) for i in range(len(self.peers)) if i not in self._parts.get(key, {})]
        return f"waited {where} for {', '.join(missing)}: that process hangs; its log says where it was"


def send_message(connection: socket.socket, kind: bytes, data: bytes = b"") -> None:
    connection.sendall(_HEAD.pack(kind, len(data)))
    if data:
        connection.sendall(data)


def read_message(
    connection: socket.socket, heard: Callable[[], None] = lambda: None, limit: int | None = None
) -> tuple[bytes, bytes]:
    """One message; `heard` is called whenever bytes come. Raises OSError when the connection ends, or is none of ours."""
    kind, size = _HEAD.unpack(_exactly(connection, _HEAD.size, heard))
    if limit is not None and size > limit:
        raise ConnectionError(f"a message of {size} bytes where at most {limit} were expected")
    return kind, _exactly(connection, size, heard)


def _exactly(connection: socket.socket, size: int, heard: Callable[[], None]) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = connection.recv(min(_CHUNK, size - len(data)))
        if not more:
            raise ConnectionResetError("closed")
        heard()
        data += more
    return bytes(data)


def _named(name: str, data: bytes) -> bytes:
    return name.encode() + b"\0" + data


def _unnamed(data: bytes) -> tuple[str, bytes]:
    name, _, rest = data.partition(b"\0")
    return name.decode(), rest


def _split(joined: bytes) -> list[bytes]:
    parts, position = [], 0
    while position < len(joined):
        (size,) = struct.unpack_from("!Q", joined, position)
        position += 8
        parts.append(joined[position : position + size])
        position += size
    return parts
