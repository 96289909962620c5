"""The connection between the processes of one run: who is there, who has gone, and bytes that all of them get.

A star of TCP connections around process 0, beside the accelerators' own network, so that it still speaks when those hang.
A process that ends closes its connection; one whose machine vanishes goes silent, heartbeat included. Either way every
other process is told within seconds, by name. No jax here, and nothing of training.

Left out: encryption, as in jax.distributed itself. Both need a network where only the run's hosts reach the ports.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rollout.errors import UserError

BEAT_SECONDS = 2.0
FLUSH_SECONDS = 3.0
HELLO_SECONDS = 10.0
_MAGIC = "sqlrl_jax run"
_HEAD = struct.Struct("!cQ")  # kind, bytes that follow
_MAX_HELLO = 1 << 20
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


def meet(
    index: int, count: int, host: str, port: int, *, timeout: float, version: str, told: Callable[[], dict[str, Any]]
) -> tuple[list[Peer], dict[int, socket.socket], dict[str, Any]]:
    """Brings the processes together: process 0 listens on `port`, the others come to `host`:`port`.

    Returns all processes, this one's connections by process, and what `told()` gave at process 0. `version` must be the
    same everywhere. Raises LinkError that says who is missing after `timeout` seconds.
    """
    if index == 0:
        return _receive(count, host, port, timeout, version, told())
    return _come(index, count, host, port, timeout, version)


def _me(index: int, address: str) -> Peer:
    return Peer(index, socket.gethostname(), os.getpid(), address)


def _receive(
    count: int, host: str, port: int, timeout: float, version: str, told: dict[str, Any]
) -> tuple[list[Peer], dict[int, socket.socket], dict[str, Any]]:
    deadline = time.monotonic() + timeout
    peers: dict[int, Peer] = {0: _me(0, host)}
    lines: dict[int, socket.socket] = {}
    try:
        server = listen(host, port)
    except OSError as error:
        raise LinkError(
            f"process 0 cannot listen on port {port}: {error.strerror or error}; is another run using it? Give "
            f"--coordinator another port, the same on every host"
        ) from None
    with server:
        while len(peers) < count:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, (address, *_) = server.accept()
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(count) if i not in peers)
                text = (
                    f"process 0 waited {timeout:.0f} s (trainer.distributed.start_timeout) at {host}:{port} for process "
                    f"{missing} of {count}: start the same command there, with its own --process-id, or see its output"
                )
                for line in lines.values():
                    send_message(line, REFUSED, text.encode())
                raise LinkError(text) from None
            hello = _hello(connection)
            refused = _refuse(hello, peers, count, version)
            if refused:
                _send_quietly(connection, REFUSED, refused.encode())
                connection.close()
                continue
            there = address.removeprefix("::ffff:")
            peers[hello["index"]] = Peer(hello["index"], hello["host"], hello["pid"], there)
            lines[hello["index"]] = connection
    everyone = [peers[i] for i in range(count)]
    welcome = json.dumps({"peers": [asdict(peer) for peer in everyone], "told": told}).encode()
    for line in lines.values():
        _send_quietly(line, WELCOME, welcome)
    return everyone, lines, told


def _come(
    index: int, count: int, host: str, port: int, timeout: float, version: str
) -> tuple[list[Peer], dict[int, socket.socket], dict[str, Any]]:
    deadline = time.monotonic() + timeout
    place = f"{host}:{port}"
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=HELLO_SECONDS)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise LinkError(
                    f"process {index} could not reach process 0 at {place} within {timeout:.0f} s "
                    f"(trainer.distributed.start_timeout): {error.strerror or error}. Is it running there, with the same "
                    f"--coordinator, and may this host connect to that port?"
                ) from None
            time.sleep(0.2)
    hello = {"magic": _MAGIC, "index": index, "count": count, "version": version}
    hello |= {"host": socket.gethostname(), "pid": os.getpid()}
    try:
        send_message(connection, HELLO, json.dumps(hello).encode())
        connection.settimeout(max(1.0, deadline - time.monotonic()) + HELLO_SECONDS)
        kind, data = read_message(connection)
    except OSError as error:
        raise LinkError(
            f"process {index}: process 0 at {place} ended the connection before all were there ({error.strerror or error}); "
            f"its output says why"
        ) from None
    if kind != WELCOME:
        raise LinkError(data.decode(errors="replace"))
    answer = json.loads(data)
    return [Peer(**peer) for peer in answer["peers"]], {0: connection}, answer["told"]


def _hello(connection: socket.socket) -> dict[str, Any]:
    """What a process says of itself; empty for anything that is none of ours."""
    connection.settimeout(HELLO_SECONDS)
    try:
        kind, data = read_message(connection, limit=_MAX_HELLO)
        hello = json.loads(data) if kind == HELLO else {}
    except (OSError, ValueError):
        return {}
    return hello if isinstance(hello, dict) and hello.get("magic") == _MAGIC else {}


def _refuse(hello: dict[str, Any], peers: dict[int, Peer], count: int, version: str) -> str:
    """Why this one cannot join; empty when it can."""
    if not hello:
        return "this is not a process of the run"
    index = hello["index"]
    if hello["count"] != count:
        return (
            f"process {index} on {hello['host']} was started as one of {hello['count']}, process 0 as one of {count}: "
            f"--process-count must be the same everywhere"
        )
    if index in peers:
        return f"process {index} was started twice: {peers[index]} and on {hello['host']} (pid {hello['pid']})"
    if hello["version"] != version:
        return f"process {index} on {hello['host']} runs {hello['version']}, process 0 {version}: install the same"
    return ""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket that other hosts reach, unless `host` is this machine alone."""
    if is_loopback(host):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host if host != "localhost" else "127.0.0.1", port), family=family)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def is_loopback(host: str) -> bool:
    return host == "localhost" or host.startswith("127.") or host == "::1"


def send_message(connection: socket.socket, kind: bytes, data: bytes = b"") -> None:
    connection.sendall(_HEAD.pack(kind, len(data)))
    if data:
        connection.sendall(data)


def _send_quietly(connection: socket.socket, kind: bytes, data: bytes) -> None:
    try:
        send_message(connection, kind, data)
    except OSError:
        return  # whoever it was has gone; if it was one of ours, its connection is found closed later


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
