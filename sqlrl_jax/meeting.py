"""How the processes of a run find each other: process 0 listens, the others come, and all learn who is there.

Whoever is missing past the deadline is named, whoever does not belong is refused with the reason, and what is none of ours
(a port scanner, a browser) is sent away.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from sqlrl_jax.link import HELLO, REFUSED, WELCOME, LinkError, Peer, read_message, send_message

HELLO_SECONDS = 10.0
_MAGIC = "sqlrl_jax run"
_MAX_HELLO = 1 << 20


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


def _send_quietly(connection: socket.socket, kind: bytes, data: bytes) -> None:
    try:
        send_message(connection, kind, data)
    except OSError:
        return  # whoever it was has gone; if it was one of ours, its connection is found closed later
