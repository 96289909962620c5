"""The data port: a plain socket beside gRPC for the bytes of weights, which gRPC in Python carries half as fast.

Begin's answer names the port and a ticket for its push. A learner connects, with TLS wherever gRPC has it, shows the ticket,
sends frames (frames.py) and an end mark, and is told what arrived or why it was refused. The ticket stands for the token,
which Begin has asked for. Each connection has a thread that reads a frame into a small buffer, checks it, and only then has
it stored: what is not proven never lies among the staged bytes, and the buffer stays in the processor's cache.

Where the port is not reached (a tunnel, a firewall) the same frames go through gRPC's Push: see stub.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from rollout import bridge_pb2 as pb
from rollout import frames
from rollout.errors import UserError
from rollout.manifest import Refused
from rollout.receiver import Corrupt
from rollout.security import Security

if TYPE_CHECKING:
    from rollout.listener import Limits

_HELLO = struct.Struct("<4sQ16s")  # magic, push id, ticket
_MAGIC = b"SQP1"
_LENGTH = struct.Struct("<I")
_END = bytes(frames.HEADER_BYTES)  # no more frames
_MAX_ANSWER = 1 << 16
CONNECT_SECONDS = 5.0


class Closed(ConnectionError):
    """The other side has closed the connection."""


class Refusal(Exception):
    """The service did not take the frames. `code` is the name of a gRPC status."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class DataPort:
    """Listens at `host`; `open` begins to accept connections. Raises UserError when it cannot listen."""

    def __init__(self, host: str, port: int, security: Security, limits: Limits) -> None:
        self._security, self._limits = security, limits
        self._secret = os.urandom(32)
        self._room = threading.BoundedSemaphore(self._limits.data_connections)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        both = host == "::" and socket.has_dualstack_ipv6()  # as gRPC does
        try:
            backlog = self._limits.data_connections
            self._listener = socket.create_server((host, port), family=family, backlog=backlog, dualstack_ipv6=both)
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else error
            raise UserError(f"bridge.data_port {port} at {host}: {why}") from None
        self.port: int = self._listener.getsockname()[1]

    def ticket(self, push_id: int) -> bytes:
        """What opens the port for the frames of this push."""
        return hmac.digest(self._secret, struct.pack("<Q", push_id), hashlib.sha256)[:16]

    def open(self, take: Callable[[frames.Frame], bool]) -> None:
        """`take` stores an intact frame, from several threads, and says whether it was new; it may raise Refused."""
        threading.Thread(target=self._accept, args=(take,), name="data port", daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()

    def _accept(self, take: Callable[[frames.Frame], bool]) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._listener.fileno() < 0:
                    return
                time.sleep(0.1)  # no file descriptors are left; some connection will end
                continue
            if not self._room.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection, take), name="weights", daemon=True).start()

    def _serve(self, connection: socket.socket, take: Callable[[frames.Frame], bool]) -> None:
        try:
            with contextlib.suppress(OSError), self._admitted(connection) as admitted:
                if admitted is not None:  # strangers are told nothing
                    wait_at_most(admitted, self._limits.data_silence_seconds)
                    _answer(admitted, receive(admitted, take), self._limits.handshake_seconds)
        finally:
            self._room.release()

    @contextlib.contextmanager
    def _admitted(self, connection: socket.socket) -> Iterator[socket.socket | None]:
        """The connection once it has shaken hands and shown a ticket, closed at the end; None for one that is not right.
        Raises OSError when it takes too long."""
        tls = self._security.server_tls
        with connection:
            if tls is not None:
                connection = tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
            late = threading.Timer(self._limits.handshake_seconds, _cut, [connection])
            late.start()
            with connection:
                try:
                    if isinstance(connection, ssl.SSLSocket):
                        connection.do_handshake()
                    hello = memoryview(bytearray(_HELLO.size))
                    _fill(connection, hello)
                finally:
                    late.cancel()
                magic, push, ticket = _HELLO.unpack(hello)
                right = magic == _MAGIC and hmac.compare_digest(ticket, self.ticket(push))
                yield connection if right else None


def _cut(connection: socket.socket) -> None:
    """Ends what another thread waits for."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # SSLSocket's own would change it under that thread


def receive(connection: socket.socket, take: Callable[[frames.Frame], bool]) -> pb.DataEnd:
    """Takes frames until the end mark, or until one is refused. Raises OSError when the connection breaks."""
    head, buffer = memoryview(bytearray(frames.HEADER_BYTES)), memoryview(bytearray(frames.MAX_PAYLOAD))
    reply = pb.PushReply()
    try:
        while True:
            _fill(connection, head)
            if head == _END:
                return pb.DataEnd(reply=reply)
            said = frames.read_head(bytes(head))
            # Differences are kept as they are until the push is whole; weights are copied to their place at once.
            room = buffer[: said.length] if said.kind == frames.DATA else memoryview(bytearray(said.length))
            _fill(connection, room)
            reply.duplicates += not take(frames.check(said, room))
            reply.frames += 1
            reply.bytes += len(head) + said.length
    except frames.FrameError as error:
        return pb.DataEnd(reply=reply, code=Corrupt.code, message=str(error))
    except Refused as error:
        return pb.DataEnd(reply=reply, code=error.code, message=str(error))


def _answer(connection: socket.socket, end: pb.DataEnd, patience: float) -> None:
    """Says the last word. What still comes is read and dropped, because closing at once would take the word back."""
    data = end.SerializeToString()
    connection.sendall(_LENGTH.pack(len(data)) + data)
    deadline, rest = time.monotonic() + patience, memoryview(bytearray(1 << 16))
    wait_at_most(connection, patience)
    while time.monotonic() < deadline:
        _some(connection, rest)


class DataStream:
    """A learner's connection to the data port of the service at `host`. Raises OSError when it is not reached.

    `name` is the one that the service's certificate must be for, if not the host. `timeout` is for each wait, and for all.
    """

    def __init__(self, host: str, state: pb.PushState, security: Security, name: str, timeout: float) -> None:
        connection = socket.create_connection((host, state.data_port), CONNECT_SECONDS)
        try:
            if security.client_tls is not None:
                connection = security.client_tls.wrap_socket(connection, server_hostname=name or host)
            connection.sendall(_HELLO.pack(_MAGIC, state.push_id, state.ticket))
            wait_at_most(connection, timeout)
        except BaseException:
            connection.close()
            raise
        self._connection, self._deadline = connection, time.monotonic() + timeout

    def send(self, every: Iterable[frames.Frame]) -> pb.PushReply:
        """Sends all frames; returns what the service says of them. Raises Refusal, OSError."""
        connection, word = self._connection, select.poll()
        word.register(connection, select.POLLIN)
        with connection:
            try:
                for frame in every:
                    if time.monotonic() > self._deadline:
                        raise TimeoutError("the time for a transfer is over")
                    connection.sendall(frame.head.pack())
                    connection.sendall(frame.payload)
                    if word.poll(0):  # it speaks before the end only to refuse
                        break
                else:
                    connection.sendall(_END)
            except (BrokenPipeError, ConnectionResetError):
                pass  # perhaps it has said why
            return _read_end(connection)


def _read_end(connection: socket.socket) -> pb.PushReply:
    length = memoryview(bytearray(_LENGTH.size))
    _fill(connection, length)
    (size,) = _LENGTH.unpack(length)
    if size > _MAX_ANSWER:
        raise ConnectionError(f"an answer of {size} bytes")
    data = memoryview(bytearray(size))
    _fill(connection, data)
    end = pb.DataEnd.FromString(bytes(data))
    if end.code:
        raise Refusal(end.code, end.message)
    return end.reply


def wait_at_most(connection: socket.socket, seconds: float) -> None:
    """Bounds each wait for the peer, of plain sockets in the kernel: Python's own timeouts make them non-blocking, and then a
    frame comes in many pieces."""
    if isinstance(connection, ssl.SSLSocket):
        connection.settimeout(seconds)
        return
    connection.settimeout(None)
    timeval = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)


def _fill(connection: socket.socket, room: memoryview) -> None:
    """Receives exactly what fits. Raises OSError."""
    got = 0
    while got < len(room):
        got += _some(connection, room[got:])


def _some(connection: socket.socket, room: memoryview) -> int:
    flags = 0 if isinstance(connection, ssl.SSLSocket) else socket.MSG_WAITALL  # ssl knows no flags
    got = connection.recv_into(room, len(room), flags)
    if not got and len(room):
        raise Closed("the connection was closed")
    return got
