"""Pushes of differences: from the bytes that are held, exact, and everything instead wherever those are in doubt."""

import numpy as np
import pytest

from rollout import delta, frames
from rollout.manifest import BadManifest, Slice
from rollout.receiver import Corrupt, Key, Range, State
from tests.slices import checksum
from tests.unit.receiver_cases import KEY, SPECS, WHOLE, frames_for, go_live, make, stage, values


def change(data, seed=1):
    """The same tensors with some bytes changed."""
    out = [bytearray(one) for one in data]
    rng = np.random.default_rng(seed)
    for one in out:
        one[int(rng.integers(len(one)))] ^= 1 + int(rng.integers(255))
    return [bytes(one) for one in out]


def delta_frames(key, old, new, ranges, digests=None):
    """What a learner sends for the missing `ranges`: a difference of every stretch of 32 bytes, then the checksum."""
    for r in ranges:
        width = 2 if r.tensor == 1 else 4
        for start in range(r.offset, r.offset + r.length, 32):
            end = min(start + 32, r.offset + r.length)
            a, b = (np.frombuffer(data[r.tensor][start:end], np.uint8) for data in (old, new))
            payload = memoryview(delta.encode(a, b, width)[0])
            yield frames.frame(key.push_id, r.tensor, 0, start, payload, frames.DELTA)
        digest = checksum((digests or new)[r.tensor])
        size = len(new[r.tensor])
        yield frames.end(key.push_id, r.tensor, 0, size, digest)


NEXT = Key("run", 1, 6)


def test_a_push_of_differences_becomes_the_new_weights():
    receiver, _ = make()
    old = values()
    go_live(receiver, data=old)
    for version in range(6, 9):
        key, base = Key("run", 1, version), Key("run", 1, version - 1)
        new = change(old, version)
        missing = receiver.begin(key, SPECS, WHOLE, 10, base)
        assert receiver.takes_delta
        every = list(delta_frames(key, old, new, missing))
        for frame in every[:3]:
            receiver.frame(frame)
        left = receiver.begin(key, SPECS, WHOLE, 10, base)  # an interrupted one goes on
        assert sum(r.length for r in left) == 106 - 96
        for frame in [*delta_frames(key, old, new, left), *every]:  # and a repeated frame changes nothing
            receiver.frame(frame)
        assert receiver.held == receiver.live == base
        receiver.prepare(key)
        receiver.prepare(key)
        assert [t.tobytes() for t in receiver.start_apply(key).values()] == new
        receiver.finish_apply()
        assert (receiver.live, receiver.held) == (key, key)
        old = new


@pytest.mark.parametrize(
    ("base", "slices"),
    [
        (Key("run", 1, 4), WHOLE),
        (Key("run", 2, 5), WHOLE),
        (Key("other", 1, 5), WHOLE),
        (KEY, [[Slice((0, 0), (2, 6)), Slice((2, 0), (2, 6))], [], []]),
    ],
)
def test_from_another_base_or_cut_everything_is_taken(base, slices):
    receiver, _ = make()
    old = values()
    go_live(receiver, data=old)
    missing = receiver.begin(NEXT, SPECS, slices, 10, base)
    assert not receiver.takes_delta
    assert sum(r.length for r in missing) == 106
    assert receiver.held is None
    with pytest.raises(BadManifest, match="takes everything"):
        receiver.frame(next(delta_frames(NEXT, old, change(old), [Range(1, 0, 0, 6)])))


def test_an_aborted_push_of_differences_leaves_the_base():
    receiver, clock = make()
    old = values()
    go_live(receiver, data=old)
    new = change(old)
    for end in ("abort", "lease"):
        for frame in delta_frames(NEXT, old, new, receiver.begin(NEXT, SPECS, WHOLE, 10, KEY)):
            receiver.frame(frame)
        clock.now += 11 if end == "lease" else 0
        receiver.abort(NEXT)
        assert (receiver.state, receiver.live, receiver.held) == (State.LIVE, KEY, KEY)
    for frame in delta_frames(NEXT, old, new, receiver.begin(NEXT, SPECS, WHOLE, 10, KEY)):
        receiver.frame(frame)
    receiver.prepare(NEXT)
    receiver.abort(NEXT)  # now the memory holds what nobody has committed
    assert (receiver.live, receiver.held) == (KEY, None)
    receiver.begin(NEXT, SPECS, WHOLE, 10, KEY)
    assert not receiver.takes_delta


def test_differences_that_give_something_else_are_found_and_everything_is_sent():
    receiver, _ = make()
    old = values()
    go_live(receiver, data=old)
    new = change(old)
    for frame in delta_frames(NEXT, old, new, receiver.begin(NEXT, SPECS, WHOLE, 10, KEY), digests=change(new)):
        receiver.frame(frame)
    with pytest.raises(Corrupt, match=r"'a'.*everything must be sent"):
        receiver.prepare(NEXT)
    assert (receiver.state, receiver.live) == (State.LIVE, KEY)  # it generates with what it had
    missing = receiver.begin(NEXT, SPECS, WHOLE, 10, KEY)
    assert not receiver.takes_delta
    for frame in frames_for(NEXT, new, missing):
        receiver.frame(frame)
    receiver.prepare(NEXT)
    assert [t.tobytes() for t in receiver.start_apply(NEXT).values()] == new


def test_after_a_failed_apply_everything_is_sent():
    receiver, _ = make()
    go_live(receiver)
    stage(receiver, NEXT, change(values()))
    receiver.prepare(NEXT)
    receiver.start_apply(NEXT)
    receiver.finish_apply("out of memory")
    receiver.begin(NEXT, SPECS, WHOLE, 10, KEY)
    assert not receiver.takes_delta


def test_frames_that_do_not_belong_in_a_push_of_differences_are_refused():
    receiver, _ = make()
    old = values()
    go_live(receiver, data=old)
    receiver.begin(NEXT, SPECS, WHOLE, 10, KEY)
    with pytest.raises(BadManifest, match="takes differences"):
        receiver.frame(frames.frame(NEXT.push_id, 0, 0, 0, memoryview(b"x")))
    with pytest.raises(Corrupt, match="not a difference"):
        receiver.frame(frames.frame(NEXT.push_id, 0, 0, 0, memoryview(bytes(40)), frames.DELTA))
    stretch = np.frombuffer(old[0], np.uint8)

    def send(start, end):
        payload = memoryview(delta.encode(stretch[start:end], stretch[start:end] + 1, 4)[0])
        return receiver.frame(frames.frame(NEXT.push_id, 0, 0, start, payload, frames.DELTA))

    assert send(0, 32)
    with pytest.raises(BadManifest, match="overlaps another difference of tensor 'a'"):
        send(16, 48)
    assert not send(0, 32)
