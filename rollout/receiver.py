"""Where pushed weights wait until they are whole: the state machine of one service's weights.

    EMPTY → STAGING → COMPLETE → APPLYING → LIVE          QUARANTINED when applying failed

Bytes are staged in memory allocated once, while generation goes on with the live weights. Nothing reaches the engine before
every byte of every tensor is there and its checksum is right. A push is fenced by (run, epoch, version): a stale learner
is refused, repeated calls and frames do no harm. After a failure while applying nobody knows what the engine holds, so it
generates nothing until a whole push has been applied.

The memory keeps the bytes of the weights that are live. A push of differences from them is kept as it comes (it is small)
and turns those bytes into the new ones at once, when all of it is there; the checksums are of the result. After anything
that leaves the bytes in doubt, and for any other base, the push that is opened takes everything.

No threads, no clock of its own, no gRPC. Frames come from the threads of the data port, all else from weight_calls.py; a lock
keeps them apart, but for `prepare`, which takes long: weight_calls.py holds other calls back meanwhile, and only `frame`
may come in between.
"""

from __future__ import annotations

import enum
import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from rollout import delta, frames
from rollout.manifest import BadManifest, Refused, Slice, check_manifest, check_slices, whole
from rollout.staging import Part, aligned, allocate, assemble, layout, tensor_bytes
from rollout.types import TensorSpec

P = ParamSpec("P")
T = TypeVar("T")


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


def _one_at_a_time(method: Callable[Concatenate[Receiver, P], T]) -> Callable[Concatenate[Receiver, P], T]:
    @functools.wraps(method)
    def run(self: Receiver, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._lock:
            return method(self, *args, **kwargs)

    return run


class Receiver:
    """Stages one push at a time. `specs` is the engine's own list; `clock` gives seconds."""

    def __init__(self, specs: Sequence[TensorSpec], clock: Callable[[], float], live: Key | None = None) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._memory: np.ndarray | None = None
        self._lock = threading.RLock()
        self._clock = clock
        self.live = live
        self.staging: Key | None = None
        self.held: Key | None = None
        """Whose bytes the memory holds, whole and checked."""
        self.quarantine = ""
        self._base: Key | None = None  # what the open push was asked to be a difference from
        self._delta = False  # and whether it is
        self._state = State.LIVE if live else State.EMPTY
        self._manifest: list[TensorSpec] = []
        self._parts: list[list[Part]] = []
        self._lease = self._deadline = 0.0

    @property
    @_one_at_a_time
    def state(self) -> State:
        self._expire()
        return self._state

    @property
    def total_bytes(self) -> int:
        return sum(tensor_bytes(spec) for spec in self._specs.values())

    @property
    @_one_at_a_time
    def received_bytes(self) -> int:
        return sum(part.ranges.size for parts in self._parts for part in parts)

    @property
    def takes_delta(self) -> bool:
        """Whether the open push takes differences from the base it was asked for, not everything."""
        return self.staging is not None and self._delta

    @_one_at_a_time
    def begin(
        self,
        key: Key,
        manifest: Sequence[TensorSpec],
        slices: Sequence[Sequence[Slice]],
        lease: float,
        base: Key | None = None,
    ) -> list[Range]:
        """Opens `key`'s push, or goes on with it; returns what is still missing, in bytes of the new weights.

        `slices[t]` cut tensor t; none means one slice, the whole. Differences from `base` are taken where its bytes are held,
        cut in the same way: see `takes_delta`. A later push of the same learner, or any push of a later start, replaces a
        staged one. Raises StaleLearner, BadManifest, NoMemory.
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
        same = self._manifest == list(manifest) and [[part.slice for part in parts] for parts in self._parts] == cut
        if not (same and self.staging == key and self._base == base):
            self._drop()
            self._delta = same and base is not None and self.held == base
            if not self._delta:
                if self._memory is None:
                    self._memory = allocate(sum(aligned(tensor_bytes(spec)) for spec in self._specs.values()))
                self.held = None
                self._manifest, self._parts = list(manifest), layout(self._memory, manifest, cut)
            self.staging, self._base, self._state = key, base, State.STAGING
        self._lease = lease
        self._renew()
        return self.missing()

    @_one_at_a_time
    def frame(self, frame: frames.Frame) -> bool:
        """Stages one intact frame; False when it had come before. Raises Corrupt, NotOpen, BadManifest."""
        head = frame.head
        self._expire()
        if self.staging is None or head.push_id != self.staging.push_id or self._state is State.APPLYING:
            raise NotOpen(f"{head.place}: this push is not open; call Begin again")
        part, name = self._part(head)
        self._renew()
        end = head.offset + (_covered(frame) if head.kind == frames.DELTA else head.length)
        if end > part.view.nbytes or (head.kind == frames.END and head.offset != part.view.nbytes):
            raise BadManifest(
                f"{head.place}: tensor {name!r} has {part.view.nbytes} bytes in this slice, the frame ends at {end}"
            )
        if head.kind == frames.END:
            known, part.checksum = part.checksum, head.digest
            return known != head.digest
        if (head.kind == frames.DELTA) is not self._delta:
            raise BadManifest(f"{head.place}: this push takes {'differences' if self._delta else 'everything'}")
        if self._delta:
            known_bytes = part.ranges.holds(head.offset, end)
            if 0 < known_bytes < end - head.offset:
                raise BadManifest(f"{head.place}: overlaps another difference of tensor {name!r}")
        if not part.ranges.add(head.offset, end):
            return False
        if self._delta:
            part.deltas.append((head.offset, frame.payload))
        else:
            part.write(head.offset, frame.payload, head.digest)
        return True

    @_one_at_a_time
    def missing(self) -> list[Range]:
        """What the open push lacks. A slice that lacks only its checksum shows an empty range at its end."""
        out = []
        for t, parts in enumerate(self._parts):
            for s, part in enumerate(parts):
                gaps = part.ranges.missing(part.view.nbytes)
                if not gaps and part.checksum is None:
                    gaps = [(part.view.nbytes, 0)]
                out += [Range(t, s, offset, length) for offset, length in gaps]
        return out

    def prepare(self, key: Key, run: Callable[..., Iterable[bool]] = map) -> None:
        """STAGING → COMPLETE: every byte is there and every slice's checksum is right. Raises Refused, Corrupt.

        `run` is `map`, or that of a pool of threads. After differences that did not give what they should the next push
        takes everything.
        """
        parts = self._to_check(key)
        if parts is not None:
            self._checked(key, [part for part, sound in zip(parts, run(Part.check, parts), strict=True) if not sound])

    @_one_at_a_time
    def _to_check(self, key: Key) -> list[Part] | None:
        """Everything that is staged; None when that is done already."""
        self._expire()
        if self._is_live(key) or (self.staging == key and self._state in (State.COMPLETE, State.APPLYING)):
            return None
        self._require_open(key)
        missing = self.missing()
        if missing:
            size = sum(r.length for r in missing)
            name = self._manifest[missing[0].tensor].name
            raise Refused(
                f"{key} is not complete: {size} bytes in {len(missing)} ranges are missing, the first in tensor {name!r} "
                f"at offset {missing[0].offset}; Begin lists them"
            )
        self._deadline, self.held = math.inf, None
        return [part for parts in self._parts for part in parts]

    @_one_at_a_time
    def _checked(self, key: Key, broken: Sequence[Part]) -> None:
        self._renew()
        if broken:
            names = ", ".join(sorted({repr(self._manifest[part.tensor].name) for part in broken}))
            again = "they must be sent again"
            if self._delta:  # the sound slices are new, the others old or neither
                again = "everything must be sent"
                self._drop()
            for part in broken:
                part.clear()
            raise Corrupt(f"{key}: the staged bytes of {names} do not have the sender's checksum; {again}")
        self._state = State.COMPLETE

    @_one_at_a_time
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
        assert self._memory is not None
        tensors = {
            spec.name: assemble(spec, parts, self._memory)
            for spec, parts in zip(self._manifest, self._parts, strict=True)
        }
        self._state, self.live = State.APPLYING, None
        return tensors

    @_one_at_a_time
    def finish_apply(self, error: str = "") -> None:
        """APPLYING → LIVE, or QUARANTINED with the reason."""
        if self._state is not State.APPLYING:
            raise Refused(f"nothing is being applied: the state is {self._state.name}")
        self.live = self.held = None if error else self.staging
        self.quarantine = f"{self.staging} failed while it was applied: {error}" if error else ""
        self._drop()

    @_one_at_a_time
    def abort(self, key: Key) -> None:
        """Drops `key`'s staged bytes, if that push is open. Raises Refused while it is being applied."""
        self._expire()
        if self.staging != key:
            return
        if self._state is State.APPLYING:
            raise Refused(f"{key} is being applied and cannot be aborted any more")
        self._drop()

    @_one_at_a_time
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

    def _part(self, head: frames.Head) -> tuple[Part, str]:
        if head.tensor >= len(self._parts) or head.slice >= len(self._parts[head.tensor]):
            raise BadManifest(f"{head.place}: the manifest has no such slice")
        return self._parts[head.tensor][head.slice], self._manifest[head.tensor].name

    def _renew(self) -> None:
        self._deadline = self._clock() + self._lease

    def _expire(self) -> None:
        if self._state in (State.STAGING, State.COMPLETE) and self._clock() > self._deadline:
            self._drop()

    def _drop(self) -> None:
        self.staging, self._base, self._delta = None, None, False
        for part in itertools.chain.from_iterable(self._parts):
            part.clear()
        self._state = State.LIVE if self.live else State.QUARANTINED if self.quarantine else State.EMPTY


def _covered(frame: frames.Frame) -> int:
    try:
        return delta.covered(frame.payload)
    except delta.DeltaError as error:
        raise Corrupt(f"{frame.head.place}: {error}") from None
