"""Differences of weights: lossless whatever the bytes, small where little changed, refused where they are damaged."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout import delta
from rollout.delta import DeltaError


@st.composite
def stretches(draw):
    """Old and new bytes of values of some width, with anything from no to all values changed."""
    width = draw(st.sampled_from([1, 2, 4, 8]))
    count = draw(st.integers(1, 3000))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    old = rng.integers(0, 256, count * width, np.uint8)
    new = old.copy()
    changed = rng.random(count) < draw(st.sampled_from([0.0, 0.0005, 0.01, 0.2, 0.3, 1.0]))
    new.reshape(count, width)[changed] ^= rng.integers(
        0, 1 << draw(st.integers(1, 8)), (changed.sum(), width), np.uint8
    )
    return old, new, width


@given(stretches())
def test_new_from_old_and_old_from_new(case):
    old, new, width = case
    payload, changed = delta.encode(old, new, width)
    assert changed == int((old != new).reshape(-1, width).any(axis=1).sum())
    assert len(payload) <= delta.HEADER_BYTES + len(new)
    assert delta.covered(payload) == len(new)
    found = old.copy()
    delta.apply(found, memoryview(payload))
    assert np.array_equal(found, new)
    delta.apply(found, payload)
    assert np.array_equal(found, old)


@pytest.mark.parametrize(("dtype", "least"), [("bfloat16", 30), ("float32", 1.8)])
def test_a_step_at_a_small_learning_rate_is_small(dtype, least):
    rng = np.random.default_rng(0)
    old = (rng.standard_normal(1 << 18) * 0.02).astype(np.float32)
    new = old - np.float32(1e-6) * np.clip(rng.standard_normal(old.shape), -1, 1).astype(np.float32)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    a, b = (x.astype(kind).view(np.uint8) for x in (old, new))
    assert a.nbytes / len(delta.encode(a, b, np.dtype(kind).itemsize)[0]) > least


@given(stretches(), st.data())
def test_damage_is_refused_and_changes_nothing_or_stays_inside(case, data):
    """A frame's checksum finds it first; this is the second line."""
    old, new, width = case
    payload = bytearray(delta.encode(old, new, width)[0])
    payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    around = np.concatenate([old[:0], np.full(64, 7, np.uint8), old, np.full(64, 7, np.uint8)])
    target = around[64:-64]
    try:
        delta.apply(target, bytes(payload))
    except DeltaError:
        assert np.array_equal(target, old)
    assert (around[:64] == 7).all()
    assert (around[-64:] == 7).all()


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(payload):
    target = np.zeros(96, np.uint8)
    with pytest.raises(DeltaError):
        delta.apply(target, payload)
    assert not target.any()


def test_a_claim_of_more_than_there_is_is_not_unfolded():
    old, new = np.zeros(1 << 16, np.uint8), np.zeros(1 << 16, np.uint8)
    new[:: 1 << 10] = 1
    payload = bytearray(delta.encode(old, new, 2)[0])
    import zstandard

    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    with pytest.raises(DeltaError, match="another size"):
        delta.apply(old, bytes(payload[: delta.HEADER_BYTES]) + bomb)
    for length in (0, 5, delta.HEADER_BYTES - 1):
        with pytest.raises(DeltaError, match="shorter than its header"):
            delta.covered(bytes(payload[:length]))
