"""Where pushed weights wait until they are whole: the state machine of one service's weights.

    EMPTY → STAGING → COMPLETE → APPLYING → LIVE          QUARANTINED when applying failed

Bytes are staged in memory allocated once, while generation goes on with the live weights. Nothing reaches the engine before
every byte of every tensor is there and its checksum is right. A push is fenced by (run, epoch, version): a stale learner
is refused, repeated calls and frames do no harm. After a failure while applying nobody knows what the engine holds, so it
generates nothing until a whole push has been applied.

No threads, no clock of its own, no gRPC: server.py drives it from one event loop.
"""

from __future__ import annotations

import bisect
import enum
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rollout import frames
from rollout.manifest import BadManifest, Refused, Slice, check_manifest, check_slices, whole
from rollout.types import TensorSpec
from rollout.wire import numpy_dtype


class State(enum.IntEnum):
    """As in bridge.proto."""

    EMPTY = 0
    STAGING = 1
    COMPLETE = 2
    APPLYING = 3
    LIVE = 4
    QUARANTINED = 5


class StaleLearner(Refused):
    """The caller's learner has been replaced by a later start, or another run is pushing. Trying again does not help."""

    code = "PERMISSION_DENIED"


class NotOpen(Refused):
    """The push was never begun, its lease has ended or a later one replaced it. Begin again."""

    code = "ABORTED"


class Corrupt(Refused):
    """Bytes did not arrive as they were sent. What was sound is kept; Begin tells what is missing."""

    code = "DATA_LOSS"


@dataclass(frozen=True)
class Key:
    """Which weights: `epoch` counts the starts of a run's learner, `version` its pushes."""

    run: str
    epoch: int
    version: int

    @property
    def push_id(self) -> int:
        return frames.push_id(self.run, self.epoch, self.version)

    def __str__(self) -> str:
        return f"version {self.version} of run {self.run!r}, start {self.epoch}"


@dataclass(frozen=True)
class Range:
    """Bytes that have not come: inside slice `slice` of the manifest's tensor `tensor`."""

    tensor: int
    slice: int
    offset: int
    length: int


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

    def missing(self, total: int) -> list[tuple[int, int]]:
        """(offset, length) of what [0, total) lacks."""
        edges = [0, *itertools.chain.from_iterable(self.pairs), total]
        return [(a, b - a) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]

    @property
    def size(self) -> int:
        return sum(end - start for start, end in self.pairs)


@dataclass
class _Part:
    """One slice being staged."""

    tensor: int
    slice: Slice
    view: np.ndarray  # its bytes in the staging memory
    ranges: Ranges = field(default_factory=Ranges)
    digest: int | None = None


class Receiver:
    """Stages one push at a time. `specs` is the engine's own list; `clock` gives seconds."""

    def __init__(self, specs: Sequence[TensorSpec], clock: Callable[[], float], live: Key | None = None) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._bytes = {spec.name: math.prod(spec.shape) * numpy_dtype(spec.dtype).itemsize for spec in specs}
        self._memory = np.empty(sum(_aligned(n) for n in self._bytes.values()), np.uint8)
        self._clock = clock
        self.live = live
        self.staging: Key | None = None
        self.quarantine = ""
        self._state = State.LIVE if live else State.EMPTY
        self._manifest: list[TensorSpec] = []
        self._parts: list[list[_Part]] = []
        self._lease = self._deadline = 0.0

    @property
    def state(self) -> State:
        self._expire()
        return self._state

    @property
    def total_bytes(self) -> int:
        return sum(self._bytes.values())

    @property
    def received_bytes(self) -> int:
        return sum(part.ranges.size for parts in self._parts for part in parts)

    def begin(
        self, key: Key, manifest: Sequence[TensorSpec], slices: Sequence[Sequence[Slice]], lease: float
    ) -> list[Range]:
        """Opens `key`'s push, or goes on with it; returns what is still missing.

        `slices[t]` cut tensor t; none means one slice, the whole. A later push of the same learner, or any push of a later
        start, replaces a staged one. Raises StaleLearner, BadManifest.
        """
        self._expire()
        self._fence(key)
        if self._state is State.LIVE and self.live == key:
            return []
        check_manifest(manifest, list(self._specs.values()))
        cut = [list(given) or [whole(spec)] for spec, given in zip(manifest, slices, strict=True)]
        for spec, given in zip(manifest, cut, strict=True):
            check_slices(spec, given)
        if not lease > 0:
            raise BadManifest(f"lease of {lease} seconds: must be above 0")
        same = self.staging == key and self._manifest == list(manifest)
        if not (same and [[part.slice for part in parts] for parts in self._parts] == cut):
            self._layout(list(manifest), cut)
            self.staging, self._state = key, State.STAGING
        self._lease = lease
        self._renew()
        return self.missing()

    def frame(self, data: bytes) -> bool:
        """Stages one frame; False when it had come before. Raises Corrupt, NotOpen, BadManifest."""
        self._expire()
        try:
            frame = frames.decode(data)
        except frames.FrameError as error:
            raise Corrupt(str(error)) from None
        if self.staging is None or frame.push_id != self.staging.push_id or self._state is State.APPLYING:
            raise NotOpen(f"{frame.place}: this push is not open; call Begin again")
        part, name = self._part(frame)
        self._renew()
        end = frame.offset + frame.payload.nbytes
        if end > part.view.nbytes or (frame.kind == frames.END and frame.offset != part.view.nbytes):
            raise BadManifest(
                f"{frame.place}: tensor {name!r} has {part.view.nbytes} bytes in this slice, the frame ends at {end}"
            )
        if frame.kind == frames.END:
            known, part.digest = part.digest, frame.digest
            return known != frame.digest
        if not part.ranges.add(frame.offset, end):
            return False
        part.view[frame.offset : end] = np.frombuffer(frame.payload, np.uint8)
        return True

    def missing(self) -> list[Range]:
        """What the open push lacks. A slice that lacks only its digest shows an empty range at its end."""
        out = []
        for t, parts in enumerate(self._parts):
            for s, part in enumerate(parts):
                gaps = part.ranges.missing(part.view.nbytes)
                if not gaps and part.digest is None:
                    gaps = [(part.view.nbytes, 0)]
                out += [Range(t, s, offset, length) for offset, length in gaps]
        return out

    def prepare(self, key: Key) -> None:
        """STAGING → COMPLETE: every byte is there and every slice's checksum is right. Raises Refused, Corrupt."""
        self._expire()
        if self._is_live(key) or (self.staging == key and self._state in (State.COMPLETE, State.APPLYING)):
            return
        self._require_open(key)
        missing = self.missing()
        if missing:
            size = sum(r.length for r in missing)
            name = self._manifest[missing[0].tensor].name
            raise Refused(
                f"{key} is not complete: {size} bytes in {len(missing)} ranges are missing, the first in tensor {name!r} "
                f"at offset {missing[0].offset}; Begin lists them"
            )
        broken = [p for parts in self._parts for p in parts if frames.checksum(p.view.data) != p.digest]
        for part in broken:
            part.ranges, part.digest = Ranges(), None
        if broken:
            names = ", ".join(sorted({repr(self._manifest[part.tensor].name) for part in broken}))
            raise Corrupt(
                f"{key}: the staged bytes of {names} do not have the sender's checksum; they must be sent again"
            )
        self._state = State.COMPLETE
        self._renew()

    def start_apply(self, key: Key) -> dict[str, np.ndarray[Any, Any]] | None:
        """COMPLETE → APPLYING: the tensors to hand to the engine, or None when `key` is live already.

        They are views into memory that the next push overwrites: the engine must copy. Raises Refused.
        """
        self._expire()
        if self._is_live(key):
            return None
        self._require_open(key)
        if self._state is not State.COMPLETE:
            raise Refused(f"{key} cannot be applied: it is {self._state.name}, not COMPLETE; PREPARE comes first")
        tensors = {spec.name: _assemble(spec, parts) for spec, parts in zip(self._manifest, self._parts, strict=True)}
        self._state, self.live = State.APPLYING, None
        return tensors

    def finish_apply(self, error: str = "") -> None:
        """APPLYING → LIVE, or QUARANTINED with the reason."""
        if self._state is not State.APPLYING:
            raise Refused(f"nothing is being applied: the state is {self._state.name}")
        self.live = None if error else self.staging
        self.quarantine = f"{self.staging} failed while it was applied: {error}" if error else ""
        self._drop()

    def abort(self, key: Key) -> None:
        """Drops `key`'s staged bytes, if that push is open. Raises Refused while it is being applied."""
        self._expire()
        if self.staging != key:
            return
        if self._state is State.APPLYING:
            raise Refused(f"{key} is being applied and cannot be aborted any more")
        self._drop()

    def require_live(self, run: str, epoch: int, version: int, or_later: bool = False) -> Key:
        """The weights that generate now, if they are the ones asked for, or with `or_later` the same learner's of a later
        version; an empty `run` takes any owner's. Raises Refused."""
        state = self.state
        if self.live is None:
            why = self.quarantine or f"the state is {state.name}"
            raise Refused(f"weight version {version} is not live: the service has no weights now ({why}); push them")
        fits = self.live.version >= version if or_later else self.live.version == version
        if not fits or (run and (self.live.run, self.live.epoch) != (run, epoch)):
            wanted = Key(run, epoch, version) if run else f"version {version}"
            raise Refused(f"{wanted} is not live: this service generates with {self.live}; push the weights first")
        return self.live

    def _fence(self, key: Key) -> None:
        if self._state is State.APPLYING:
            raise Refused(f"{self.staging} is being applied; try again")
        for owner, what in ((self.staging, "staging"), (self.live, "live")):
            if owner is None or not owner.run:
                continue
            if owner.run == key.run and (key.epoch, key.version) < (owner.epoch, owner.version):
                raise StaleLearner(f"{key} is stale: {owner} is already {what}; this learner has been replaced")
            if owner.run != key.run and what == "staging":
                raise StaleLearner(f"{key} is refused: {owner} is being pushed; wait until its lease ends")

    def _is_live(self, key: Key) -> bool:
        return self.live == key and self._state is not State.APPLYING

    def _require_open(self, key: Key) -> None:
        if self.staging != key:
            raise NotOpen(f"{key} is not the open push ({self.staging or 'none is open'}); call Begin again")

    def _part(self, frame: frames.Frame) -> tuple[_Part, str]:
        if frame.tensor >= len(self._parts) or frame.slice >= len(self._parts[frame.tensor]):
            raise BadManifest(f"{frame.place}: the manifest has no such slice")
        return self._parts[frame.tensor][frame.slice], self._manifest[frame.tensor].name

    def _layout(self, manifest: list[TensorSpec], cut: list[list[Slice]]) -> None:
        self._manifest, self._parts, position = manifest, [], 0
        for t, (spec, slices) in enumerate(zip(manifest, cut, strict=True)):
            start, item = position, numpy_dtype(spec.dtype).itemsize
            parts = []
            for piece in slices:
                size = math.prod(piece.size) * item
                parts.append(_Part(t, piece, self._memory[start : start + size]))
                start += size
            self._parts.append(parts)
            position += _aligned(self._bytes[spec.name])

    def _renew(self) -> None:
        self._deadline = self._clock() + self._lease

    def _expire(self) -> None:
        if self._state in (State.STAGING, State.COMPLETE) and self._clock() > self._deadline:
            self._drop()

    def _drop(self) -> None:
        self.staging, self._manifest, self._parts = None, [], []
        self._state = State.LIVE if self.live else State.QUARANTINED if self.quarantine else State.EMPTY


def _assemble(spec: TensorSpec, parts: list[_Part]) -> np.ndarray[Any, Any]:
    dtype = numpy_dtype(spec.dtype)
    if len(parts) == 1:
        return parts[0].view.view(dtype).reshape(spec.shape)
    out = np.empty(spec.shape, dtype)
    for part in parts:
        where = tuple(slice(a, a + n) for a, n in zip(part.slice.start, part.slice.size, strict=True))
        out[where] = part.view.view(dtype).reshape(part.slice.size)
    return out


def _aligned(size: int) -> int:
    return -(-size // 64) * 64
