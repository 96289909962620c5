"""The kernels of accelerators against the plain blocks, and which device reads which key/value head."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqlrl_jax.model.attention import row_attention
from sqlrl_jax.model.kernels import cudnn_attention, kernel_for, splash_attention
from sqlrl_jax.model.reach_attention import meeting_blocks, reach_attention
from sqlrl_jax.model.sharded_attention import kv_table

BRANCHING = np.repeat([200, 110, 60, 110, 200], [20, 30, 10, 50, 90])


@pytest.mark.parametrize(
    ("kernel", "second"),
    [
        (partial(splash_attention, interpret=True), np.repeat([200], [200])),
        (partial(cudnn_attention, implementation="xla"), BRANCHING),
        (partial(reach_attention, interpret=True), BRANCHING),
    ],
    ids=["splash", "cudnn, a row that branches", "Pallas, a row that branches"],
)
def test_kernels_equal_the_plain_blocks(kernel: object, second: np.ndarray) -> None:
    """Values and gradients, with grouped heads, padding, and a length (200) that is no multiple of a block."""
    rng = np.random.default_rng(0)
    q, to = rng.normal(size=(2, 2, 200, 4, 64)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 200, 2, 64)).astype(np.float32)
    reach = jnp.array(np.stack([np.repeat([60, 180, 200], [60, 120, 20]), second]))

    def outputs(attention: object) -> list[np.ndarray]:
        def total(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = attention(*qkv, reach)  # type: ignore[operator]
            return (out * to).sum(), out

        gradients, out = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v)
        return [np.asarray(x) for x in (out, *gradients)]

    for got, want in zip(outputs(kernel), outputs(row_attention), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_blocks_that_do_not_meet_are_not_visited() -> None:
    """Of a causal row of 4 blocks 10 pairs meet; fewer where a sequence ends with a block, and where another branch lies
    between."""
    ends = [[512] * 512, [256] * 256 + [512] * 256, [512] * 100 + [256] * 156 + [384] * 128 + [512] * 128]
    for steps, by_key in zip(meeting_blocks(jnp.array(ends), 128), (False, True), strict=True):
        pairs = np.stack([steps.own, steps.other], 1).reshape(3, 16, 2)
        pairs = pairs[..., ::-1] if by_key else pairs
        assert steps.counts.tolist() == [10, 6, 7]
        assert int(steps.longest) == 10
        want = [(0, 0), (1, 0), (1, 1), (2, 0), (2, 2), (3, 0), (3, 3)]
        assert sorted(tuple(pair) for pair in pairs[2, :7].tolist()) == want
        assert (pairs[2, 7:] == pairs[2, 6]).all()  # nothing more is fetched


def test_many_blocks_of_many_sequences() -> None:
    """Rows of seven blocks with as many visits each as they need, in one batch."""
    rng = np.random.default_rng(1)
    q, to = rng.normal(size=(2, 2, 896, 2, 64)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 896, 1, 64)).astype(np.float32)
    reach = jnp.array(
        np.stack([np.repeat([896, 300, 700, 896], [90, 210, 400, 196]), np.repeat([40, 500, 896], [40, 460, 396])])
    )

    def outputs(attention: object) -> list[np.ndarray]:
        total = jax.jit(jax.grad(lambda *qkv: (attention(*qkv, reach) * to).sum(), (0, 1, 2)))  # type: ignore[operator]
        return [np.asarray(x) for x in total(q, k, v)]

    for got, want in zip(outputs(partial(reach_attention, interpret=True)), outputs(row_attention), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_the_platform_chooses_the_kernel() -> None:
    assert kernel_for("tpu", jnp.dtype("bfloat16"), 128, False) is splash_attention
    assert kernel_for("tpu", jnp.dtype("bfloat16"), 64, False) is splash_attention
    assert kernel_for("tpu", jnp.dtype("bfloat16"), 64, True) is reach_attention
    named = {
        kernel_for(platform, jnp.dtype(dtype), size, True).args[0].__name__  # type: ignore[attr-defined]
        for platform, dtype, size in [("gpu", "bfloat16", 128)]
    }
    assert named == {"cudnn_attention"}
    for platform, dtype, size in [("cpu", "float32", 64), ("gpu", "float32", 64), ("tpu", "bfloat16", 80)]:
        assert kernel_for(platform, jnp.dtype(dtype), size, True).args[0] is row_attention  # type: ignore[attr-defined]


@given(st.sampled_from([1, 2, 4, 7, 8]), st.sampled_from([1, 2, 3, 7]), st.sampled_from([1, 2, 4]), st.integers(1, 8))
def test_every_query_head_meets_its_own_key_head(kv_heads: int, groups: int, tensor: int, shards: int) -> None:
    heads = kv_heads * groups
    if heads % tensor:
        tensor = 1
    split = kv_heads % tensor == 0
    local = kv_heads // tensor if split else kv_heads
    table, exchanged = kv_table(heads, kv_heads, tensor, shards, local)
    own = heads // tensor
    each = -(-own // shards)
    for t in range(tensor):
        for s in range(shards):
            picked = table[t, s] + (t * local if split else 0)
            assert each % len(picked) == 0
            read = np.repeat(picked, each // len(picked))
            for i in range(each):
                head = s * each + i
                if head < own:  # the rest is padding
                    assert read[i] == (t * own + head) // groups
            if exchanged:  # what an all-to-all of the key/value heads leaves here
                np.testing.assert_array_equal(table[t, s], np.split(np.arange(local), shards)[s])
