"""The gRPC server around a rollout service: its methods, the standard health and reflection, who may call, and how much.

Every call but those of health must show the token, where there is one; certificates are the connection's business. Limits
keep small what a broken or hostile peer can hold: connections, the time for a handshake, connections without a call,
calls, and the time in which a client must have taken an event. Sizes of messages are in channel.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from rollout import wire
from rollout.channel import METHODS, OPTIONS, SERVICE, grpc
from rollout.errors import UserError
from rollout.manifest import Refused
from rollout.security import Security

HEALTH = "/grpc.health.v1.Health/"


@dataclass(frozen=True)
class Limits:
    """What one service allows all its clients together."""

    connections: int = 2048
    calls: int = 2048
    handshake_seconds: float = 10.0
    idle_seconds: float = 900.0
    """A connection without a call is closed after so long; a learner's opens again by itself."""
    consumer_seconds: float = 120.0
    """Within which a client must take each event of its call."""
    episodes: int = 1 << 18
    """In one request: tasks times samples."""
    data_connections: int = 128
    """To the data port, one for each process of a learner; one too many is closed."""
    data_silence_seconds: float = 300.0
    """Between two frames there; `handshake_seconds` is for its TLS and ticket."""

    def options(self) -> tuple[tuple[str, int], ...]:
        return (
            *OPTIONS,
            ("grpc.max_allowed_incoming_connections", _with_files_for(self.connections)),
            ("grpc.max_concurrent_streams", self.calls + 100),  # one too many is refused, rather than left waiting
            ("grpc.server_handshake_timeout_ms", int(self.handshake_seconds * 1000)),
            ("grpc.max_connection_idle_ms", int(self.idle_seconds * 1000)),
        )


@dataclass(frozen=True)
class Listening:
    """A server that takes calls at `address`."""

    server: Any
    address: str
    health: Any

    async def stop_serving(self) -> None:
        """From now on health says NOT_SERVING; calls are still answered."""
        await self.health.enter_graceful_shutdown()


async def listen_at(
    functions: Mapping[str, Callable[..., Any]], listen: str, security: Security, limits: Limits
) -> Listening:
    """Starts the server of the bridge's methods in this event loop. Raises UserError."""
    server = grpc.aio.server(interceptors=[_Gate(security)], options=limits.options())
    room = _Room(limits.calls)
    handlers = {name: _handler(name, function, room, limits.consumer_seconds) for name, function in functions.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        port = security.add_port(server, listen)
    except RuntimeError:
        raise UserError(f"bridge.listen {listen!r}: the port is in use or the address is not this machine's") from None
    await server.start()
    for name in ("", SERVICE):
        await healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
    return Listening(server, f"{listen.rpartition(':')[0]}:{port}", healthy)


class _Gate(grpc.aio.ServerInterceptor):
    """Refuses calls that do not show the token, before their messages are read."""

    def __init__(self, security: Security) -> None:
        self._security = security

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        refusal = self._security.admits(details.invocation_metadata)
        if handler is None or not refusal or details.method.startswith(HEALTH):
            return handler

        async def refuse(_: Any, context: Any) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, refusal)

        async def refuse_stream(_: Any, context: Any) -> AsyncIterator[bytes]:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, refusal)
            yield b""

        if handler.response_streaming:
            streamed = grpc.stream_stream_rpc_method_handler if handler.request_streaming else None
            return (streamed or grpc.unary_stream_rpc_method_handler)(refuse_stream)
        whole = (
            grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        )
        return whole(refuse)


class Full(Refused):
    """As many calls as are allowed are running."""

    code = "UNAVAILABLE"


class _Room:
    """Counts the calls that are running. gRPC's own limit would go on counting one whose client does not read."""

    def __init__(self, calls: int) -> None:
        self._calls, self._running = calls, 0

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        if self._running >= self._calls:
            raise Full(f"{self._running} calls are running, no more are allowed; try again")
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1


async def _refuse(error: Exception, context: Any) -> None:
    code = error.code if isinstance(error, Refused) else "INVALID_ARGUMENT"
    await context.abort(grpc.StatusCode[code], str(error))


def _handler(name: str, function: Callable[..., Any], room: _Room, consumer_seconds: float) -> Any:
    """Registers `function`; what it refuses becomes a gRPC status with the message."""
    method = METHODS[name]

    async def answer(request: Any, context: Any) -> Any:
        try:
            with room.place():
                return await function(request, context)
        except (Refused, wire.WireError) as error:
            await _refuse(error, context)

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        call = asyncio.current_task()
        assert call is not None
        try:
            with room.place():
                async with contextlib.aclosing(function(request, context)) as events:
                    async for event in events:
                        patience = asyncio.get_running_loop().call_later(consumer_seconds, call.cancel)
                        try:
                            yield event  # waits as long as its client does not read
                        finally:
                            patience.cancel()
        except (Refused, wire.WireError) as error:
            await _refuse(error, context)

    codecs = {
        "request_deserializer": method.request.FromString if method.request else None,
        "response_serializer": method.reply.SerializeToString if method.reply else None,
    }
    if method.streams_out:
        return grpc.unary_stream_rpc_method_handler(stream, **codecs)
    if method.streams_in:
        return grpc.stream_unary_rpc_method_handler(answer, **codecs)
    return grpc.unary_unary_rpc_method_handler(answer, **codecs)


def _with_files_for(connections: int) -> int:
    """Allows this process the file descriptors of so many connections and its own; returns how many connections fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return connections if soft == resource.RLIM_INFINITY else min(connections, max(soft // 2, soft - 1024))
