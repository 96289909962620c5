"""One service as its clients call it: a channel and a callable for each method of the bridge."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from grpc_health.v1 import health_pb2

from rollout import bridge_pb2 as pb
from rollout import frames
from rollout.channel import METHODS, STOPPING, Method, grpc, split_address
from rollout.data_port import DataStream, Refusal
from rollout.errors import InfrastructureError
from rollout.security import PLAIN, Security, why_unsafe

# Failures that another attempt, or a service started again, can mend. All others are a mistake of the caller.
TRANSIENT = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.DATA_LOSS,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.FAILED_PRECONDITION,
    }
)

ELSEWHERE_SECONDS = 300.0  # that weights go through gRPC after the data port has failed

_log = logging.getLogger(__name__)


class BridgeError(InfrastructureError):
    """A rollout service failed or refused. `address` is the service's; `transient` tells whether trying again may help,
    `stopping` that it was told to stop and said so, `unwelcome` that one side does not trust the other."""

    def __init__(
        self,
        address: str,
        message: str,
        *,
        transient: bool = True,
        stopping: bool = False,
        unwelcome: bool = False,
    ) -> None:
        super().__init__(message)
        self.address, self.transient, self.stopping, self.unwelcome = address, transient, stopping, unwelcome


class Stub:
    """The methods of the service at `address`. Blocking calls; safe to use from several threads."""

    def __init__(self, address: str, security: Security = PLAIN, name: str = "") -> None:
        """`name` is the one that the service's certificate must be for, if not the address's host. Raises UserError."""
        split_address(address)
        self.address, self._security, self._name = address, security, name
        self._elsewhere_until = 0.0
        self.channel = security.channel(address, name)
        self.rollout = self._callable(METHODS["Rollout"])
        self.begin = self._callable(METHODS["Begin"])
        self._push = self._callable(METHODS["Push"])
        self.commit = self._callable(METHODS["Commit"])
        self.abort = self._callable(METHODS["Abort"])
        self._status = self._callable(METHODS["Status"])
        self._health = self.channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )

    def _callable(self, method: Method) -> Any:
        kinds = {
            (False, False): self.channel.unary_unary,
            (False, True): self.channel.unary_stream,
            (True, False): self.channel.stream_unary,
        }
        call = kinds[method.streams_in, method.streams_out](
            method.path,
            request_serializer=method.request.SerializeToString if method.request else None,
            response_deserializer=method.reply.FromString if method.reply else None,
        )
        return _Call(call, self._security.metadata())

    def push(self, state: pb.PushState, every: Iterator[frames.Frame], timeout: float) -> pb.PushReply:
        """Sends the frames of the push that Begin answered with `state`: to the service's data port, or where that is not
        reached through gRPC. Raises BridgeError."""
        stream = self._data_stream(state, timeout)
        try:
            if stream is not None:
                return stream.send(every)
            reply: pb.PushReply = self._push(map(frames.encode, every), timeout=timeout)
        except grpc.RpcError as error:
            raise explain(self.address, error) from None
        except Refusal as error:
            code = grpc.StatusCode[error.code]
            text = f"rollout service {self.address}: {error} ({error.code})"
            raise BridgeError(self.address, text, transient=code in TRANSIENT) from None
        except OSError as error:
            why = "nothing moved in time" if isinstance(error, (BlockingIOError, TimeoutError)) else error
            self._avoid(state.data_port, why)
            raise BridgeError(
                self.address, f"rollout service {self.address}: sending weights broke off: {why}"
            ) from None
        return reply

    def _data_stream(self, state: pb.PushState, timeout: float) -> DataStream | None:
        if not state.data_port or time.monotonic() < self._elsewhere_until:
            return None
        try:
            return DataStream(split_address(self.address)[0], state, self._security, self._name, timeout)
        except OSError as error:
            self._avoid(state.data_port, error)
            return None

    def _avoid(self, port: int, why: object) -> None:
        if not self._elsewhere_until:
            _log.warning(
                "rollout service %s: its port %d for weights cannot be used (%s); they go through gRPC, more slowly; see "
                "bridge.data_port in docs/bridge.md",
                *(self.address, port, why),
            )
        self._elsewhere_until = time.monotonic() + ELSEWHERE_SECONDS

    def status(self, timeout: float = 10.0) -> pb.StatusReply:
        """Raises BridgeError."""
        try:
            reply: pb.StatusReply = self._status(pb.StatusRequest(), timeout=timeout)
        except grpc.RpcError as error:
            raise explain(self.address, error) from None
        return reply

    def healthy(self, timeout: float = 2.0, *, wait: bool = False) -> bool:
        """Whether the service answers that it is serving, with or without weights; `wait` gives it all of `timeout`."""
        try:
            reply = self._health(health_pb2.HealthCheckRequest(), timeout=timeout, wait_for_ready=wait)
        except grpc.RpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def trouble(self, timeout: float = 5.0) -> BridgeError | None:
        """Why nothing can be asked of the service, with or without weights; None when all can."""
        try:
            status = self.status(timeout)
        except BridgeError as error:
            reason = self._security.why_closed(self.address) if _CLOSED.search(str(error)) else ""
            return _unwelcome(self.address, reason) if reason else error
        if status.stopping:
            return BridgeError(self.address, f"rollout service {self.address} is stopping", stopping=True)
        return None

    def close(self) -> None:
        self.channel.close()

    def __enter__(self) -> Stub:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Call:
    """A method with the metadata that go with each call of it."""

    def __init__(self, call: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self._call, self._metadata = call, metadata

    def __call__(self, request: Any, timeout: float | None = None) -> Any:
        return self._call(request, timeout=timeout, metadata=self._metadata)

    def future(self, request: Any, timeout: float | None = None) -> Any:
        return self._call.future(request, timeout=timeout, metadata=self._metadata)


_CLOSED = re.compile(r"failed to connect .*(Socket closed|onnection reset|End of TCP)")


def _unwelcome(address: str, reason: str) -> BridgeError:
    return BridgeError(address, f"rollout service {address}: {reason}", unwelcome=True)


def explain(address: str, error: grpc.RpcError) -> BridgeError:
    """A gRPC failure as an error that a person can read."""
    code, details = error.code(), error.details() or "no details"
    unsafe = why_unsafe(details) if code is grpc.StatusCode.UNAVAILABLE else ""
    if unsafe or code is grpc.StatusCode.UNAUTHENTICATED:
        return _unwelcome(address, unsafe or details)
    text = f"rollout service {address}: {details} ({code.name})"
    stopping = code is grpc.StatusCode.UNAVAILABLE and STOPPING in text
    return BridgeError(address, text, transient=code in TRANSIENT, stopping=stopping)
