"""Lossless differences of weights: what changed in a stretch of bytes, as a learner writes it and a service applies it.

A training step at a small learning rate leaves most bfloat16 values as they were and moves the others by a bit or two. So a
difference is the positions of the changed values, as gaps, and the XOR of old and new values, byte plane by byte plane,
under zstd, which codes both close to their entropy; where much has changed, the XOR of all values. XOR needs no arithmetic
on floats, so what comes out is the new weights bit for bit. Pure functions of arrays; whether the result is what the learner
has is found by the slice's checksum (receiver.py), what is sent when by the learner.
"""

from __future__ import annotations

import struct
import threading
from typing import Any

import numpy as np
import zstandard

# mode, bytes of a value, bytes that the difference covers, changed values, bytes of gaps
_HEADER = struct.Struct("<BBxxIII")
HEADER_BYTES = _HEADER.size
_SAME, _SPARSE, _DENSE, _STORED = range(4)
_DENSE_FROM = 0.25  # share of changed values from which naming positions costs more than it saves
_ESCAPE = 255
_LEVEL = 1  # levels above gain nothing on what is left after gaps and planes

_words: dict[int, np.dtype[Any]] = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}
_local = threading.local()  # zstd's contexts are not to be shared by threads


class DeltaError(ValueError):
    """The bytes are not a difference that fits."""


def encode(old: np.ndarray, new: np.ndarray, width: int) -> tuple[bytes, int]:
    """The difference of two stretches of bytes (uint8[n]) of values of `width` bytes, and how many values changed.

    Never longer than HEADER_BYTES + n.
    """
    dtype = _words[width]
    diff = _xor(old, new).view(dtype)
    changed = np.flatnonzero(diff != 0)
    count, size = len(changed), new.nbytes
    if not count:
        return _HEADER.pack(_SAME, width, size, 0, 0), 0
    mode, gaps = _DENSE, np.empty(0, np.uint8)
    if count < _DENSE_FROM * len(diff):
        mode, gaps, diff = _SPARSE, _gaps(changed), diff[changed]
    planes = np.ascontiguousarray(diff.view(np.uint8).reshape(-1, width).T).reshape(-1)
    body = _compressor().compress(np.concatenate([gaps, planes]).data)
    if len(body) >= size:
        return _HEADER.pack(_STORED, width, size, count, 0) + _xor(old, new).tobytes(), count
    return _HEADER.pack(mode, width, size, count, len(gaps)) + body, count


def covered(payload: memoryview | bytes) -> int:
    """How many bytes of weights a difference is about. Raises DeltaError for one that cannot be right."""
    _, _, size, _, _ = _header(payload)
    return size


def apply(target: np.ndarray, payload: memoryview | bytes) -> None:
    """Turns the old bytes (uint8[n]) into the new ones in place; applied again, it turns them back. Raises DeltaError, and
    then has changed nothing."""
    mode, width, size, count, gap_bytes = _header(payload)
    if size != target.nbytes:
        raise DeltaError(f"a difference of {size} bytes for a stretch of {target.nbytes}")
    if mode == _SAME:
        return
    values = target.view(_words[width])
    body = memoryview(payload)[HEADER_BYTES:]
    if mode == _STORED:
        if body.nbytes != size:
            raise DeltaError(f"a stored difference of {body.nbytes} bytes for a stretch of {size}")
        np.bitwise_xor(target, np.frombuffer(body, np.uint8), out=target)
        return
    kept = len(values) if mode == _DENSE else count
    raw = _decompress(body, gap_bytes + kept * width)
    planes = np.ascontiguousarray(raw[gap_bytes:].reshape(width, kept).T).reshape(-1).view(_words[width])
    if mode == _DENSE:
        np.bitwise_xor(values, planes, out=values)
        return
    where = _positions(raw[:gap_bytes])
    if len(where) != count or (count and where[-1] >= len(values)):
        raise DeltaError(f"{len(where)} positions for {count} changed values of {len(values)}")
    values[where] ^= planes


def _header(payload: memoryview | bytes) -> tuple[int, int, int, int, int]:
    if len(payload) < HEADER_BYTES:
        raise DeltaError(f"a difference of {len(payload)} bytes: shorter than its header")
    mode, width, size, count, gap_bytes = _HEADER.unpack_from(payload)
    known = mode <= _STORED and width in _words
    if not known or not size or size % width or count > size // width or gap_bytes > size or len(payload) > size + 16:
        raise DeltaError(f"not a difference: mode {mode}, width {width}, {size} bytes, {count} changed")
    return mode, width, size, count, gap_bytes


def _gaps(changed: np.ndarray) -> np.ndarray:
    """How many unchanged values lie before each changed one, a byte each: 255 stands for 255 of them and goes on."""
    gaps = np.empty(len(changed), np.int64)
    gaps[0] = changed[0]
    np.subtract(changed[1:], changed[:-1], out=gaps[1:])
    gaps[1:] -= 1
    long = np.flatnonzero(gaps >= _ESCAPE)
    if not len(long):
        return gaps.astype(np.uint8)
    escapes = gaps[long] // _ESCAPE
    gaps[long] -= escapes * _ESCAPE
    return np.insert(gaps.astype(np.uint8), np.repeat(long, escapes), _ESCAPE)


def _positions(gaps: np.ndarray) -> np.ndarray:
    """The inverse of `_gaps`, sorted and without repetition whatever the bytes are."""
    where = np.cumsum(gaps, dtype=np.int64)[gaps != _ESCAPE]
    where += np.arange(len(where))
    return where


def _xor(old: np.ndarray, new: np.ndarray) -> np.ndarray[Any, Any]:
    wide = np.uint64 if new.nbytes % 8 == 0 else np.uint8
    return np.bitwise_xor(old.view(wide), new.view(wide)).view(np.uint8)


def _compressor() -> zstandard.ZstdCompressor:
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(level=_LEVEL)
    compressor: zstandard.ZstdCompressor = _local.compressor
    return compressor


def _decompress(body: memoryview, size: int) -> np.ndarray:
    """Raises DeltaError unless the body unfolds to exactly `size` bytes; a claim of more is not even tried."""
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    try:
        if zstandard.frame_content_size(body) != size:
            raise DeltaError("the compressed part has another size than its header says")
        raw = _local.decompressor.decompress(body, max_output_size=size)
    except zstandard.ZstdError as error:
        raise DeltaError(f"the compressed part is damaged: {error}") from None
    return np.frombuffer(raw, np.uint8)
