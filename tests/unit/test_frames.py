"""The raw frame codec and the set of byte ranges, against slow and obvious versions."""

import struct

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from rollout import frames
from rollout.frames import FrameError
from rollout.staging import Ranges
from tests.slices import checksum

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)


def build(push, tensor, part, offset, payload):
    return frames.frame(push, tensor, part, offset, memoryview(payload))


@given(u64, u32, u32, u64, st.binary(min_size=1, max_size=300))
def test_data_frame_round_trip(push, tensor, part, offset, payload):
    frame = build(push, tensor, part, offset, payload)
    assert frames.decode(frames.encode(frame)) == frame


@given(u64, u32, u32, u64, u64)
def test_end_frame_round_trip(push, tensor, part, size, digest):
    frame = frames.end(push, tensor, part, size, digest)
    assert frames.decode(frames.encode(frame)) == frame


@given(st.binary(min_size=1, max_size=64), st.data())
def test_any_flipped_bit_is_found(payload, data):
    good = bytearray(frames.encode(build(7, 1, 2, 3, payload)))
    bit = data.draw(st.integers(0, len(good) * 8 - 1))
    good[bit // 8] ^= 1 << bit % 8
    # Three padding bytes of the header carry nothing, but they are hashed too.
    with pytest.raises(FrameError):
        frames.decode(bytes(good))


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data):
    with pytest.raises(FrameError):
        frames.decode(data)


def test_corrupted_frame_is_named():
    good = frames.encode(build(0xABC, 5, 2, 4096, b"weights"))
    with pytest.raises(FrameError, match=r"push 0000000000000abc, tensor 5, slice 2, offset 4096: corrupted"):
        frames.decode(good[:-1] + b"!")
    with pytest.raises(FrameError, match="header says 7 bytes of payload, 6 came"):
        frames.decode(good[:-1])
    with pytest.raises(FrameError, match="not a frame of weights"):
        frames.decode(b"X" + good[1:])
    with pytest.raises(FrameError, match="shorter than its header"):
        frames.decode(good[:10])


def test_payload_bounds():
    whole = bytes(frames.MAX_PAYLOAD)
    assert frames.decode(frames.encode(build(1, 0, 0, 0, whole))).payload.nbytes == frames.MAX_PAYLOAD
    for payload in (b"", whole + b"x"):
        with pytest.raises(FrameError, match="1 to 1048576"):
            frames.encode(build(1, 0, 0, 0, payload))


@given(st.binary(max_size=40))
def test_a_slice_s_checksum_is_that_of_its_chunks_checksums(data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "CHUNK", 8)
        chunks = [xxhash.xxh3_64_intdigest(data[start : start + 8]) for start in range(0, len(data), 8)]
        assert checksum(data) == frames.join(chunks)
    assert frames.join(chunks) == xxhash.xxh3_64_intdigest(struct.pack(f"<{len(chunks)}Q", *chunks))


def test_a_header_says_what_comes():
    head = frames.read_head(build(1, 2, 3, 4, b"weights").head.pack())
    assert (head.push_id, head.tensor, head.slice, head.offset, head.length, head.kind) == (1, 2, 3, 4, 7, frames.DATA)
    assert frames.check(head, memoryview(b"weights")).payload == b"weights"
    with pytest.raises(FrameError, match="corrupted, xxh3"):
        frames.check(head, memoryview(b"weighty"))


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=20))
def test_ranges_are_a_set_of_positions(adds):
    ranges, positions = Ranges(), set()
    for start, length in adds:
        new = set(range(start, start + length))
        assert ranges.add(start, start + length) == bool(new - positions)
        positions |= new
    assert ranges.size == len(positions)
    missing = {i for offset, length in ranges.missing(60) for i in range(offset, offset + length)}
    assert missing == set(range(60)) - positions
    assert all(b < c for (_, b), (c, _) in zip(ranges.pairs, ranges.pairs[1:], strict=False))
