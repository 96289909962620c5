"""What both ends of the bridge must agree on besides the messages: method names, limits, liveness, addresses.

The methods are registered from one table instead of generated service code, because `Push` carries raw frames: protobuf
would copy each payload twice more. What protects the bridge is in security.py.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # we only spawn; the fork handlers print warnings

import grpc as grpc  # others take it from here, so that the lines above always come first

from rollout import bridge_pb2 as pb
from rollout.errors import UserError

SERVICE = pb.DESCRIPTOR.services_by_name["Bridge"].full_name
MAX_MESSAGE_BYTES = 64 << 20
STOPPING = "this service is stopping"
"""What a service that was told to stop says, with UNAVAILABLE, to who asks for episodes or waits for some."""

# A peer that has vanished without closing its connection is found by these pings, and its episodes are cancelled.
OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.max_frame_size", 4 << 20),  # of 16 KiB by default: a frame of weights would be cut in 64
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.enable_http_proxy", 0),  # the services are ours, whatever the environment says of a proxy
    ("grpc.so_reuseport", 0),  # a second service on the same port must fail, not share it
)


@dataclass(frozen=True)
class Method:
    """One method of the service. `request` or `reply` None means raw bytes."""

    name: str
    request: Any
    reply: Any
    streams_in: bool = False
    streams_out: bool = False

    @property
    def path(self) -> str:
        return f"/{SERVICE}/{self.name}"


METHODS = {
    method.name: method
    for method in (
        Method("Rollout", pb.RolloutRequest, pb.RolloutEvent, streams_out=True),
        Method("Begin", pb.BeginRequest, pb.PushState),
        Method("Push", None, pb.PushReply, streams_in=True),
        Method("Commit", pb.CommitRequest, pb.PushState),
        Method("Abort", pb.AbortRequest, pb.PushState),
        Method("Status", pb.StatusRequest, pb.StatusReply),
    )
}


def split_address(address: str) -> tuple[str, int]:
    """`host:port` → (host, port); `[::1]:port` for IPv6. Raises UserError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise UserError(f"address {address!r}: expected host:port, for example 127.0.0.1:8700")
    return host.strip("[]"), int(port)
