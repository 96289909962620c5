"""The state machine of one service's weights: whole pushes only, fenced, resumable, quarantined after a failed apply."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout import frames
from rollout.manifest import BadManifest, Refused, Slice, check_slices
from rollout.receiver import Corrupt, Key, NotOpen, Range, StaleLearner, State
from rollout.staging import NoMemory
from rollout.types import TensorSpec
from tests.slices import checksum, slice_frames
from tests.unit.receiver_cases import KEY, SPECS, WHOLE, frames_for, go_live, make, stage, values


def test_a_whole_push_goes_live():
    receiver, _ = make()
    assert receiver.state is State.EMPTY
    assert receiver.begin(KEY, SPECS, WHOLE, 10) == [Range(0, 0, 0, 96), Range(1, 0, 0, 6), Range(2, 0, 0, 4)]
    assert receiver.state is State.STAGING
    data = stage(receiver)
    assert receiver.missing() == []
    assert receiver.received_bytes == receiver.total_bytes == 106
    receiver.prepare(KEY)
    assert receiver.state is State.COMPLETE
    tensors = receiver.start_apply(KEY)
    assert receiver.state is State.APPLYING
    assert [t.tobytes() for t in tensors.values()] == data
    assert [(n, t.shape, t.dtype.name) for n, t in tensors.items()] == [(s.name, s.shape, s.dtype) for s in SPECS]
    receiver.finish_apply()
    assert (receiver.state, receiver.live) == (State.LIVE, KEY)


def test_old_weights_stay_live_while_staging():
    receiver, _ = make(live=Key("", 0, 0))
    stage(receiver)
    assert receiver.require_live("", 0, 0) == Key("", 0, 0)
    receiver.prepare(KEY)
    receiver.start_apply(KEY)
    with pytest.raises(Refused, match="APPLYING"):
        receiver.require_live("", 0, 0)


def test_require_live_names_what_is_live():
    receiver, _ = make()
    with pytest.raises(Refused, match=r"version 5 is not live.*EMPTY"):
        receiver.require_live("run", 1, 5)
    go_live(receiver)
    assert receiver.require_live("run", 1, 5) == receiver.require_live("", 0, 5) == KEY
    for run, epoch, version in (("run", 1, 6), ("run", 2, 5), ("other", 1, 5), ("", 0, 4)):
        with pytest.raises(Refused, match="generates with version 5 of run 'run', start 1"):
            receiver.require_live(run, epoch, version)


def test_or_later_takes_later_weights_of_the_same_learner_alone():
    receiver, _ = make()
    go_live(receiver)
    for version in (KEY.version, KEY.version - 1):
        assert receiver.require_live(KEY.run, KEY.epoch, version, or_later=True) == KEY
    for run, epoch, version in ((KEY.run, KEY.epoch, KEY.version + 1), (KEY.run, KEY.epoch - 1, 0), ("other", 1, 0)):
        with pytest.raises(Refused, match="not live"):
            receiver.require_live(run, epoch, version, or_later=True)


def test_repeated_calls_change_nothing():
    receiver, _ = make()
    data = stage(receiver)
    again = [receiver.frame(f) for f in frames_for(KEY, data, [Range(0, 0, 0, 96), Range(1, 0, 2, 3)])]
    assert again == [False] * 4
    assert receiver.begin(KEY, SPECS, WHOLE, 10) == []
    receiver.prepare(KEY)
    receiver.prepare(KEY)
    assert receiver.begin(KEY, SPECS, WHOLE, 10) == []
    assert receiver.state is State.COMPLETE
    receiver.start_apply(KEY)
    receiver.finish_apply()
    assert receiver.begin(KEY, SPECS, WHOLE, 10) == []
    receiver.prepare(KEY)
    assert receiver.start_apply(KEY) is None
    receiver.abort(KEY)
    assert (receiver.state, receiver.live) == (State.LIVE, KEY)


def test_an_interrupted_push_goes_on_with_what_is_missing():
    receiver, _ = make()
    data = values()
    receiver.begin(KEY, SPECS, WHOLE, 10)
    for start, end in ((0, 40), (60, 70)):
        receiver.frame(frames.frame(KEY.push_id, 0, 0, start, memoryview(data[0])[start:end]))
    missing = receiver.begin(KEY, SPECS, WHOLE, 10)
    assert missing == [Range(0, 0, 40, 20), Range(0, 0, 70, 26), Range(1, 0, 0, 6), Range(2, 0, 0, 4)]
    with pytest.raises(Refused, match=r"56 bytes in 4 ranges are missing, the first in tensor 'a' at offset 40"):
        receiver.prepare(KEY)
    for frame in frames_for(KEY, data, missing):
        receiver.frame(frame)
    receiver.prepare(KEY)
    assert [t.tobytes() for t in receiver.start_apply(KEY).values()] == data


def test_a_slice_without_its_checksum_is_missing():
    receiver, _ = make()
    data = values()
    receiver.begin(KEY, SPECS, WHOLE, 10)
    every = list(frames_for(KEY, data, [Range(0, 0, 0, 96), Range(1, 0, 0, 6), Range(2, 0, 0, 4)]))
    for frame in every[:-1]:
        receiver.frame(frame)
    missing = receiver.missing()
    assert missing == [Range(2, 0, 4, 0)]
    with pytest.raises(Refused, match="'c'"):
        receiver.prepare(KEY)
    for frame in frames_for(KEY, data, missing):
        receiver.frame(frame)
    receiver.prepare(KEY)


def test_wrong_slice_checksum_is_named_and_sent_again():
    receiver, _ = make()
    data = values()
    wrong = [data[0], bytes(6), data[2]]
    stage(receiver, data=wrong)
    receiver.frame(frames.end(KEY.push_id, 1, 0, 6, checksum(data[1])))
    with pytest.raises(Corrupt, match="'b' do not have the sender's checksum"):
        receiver.prepare(KEY)
    assert receiver.missing() == [Range(1, 0, 0, 6)]
    stage(receiver, data=data)
    receiver.prepare(KEY)


@given(st.lists(st.tuples(st.integers(0, 95), st.integers(1, 40), st.booleans()), max_size=12))
def test_the_checksum_is_of_what_lies_there_whatever_came_in_pieces(pieces):
    """Chunks that came whole are not hashed again; others, and those that were written over, are."""
    right, wrong = values()[0], values(1)[0]
    spec, memory, known = SPECS[0], bytearray(96), set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "CHUNK", 16)
        receiver, _ = make([spec])
        receiver.begin(KEY, [spec], [[]], 10)
        for start, length, is_right in [*pieces, (0, 96, True)]:
            spots = range(start, min(start + length, 96))
            if length == 96:  # what is missing
                for gap in receiver.missing():
                    payload = memoryview(right)[gap.offset : gap.offset + gap.length]
                    if gap.length:
                        receiver.frame(frames.frame(KEY.push_id, 0, 0, gap.offset, payload))
                    memory[gap.offset : gap.offset + gap.length] = payload
                continue
            source = right if is_right else wrong
            receiver.frame(frames.frame(KEY.push_id, 0, 0, start, memoryview(source)[start : spots.stop]))
            if not known.issuperset(spots):
                memory[start : spots.stop] = source[start : spots.stop]
                known.update(spots)
        receiver.frame(frames.end(KEY.push_id, 0, 0, 96, checksum(right)))
        if memory == right:
            receiver.prepare(KEY)
            assert receiver.start_apply(KEY)["a"].tobytes() == right
        else:
            with pytest.raises(Corrupt, match="'a' do not have the sender's checksum"):
                receiver.prepare(KEY)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (SPECS[:2], "'c' is missing"),
        ([*SPECS, TensorSpec("d", (1,), "float32")], "'d' is not one of the engine's"),
        ([replace(SPECS[0], shape=(6, 4)), *SPECS[1:]], r"'a' is float32\[6, 4\], the engine's is float32\[4, 6\]"),
        (
            [SPECS[0], replace(SPECS[1], dtype="float16"), SPECS[2]],
            r"'b' is float16\[3\], the engine's is bfloat16\[3\]",
        ),
        ([*SPECS, SPECS[0]], "'a' appears twice"),
    ],
)
def test_another_manifest_is_refused_by_name(manifest, message):
    receiver, _ = make()
    with pytest.raises(BadManifest, match=message):
        receiver.begin(KEY, manifest, [[] for _ in manifest], 10)
    assert receiver.state is State.EMPTY


def test_manifest_in_another_order_is_the_same():
    receiver, _ = make()
    data = values()
    missing = receiver.begin(KEY, SPECS[::-1], WHOLE, 10)
    for frame in frames_for(KEY, data[::-1], missing):
        receiver.frame(frame)
    receiver.prepare(KEY)
    assert {n: t.tobytes() for n, t in receiver.start_apply(KEY).items()} == dict(zip("abc", data, strict=True))


@pytest.mark.parametrize("stale", [Key("run", 1, 4), Key("run", 0, 9)])
def test_stale_learners_are_refused(stale):
    receiver, _ = make()
    stage(receiver)
    with pytest.raises(StaleLearner, match=r"is stale: version 5 of run 'run', start 1 is already staging"):
        receiver.begin(stale, SPECS, WHOLE, 10)
    go_live(receiver)
    with pytest.raises(StaleLearner, match="already live"):
        receiver.begin(stale, SPECS, WHOLE, 10)


@pytest.mark.parametrize("later", [Key("run", 1, 6), Key("run", 2, 0)])
def test_a_later_push_replaces_a_staged_one(later):
    receiver, _ = make()
    data = stage(receiver)
    assert sum(r.length for r in receiver.begin(later, SPECS, WHOLE, 10)) == 106
    with pytest.raises(NotOpen, match="call Begin again"):
        receiver.frame(next(frames_for(KEY, data, [Range(0, 0, 0, 96)])))
    with pytest.raises(NotOpen, match="is not the open push"):
        receiver.prepare(KEY)
    go_live(receiver, later)


def test_another_run_waits_for_the_lease_but_not_for_live_weights():
    receiver, clock = make()
    stage(receiver)
    other = Key("other", 1, 0)
    with pytest.raises(StaleLearner, match="wait until its lease ends"):
        receiver.begin(other, SPECS, WHOLE, 10)
    clock.now = 10.5
    go_live(receiver, other)
    go_live(receiver, KEY)


def test_a_lease_that_ends_drops_the_staged_bytes():
    receiver, clock = make(live=Key("", 0, 0))
    data = values()
    receiver.begin(KEY, SPECS, WHOLE, 10)
    every = list(frames_for(KEY, data, [Range(0, 0, 0, 96), Range(1, 0, 0, 6), Range(2, 0, 0, 4)]))
    for frame in every[:-1]:
        clock.now += 9  # each frame renews it
        receiver.frame(frame)
    assert receiver.state is State.STAGING
    clock.now += 10.5
    with pytest.raises(NotOpen):
        receiver.frame(every[-1])
    assert (receiver.state, receiver.live) == (State.LIVE, Key("", 0, 0))
    assert sum(r.length for r in receiver.begin(KEY, SPECS, WHOLE, 10)) == 106


def test_a_failed_apply_quarantines_until_a_whole_push():
    receiver, _ = make(live=Key("", 0, 0))
    data = stage(receiver)
    receiver.prepare(KEY)
    receiver.start_apply(KEY)
    with pytest.raises(Refused, match="being applied"):
        receiver.abort(KEY)
    receiver.finish_apply("out of memory")
    assert (receiver.state, receiver.live) == (State.QUARANTINED, None)
    with pytest.raises(Refused, match="out of memory"):
        receiver.require_live("", 0, 0)
    stage(receiver, data=data)
    with pytest.raises(Refused, match="out of memory"):
        receiver.require_live("", 0, 0)
    receiver.abort(KEY)
    assert receiver.state is State.QUARANTINED
    go_live(receiver, data=data)
    assert receiver.quarantine == ""


def test_steps_out_of_order_are_refused():
    receiver, _ = make()
    with pytest.raises(NotOpen):
        receiver.prepare(KEY)
    with pytest.raises(NotOpen):
        receiver.start_apply(KEY)
    with pytest.raises(Refused, match="nothing is being applied"):
        receiver.finish_apply()
    stage(receiver)
    with pytest.raises(Refused, match="PREPARE comes first"):
        receiver.start_apply(KEY)
    receiver.abort(KEY)
    assert receiver.state is State.EMPTY


def test_frames_outside_the_manifest_are_refused():
    receiver, _ = make()
    receiver.begin(KEY, SPECS, WHOLE, 10)

    def send(tensor, part, offset, payload):
        receiver.frame(frames.frame(KEY.push_id, tensor, part, offset, memoryview(payload)))

    for tensor, part in ((3, 0), (0, 1)):
        with pytest.raises(BadManifest, match="no such slice"):
            send(tensor, part, 0, b"x")
    with pytest.raises(BadManifest, match="tensor 'b' has 6 bytes in this slice, the frame ends at 7"):
        send(1, 0, 4, b"xyz")
    with pytest.raises(BadManifest, match="'b'"):
        receiver.frame(frames.end(KEY.push_id, 1, 0, 5, 0))
    with pytest.raises(BadManifest, match="ends at 18446744073709551616"):
        send(1, 0, 2**64 - 1, b"x")
    assert receiver.received_bytes == 0


@st.composite
def cuts(draw):
    """A shape and a grid of slices over it, shuffled."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    axes = []
    for length in shape:
        inner = sorted(draw(st.sets(st.integers(1, length - 1), max_size=2))) if length > 1 else []
        edges = [0, *inner, length]
        axes.append([(a, b - a) for a, b in itertools.pairwise(edges)])
    cells = [Slice(tuple(a for a, _ in c), tuple(n for _, n in c)) for c in itertools.product(*axes)]
    return shape, draw(st.permutations(cells))


@given(cuts(), st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_slices_are_put_together_whatever_the_order(cut, random):
    shape, slices = cut
    spec = TensorSpec("w", shape, "float32")
    array = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    receiver, _ = make([spec])
    receiver.begin(KEY, [spec], [slices], 10)
    sent = []
    for number, piece in enumerate(slices):
        where = tuple(slice(a, a + n) for a, n in zip(piece.start, piece.size, strict=True))
        data = array[where].tobytes()
        sent += slice_frames(KEY.push_id, 0, number, memoryview(data), [(0, len(data))])
    random.shuffle(sent)
    for frame in sent:
        receiver.frame(frame)
    receiver.prepare(KEY)
    assert np.array_equal(receiver.start_apply(KEY)["w"], array)


@pytest.mark.parametrize(
    "slices",
    [
        [Slice((0, 0), (2, 6))],  # too small
        [Slice((0, 0), (4, 6)), Slice((0, 0), (4, 6))],  # twice
        [Slice((0, 0), (2, 6)), Slice((1, 0), (3, 6))],  # overlap
        [Slice((0, 0), (2, 3)), Slice((2, 3), (2, 3))],  # corners missing
        [Slice((0, 0), (2, 3)), Slice((0, 3), (2, 3)), Slice((2, 0), (2, 3)), Slice((2, 0), (2, 3))],  # one twice
        [Slice((0,), (4,))],  # another rank
        [Slice((0, 0), (5, 6))],  # too large
    ],
)
def test_slices_that_do_not_cover_a_tensor_are_refused(slices):
    with pytest.raises(BadManifest, match=r"tensor 'a'.*\[4, 6\] exactly once"):
        check_slices(SPECS[0], slices)


def test_memory_that_is_not_there_is_refused_in_a_sentence(monkeypatch):
    receiver, _ = make(live=Key("", 0, 0))
    monkeypatch.setattr("rollout.staging._free_memory", lambda: 100)
    with pytest.raises(NoMemory, match=r"takes 0.0 GB of the service's host memory.*0.0 GB are free"):
        receiver.begin(KEY, SPECS, WHOLE, 10)
    assert (receiver.state, receiver.live) == (State.LIVE, Key("", 0, 0))
