"""One service as its clients call it: a channel and a callable for each method of the bridge."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from grpc_health.v1 import health_pb2

from rollout import bridge_pb2 as pb
from rollout.channel import METHODS, OPTIONS, Method, grpc, split_address
from rollout.errors import InfrastructureError

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


class BridgeError(InfrastructureError):
    """A rollout service failed or refused. `address` is the service's; `transient` tells whether trying again may help."""

    def __init__(self, address: str, message: str, *, transient: bool = True) -> None:
        super().__init__(message)
        self.address, self.transient = address, transient


class Stub:
    """The methods of the service at `address`. Blocking calls; safe to use from several threads."""

    def __init__(self, address: str) -> None:
        split_address(address)
        self.address = address
        self.channel = grpc.insecure_channel(address, options=OPTIONS)
        self.rollout = self._callable(METHODS["Rollout"])
        self.begin = self._callable(METHODS["Begin"])
        self.push = self._callable(METHODS["Push"])
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
        return kinds[method.streams_in, method.streams_out](
            method.path,
            request_serializer=method.request.SerializeToString if method.request else None,
            response_deserializer=method.reply.FromString if method.reply else None,
        )

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

    def wait_healthy(self, seconds: float) -> None:
        """Raises BridgeError when the service is not healthy within `seconds`."""
        deadline = time.monotonic() + seconds
        while not self.healthy():
            if time.monotonic() > deadline:
                raise BridgeError(
                    self.address,
                    f"rollout service {self.address} did not answer within {seconds:.0f} s; is it running? "
                    f"Its log says more; start one with: python launch.py serve --config FILE",
                )
            time.sleep(0.05)

    def close(self) -> None:
        self.channel.close()

    def __enter__(self) -> Stub:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def explain(address: str, error: grpc.RpcError) -> BridgeError:
    """A gRPC failure as an error that a person can read."""
    code, details = error.code(), error.details() or "no details"
    text = f"rollout service {address}: {details} ({code.name})"
    return BridgeError(address, text, transient=code in TRANSIENT)
