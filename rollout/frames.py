"""Raw frames: how the bytes of weights travel.

A frame is a fixed header and at most 1 MiB of payload. The header carries the payload's checksum and its own, so a flipped
bit anywhere is found before a byte is stored. A slice (a learner device's rectangle of a tensor) is sent as DATA frames at
byte offsets inside it, or as DELTA frames with the difference from what the service has there (delta.py), in any order, and
one END frame with the checksum of the whole slice as it shall be: that of its chunks' checksums, so no byte need be hashed
twice. Pure functions; what may be written where is the receiver's business.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import xxhash

from rollout import delta

MAX_PAYLOAD = 1 << 20
CHUNK = MAX_PAYLOAD
"""Bytes of a slice that are hashed together, from its start."""
DATA, END, DELTA = 0, 1, 2
_LIMITS = {DATA: MAX_PAYLOAD, DELTA: MAX_PAYLOAD + delta.HEADER_BYTES, END: 0}

# magic, kind, push id, tensor, slice, offset, length, the payload's xxh3_64 (of END: the slice's); then the xxh3_64 of these
_HEADER = struct.Struct("<4sBxxxQIIQIQ")
_DIGEST = struct.Struct("<Q")
_MAGIC = b"SQW2"
HEADER_BYTES = _HEADER.size + _DIGEST.size


class FrameError(ValueError):
    """The bytes are not an intact frame."""


@dataclass(frozen=True)
class Head:
    """What a frame's header says. `offset` counts bytes inside the slice; an END frame has the slice's length there."""

    push_id: int
    tensor: int
    slice: int
    offset: int
    length: int
    kind: int = DATA
    digest: int = 0
    """xxh3_64 of the payload; of END: the whole slice's checksum, as `join` makes it."""

    @property
    def place(self) -> str:
        return f"push {self.push_id:016x}, tensor {self.tensor}, slice {self.slice}, offset {self.offset}"

    def pack(self) -> bytes:
        if not min(1, _LIMITS[self.kind]) <= self.length <= _LIMITS[self.kind]:
            raise FrameError(f"{self.place}: a payload has 1 to {_LIMITS[self.kind]} bytes, not {self.length}")
        fields = self.kind, self.push_id, self.tensor, self.slice, self.offset, self.length, self.digest
        header = _HEADER.pack(_MAGIC, *fields)
        return header + _DIGEST.pack(xxhash.xxh3_64_intdigest(header))


@dataclass(frozen=True)
class Frame:
    head: Head
    payload: memoryview


def push_id(run: str, epoch: int, version: int) -> int:
    """The number by which frames name their push. Every learner host computes the same one."""
    return xxhash.xxh3_64_intdigest(f"{epoch}/{version}/{run}".encode())


def digest(chunk: memoryview | bytes) -> int:
    return xxhash.xxh3_64_intdigest(chunk)


def join(digests: Iterable[int]) -> int:
    """A slice's checksum from its chunks'."""
    return xxhash.xxh3_64_intdigest(b"".join(_DIGEST.pack(one) for one in digests))


def frame(push: int, tensor: int, slice_: int, offset: int, payload: memoryview, kind: int = DATA) -> Frame:
    """A frame with bytes. Raises FrameError when there are too many or none."""
    return Frame(Head(push, tensor, slice_, offset, payload.nbytes, kind, digest(payload)), payload)


def end(push: int, tensor: int, slice_: int, size: int, checksum: int) -> Frame:
    """The last frame of a slice of `size` bytes."""
    return Frame(Head(push, tensor, slice_, size, 0, END, checksum), memoryview(b""))


def encode(frame: Frame) -> bytes:
    """One frame as bytes. grpcio takes `bytes` only, so this is the one copy of a payload on the sender."""
    return b"".join((frame.head.pack(), frame.payload))


def decode(data: bytes) -> Frame:
    """Bytes → frame; the payload is a view into `data`. Raises FrameError saying what is wrong and where it belonged."""
    if len(data) < HEADER_BYTES:
        raise FrameError(f"frame of {len(data)} bytes: shorter than its header of {HEADER_BYTES}")
    head, payload = read_head(data[:HEADER_BYTES]), memoryview(data)[HEADER_BYTES:]
    if head.length != payload.nbytes:
        raise FrameError(f"{head.place}: the header says {head.length} bytes of payload, {payload.nbytes} came")
    return check(head, payload)


def read_head(data: bytes) -> Head:
    """The first HEADER_BYTES of a frame. Raises FrameError."""
    magic, kind, push, tensor, slice_, offset, length, digest_ = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise FrameError(f"not a frame of weights: it starts with {magic!r}, expected {_MAGIC!r}")
    head = Head(push, tensor, slice_, offset, length, kind, digest_)
    (expected,) = _DIGEST.unpack_from(data, _HEADER.size)
    if xxhash.xxh3_64_intdigest(data[: _HEADER.size]) != expected:
        raise FrameError(f"{head.place}: corrupted, the header is not what it was")
    if kind not in _LIMITS or not min(1, _LIMITS[kind]) <= length <= _LIMITS[kind]:
        raise FrameError(f"{head.place}: kind {kind} with {length} bytes of payload is no frame")
    return head


def check(head: Head, payload: memoryview) -> Frame:
    """The frame that `head` and as many bytes as it says make. Raises FrameError."""
    if head.kind != END:
        found = digest(payload)
        if found != head.digest:
            raise FrameError(f"{head.place}: corrupted, xxh3 is {found:016x}, the header says {head.digest:016x}")
    return Frame(head, payload)
