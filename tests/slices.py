"""The frames of a slice, cut by an obvious loop: what tests send instead of a learner."""

from __future__ import annotations

from collections.abc import Iterator

from rollout import frames


def checksum(data: memoryview | bytes) -> int:
    """Of a whole slice: the checksum of those of its chunks."""
    view = memoryview(data)
    return frames.join(
        frames.digest(view[start : start + frames.CHUNK]) for start in range(0, view.nbytes, frames.CHUNK)
    )


def slice_frames(
    push: int, tensor: int, slice_: int, data: memoryview, ranges: list[tuple[int, int]]
) -> Iterator[frames.Frame]:
    """Frames for `ranges` (offset, length) of a slice's bytes, and its END frame."""
    for start, length in ranges:
        for offset in range(start, start + length, frames.MAX_PAYLOAD):
            stop = min(offset + frames.MAX_PAYLOAD, start + length)
            yield frames.frame(push, tensor, slice_, offset, data[offset:stop])
    yield frames.end(push, tensor, slice_, data.nbytes, checksum(data))
