"""A local port in front of another host's, which stays open when the other end has gone.

jax.distributed ends a process at once, with a stack trace and no word of ours, when the connection to process 0 breaks. The
processes' own link (link.py) sees that as early, but then both run for the exit. Behind a relay jax sees silence instead,
which it bears for its heartbeat timeout; by then our sentence is written and the process has ended.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time

_CHUNK = 1 << 16
_RETRY_SECONDS = 0.1


class Relay:
    """Forwards connections to `host`:`port` from 127.0.0.1:`self.port`, as long as the process lives."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._held: list[socket.socket] = []  # connections whose other end has gone
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._server.accept()
            threading.Thread(target=self._connect, args=(near,), name="relay", daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        self._held.append(near)
        far = self._reach()
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_pump, args=(near, far), name="relay", daemon=True).start()
        _pump(far, near)

    def _reach(self) -> socket.socket:
        """The other end, as soon as it listens. Whoever connected here has a deadline of its own."""
        while True:
            try:
                return socket.create_connection(self._target)
            except OSError:
                time.sleep(_RETRY_SECONDS)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK):
            target.sendall(data)
