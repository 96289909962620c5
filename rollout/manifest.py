"""What is about to be pushed, checked before a byte is sent: the tensors, and how the learner's hosts cut them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rollout.types import TensorSpec

MOST_SLICES = 1 << 20


class Refused(Exception):
    """A call that the receiver does not take. `code` is the gRPC status that says what kind of refusal it is."""

    code = "FAILED_PRECONDITION"


class BadManifest(Refused):
    """The learner's tensors are not the engine's, or its slices do not make up a tensor."""

    code = "INVALID_ARGUMENT"


@dataclass(frozen=True)
class Slice:
    """A learner device's rectangle of a tensor."""

    start: tuple[int, ...]
    size: tuple[int, ...]


def check_manifest(given: Sequence[TensorSpec], expected: Sequence[TensorSpec]) -> None:
    """Raises BadManifest naming the first tensors that differ; the order does not matter."""
    theirs, ours = {spec.name: spec for spec in given}, {spec.name: spec for spec in expected}
    problems = [f"{name!r} appears twice" for name in sorted(n for n in theirs if sum(s.name == n for s in given) > 1)]
    problems += [f"{name!r} is missing" for name in sorted(ours.keys() - theirs.keys())]
    problems += [f"{name!r} is not one of the engine's" for name in sorted(theirs.keys() - ours.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        a, b = theirs[name], ours[name]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            problems.append(f"{name!r} is {a.dtype}{list(a.shape)}, the engine's is {b.dtype}{list(b.shape)}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise BadManifest(
            f"the learner's tensors are not the engine's: {'; '.join(problems[:3])}{more}. Both sides must load the same "
            f"model, and the push must use the engine's dtype"
        )


def check_size(tensors: int, slices: int, expected: int) -> None:
    """Raises BadManifest, before memory is taken for it, for one far larger than the engine's."""
    if tensors > 2 * expected + 100 or slices > MOST_SLICES:
        raise BadManifest(
            f"a manifest of {tensors} tensors in {slices} slices; the engine has {expected} tensors, and {MOST_SLICES} "
            f"slices are allowed"
        )


def check_slices(spec: TensorSpec, slices: Sequence[Slice]) -> None:
    """Raises BadManifest unless the slices are a grid that covers the tensor exactly once, as every sharding is."""
    shape = list(spec.shape)
    fault = BadManifest(f"tensor {spec.name!r}: its {len(slices)} slices do not cover shape {shape} exactly once")
    if any(len(s.start) != len(spec.shape) or len(s.size) != len(spec.shape) for s in slices):
        raise fault
    cells = 1
    for dim, length in enumerate(spec.shape):
        edge = 0
        intervals = sorted({(s.start[dim], s.size[dim]) for s in slices})
        for start, size in intervals:
            if start != edge or size < 0:
                raise fault
            edge += size
        if edge != length:
            raise fault
        cells *= len(intervals)
    if len(slices) != cells or len({s.start for s in slices}) != cells:
        raise fault


def whole(spec: TensorSpec) -> Slice:
    """The one slice of a tensor that is not cut."""
    return Slice((0,) * len(spec.shape), spec.shape)
