"""The memory in which pushed weights wait: its slices, what of them has come, and how they become tensors.

Allocated once and overwritten by push after push. Which push may write is the receiver's business.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rollout import delta, frames
from rollout.manifest import Refused, Slice
from rollout.types import TensorSpec
from rollout.wire import numpy_dtype


class NoMemory(Refused):
    """There is not enough memory to stage the weights. Trying again does not help."""

    code = "RESOURCE_EXHAUSTED"


@dataclass
class Ranges:
    """A set of byte positions as sorted, disjoint, non-touching [start, end) pairs."""

    pairs: list[tuple[int, int]] = field(default_factory=list)

    def add(self, start: int, end: int) -> bool:
        """Adds [start, end); False when all of it was there."""
        first = bisect.bisect_left(self.pairs, start, key=lambda p: p[1])
        last = bisect.bisect_right(self.pairs, end, key=lambda p: p[0])
        touched = self.pairs[first:last]
        if touched and touched[0][0] <= start and end <= touched[0][1]:
            return False
        if touched:
            start, end = min(start, touched[0][0]), max(end, touched[-1][1])
        self.pairs[first:last] = [(start, end)]
        return True

    def holds(self, start: int, end: int) -> int:
        """How many positions of [start, end) are in the set."""
        return sum(max(0, min(end, b) - max(start, a)) for a, b in self.pairs)

    def missing(self, total: int) -> list[tuple[int, int]]:
        """(offset, length) of what [0, total) lacks."""
        edges = [0, *itertools.chain.from_iterable(self.pairs), total]
        return [(a, b - a) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]

    @property
    def size(self) -> int:
        return sum(end - start for start, end in self.pairs)


@dataclass
class Part:
    """One slice being staged."""

    tensor: int
    slice: Slice
    start: int  # its place in the memory
    view: np.ndarray  # its bytes there
    ranges: Ranges = field(default_factory=Ranges)
    checksum: int | None = None
    digests: dict[int, int] = field(default_factory=dict)  # of chunks that came whole, by offset
    deltas: list[tuple[int, memoryview]] = field(default_factory=list)  # offset, difference; not applied yet

    def clear(self) -> None:
        self.ranges, self.checksum, self.digests, self.deltas = Ranges(), None, {}, []

    def write(self, offset: int, payload: memoryview, digest: int) -> None:
        """Puts bytes whose checksum is `digest` in their place."""
        end = offset + payload.nbytes
        self.view[offset:end] = np.frombuffer(payload, np.uint8)
        for chunk in range(offset - offset % frames.CHUNK, end, frames.CHUNK):
            self.digests.pop(chunk, None)
            if chunk == offset and min(chunk + frames.CHUNK, self.view.nbytes) == end:
                self.digests[chunk] = digest

    def check(self) -> bool:
        """Applies the differences; whether the bytes are then those that the learner has."""
        try:
            for offset, payload in self.deltas:
                delta.apply(self.view[offset : offset + delta.covered(payload)], payload)
        except delta.DeltaError:
            return False
        return frames.join(map(self._digest, range(0, self.view.nbytes, frames.CHUNK))) == self.checksum

    def _digest(self, chunk: int) -> int:
        known = self.digests.get(chunk)
        return frames.digest(self.view[chunk : chunk + frames.CHUNK].data) if known is None else known


def layout(memory: np.ndarray, manifest: Sequence[TensorSpec], cut: Sequence[Sequence[Slice]]) -> list[list[Part]]:
    """The slices of every tensor in the memory, one after the other."""
    out, position = [], 0
    for t, (spec, slices) in enumerate(zip(manifest, cut, strict=True)):
        start, item = position, numpy_dtype(spec.dtype).itemsize
        parts = []
        for piece in slices:
            size = math.prod(piece.size) * item
            parts.append(Part(t, piece, start, memory[start : start + size]))
            start += size
        out.append(parts)
        position += aligned(tensor_bytes(spec))
    return out


def tensor_bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * numpy_dtype(spec.dtype).itemsize


def assemble(spec: TensorSpec, parts: Sequence[Part], memory: np.ndarray) -> np.ndarray[Any, Any]:
    """The tensor, where it lies if it is whole or cut along its first axis alone; otherwise put together in a copy."""
    dtype = numpy_dtype(spec.dtype)
    along_first = spec.shape and all(part.slice.size[1:] == spec.shape[1:] for part in parts)
    if len(parts) == 1 or (along_first and all(a.slice.start < b.slice.start for a, b in itertools.pairwise(parts))):
        size = sum(part.view.nbytes for part in parts)
        return memory[parts[0].start : parts[0].start + size].view(dtype).reshape(spec.shape)
    out = np.empty(spec.shape, dtype)
    for part in parts:
        where = tuple(slice(a, a + n) for a, n in zip(part.slice.start, part.slice.size, strict=True))
        out[where] = part.view.view(dtype).reshape(part.slice.size)
    return out


def allocate(size: int) -> np.ndarray:
    """Memory for `size` bytes. Where the kernel tells what is free, more is not promised: it would kill the process later."""
    free = _free_memory()
    if free is not None and free < size:
        raise NoMemory(f"{_why_no_memory(size)}: {free / 1e9:.1f} GB are free")
    try:
        return np.empty(size, np.uint8)
    except MemoryError:
        raise NoMemory(f"{_why_no_memory(size)}: it was refused") from None


def _why_no_memory(size: int) -> str:
    return (
        f"staging the weights takes {size / 1e9:.1f} GB of the service's host memory besides the engine's; give it a host or "
        f"a limit with more, or train adapters, whose pushes are small"
    )


def _free_memory() -> int | None:
    """Bytes that can be had without swapping, as Linux tells; None elsewhere."""
    try:
        with open("/proc/meminfo") as lines:
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    except OSError:
        return None


def aligned(size: int) -> int:
    return -(-size // 64) * 64
