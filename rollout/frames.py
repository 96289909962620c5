"""Raw frames: how the bytes of weights travel.

A frame is a fixed header and at most 1 MiB of payload. The checksum covers the payload and, as its seed, the header, so a
flipped bit anywhere is found before a byte is stored. A slice (a learner device's rectangle of a tensor) is sent as DATA
frames at byte offsets inside it, or as DELTA frames with the difference from what the service has there (delta.py), in any
order, and one END frame with the checksum of the whole slice as it shall be. Pure functions; what may be written where is
the receiver's business.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from rollout import delta

MAX_PAYLOAD = 1 << 20
DATA, END, DELTA = 0, 1, 2
_LIMITS = {DATA: MAX_PAYLOAD, DELTA: MAX_PAYLOAD + delta.HEADER_BYTES}

# magic, kind, push id, tensor, slice, offset, length; then xxh3_64
_HEADER = struct.Struct("<4sBxxxQIIQI")
_DIGEST = struct.Struct("<Q")
_MAGIC = b"SQW1"
HEADER_BYTES = _HEADER.size + _DIGEST.size


class FrameError(ValueError):
    """The bytes are not an intact frame."""


@dataclass(frozen=True)
class Frame:
    """`offset` counts bytes inside the slice. An END frame carries the slice's length in `offset` and its digest."""

    push_id: int
    tensor: int
    slice: int
    offset: int
    payload: memoryview
    kind: int = DATA
    digest: int = 0  # of END: xxh3_64 of the whole slice

    @property
    def place(self) -> str:
        return f"push {self.push_id:016x}, tensor {self.tensor}, slice {self.slice}, offset {self.offset}"


def push_id(run: str, epoch: int, version: int) -> int:
    """The number by which frames name their push. Every learner host computes the same one."""
    return xxhash.xxh3_64_intdigest(f"{epoch}/{version}/{run}".encode())


def checksum(data: memoryview | bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)


def encode(frame: Frame) -> bytes:
    """One frame as bytes. grpcio takes `bytes` only, so this is the one copy of a payload on the sender."""
    payload = memoryview(_DIGEST.pack(frame.digest)) if frame.kind == END else frame.payload
    if frame.kind != END and not 0 < payload.nbytes <= _LIMITS[frame.kind]:
        raise FrameError(f"{frame.place}: a payload has 1 to {_LIMITS[frame.kind]} bytes, not {payload.nbytes}")
    header = _HEADER.pack(_MAGIC, frame.kind, frame.push_id, frame.tensor, frame.slice, frame.offset, payload.nbytes)
    return b"".join((header, _DIGEST.pack(_sum(header, payload)), payload))


def decode(data: bytes) -> Frame:
    """Bytes → frame; the payload is a view into `data`. Raises FrameError saying what is wrong and where it belonged."""
    if len(data) < HEADER_BYTES:
        raise FrameError(f"frame of {len(data)} bytes: shorter than its header of {HEADER_BYTES}")
    header, payload = data[: _HEADER.size], memoryview(data)[HEADER_BYTES:]
    magic, kind, push, tensor, slice_, offset, length = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise FrameError(f"not a frame of weights: it starts with {magic!r}, expected {_MAGIC!r}")
    place = Frame(push, tensor, slice_, offset, payload).place
    if length != payload.nbytes:
        raise FrameError(f"{place}: the header says {length} bytes of payload, {payload.nbytes} came")
    (expected,) = _DIGEST.unpack_from(data, _HEADER.size)
    found = _sum(header, payload)
    if found != expected:
        raise FrameError(f"{place}: corrupted, xxh3 is {found:016x}, the header says {expected:016x}")
    if kind in _LIMITS and 0 < length <= _LIMITS[kind]:
        return Frame(push, tensor, slice_, offset, payload, kind)
    if kind == END and length == _DIGEST.size:
        return Frame(push, tensor, slice_, offset, payload[:0], END, _DIGEST.unpack(payload)[0])
    raise FrameError(f"{place}: kind {kind} with {length} bytes of payload is no frame")


def slice_frames(
    push: int, tensor: int, slice_: int, data: memoryview, ranges: list[tuple[int, int]]
) -> Iterator[bytes]:
    """Encoded frames for `ranges` (offset, length) of a slice's bytes, and its END frame."""
    for start, length in ranges:
        for offset in range(start, start + length, MAX_PAYLOAD):
            end = min(offset + MAX_PAYLOAD, start + length)
            yield encode(Frame(push, tensor, slice_, offset, data[offset:end]))
    yield encode(Frame(push, tensor, slice_, data.nbytes, data[:0], END, checksum(data)))


def _sum(header: bytes, payload: memoryview) -> int:
    return xxhash.xxh3_64_intdigest(payload, seed=xxhash.xxh3_64_intdigest(header))
