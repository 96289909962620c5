"""The decoder against itself (packed, scanned, rematerialised) and its parts against slow, obvious versions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from sqlrl_jax.model.attention import row_attention
from sqlrl_jax.model.config import Llama3Scaling, ModelConfig
from sqlrl_jax.model.decoder import (
    Compute,
    Decoder,
    apply_rope,
    finish_block,
    forward,
    project_qkv,
    rope_frequencies,
    rope_table,
    unembedding,
)
from sqlrl_jax.model.layout import Layout, join_parts, unstack_layers
from sqlrl_jax.model.params import flatten, nest, param_specs, parameter_count

QWEN2 = ModelConfig("qwen2", 61, 32, 48, 2, 4, 2, 8, attention_bias=True, tie_word_embeddings=True)
QWEN3 = ModelConfig("qwen3", 61, 32, 48, 2, 4, 2, 16, qk_norm=True)
LLAMA = ModelConfig("llama", 61, 32, 48, 3, 4, 1, 8, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 16))
FAMILIES = pytest.mark.parametrize("config", [QWEN2, QWEN3, LLAMA], ids=lambda c: c.model_type)


@functools.cache
def params_of(config: ModelConfig) -> dict:
    """Random parameters with nothing left at zero or one, so that a forgotten bias or norm shows."""
    rng = np.random.default_rng(0)
    specs = param_specs(config).items()
    return nest({p: (rng.normal(size=s.shape) * 0.2 + (s.stddev is None)).astype(np.float32) for p, s in specs})


def run(config: ModelConfig, params: dict, tokens: np.ndarray, ends: np.ndarray, **how: object) -> np.ndarray:
    """Hidden states of rows of sequences: `ends` is of every token where its own ends, which nothing else begins with."""
    positions = np.zeros_like(tokens)
    for row, reach in enumerate(ends):
        for end in set(reach.tolist()):
            positions[row, reach == end] = np.arange((reach == end).sum())
    return np.asarray(jax.jit(lambda p: forward(config, p, tokens, positions, ends, Compute(**how)))(params))


def whole(tokens: np.ndarray) -> np.ndarray:
    """The ends of rows of one sequence each."""
    return np.full_like(tokens, tokens.shape[1])


@FAMILIES
def test_packed_rows_equal_separate_sequences(config: ModelConfig) -> None:
    params, rng = params_of(config), np.random.default_rng(0)
    lengths = (5, 9, 3)
    sequences = [rng.integers(0, 61, n) for n in lengths]
    tokens = np.concatenate([*sequences, np.zeros(4, int)])[None]
    ends = np.repeat(np.cumsum([*lengths, 4]), [*lengths, 4])[None]
    packed = run(config, params, tokens, ends)[0]
    assert np.isfinite(packed).all()
    rows = np.stack([np.pad(s, (0, 9 - len(s))) for s in sequences])
    alone = run(config, params, rows, whole(rows))
    for end, row, length in zip(np.cumsum(lengths), alone, lengths, strict=True):
        np.testing.assert_allclose(packed[end - length : end], row[:length], atol=2e-5)


def test_a_token_sees_the_past_only() -> None:
    config, params, tokens = LLAMA, params_of(LLAMA), np.arange(12)[None] % 61
    changed = tokens.copy()
    changed[0, 7] = 50
    before, after = (run(config, params, t, whole(t))[0] for t in (tokens, changed))
    np.testing.assert_array_equal(before[:7], after[:7])
    assert (np.abs(before[7:] - after[7:]).max(axis=-1) > 1e-4).all()


def test_scan_unrolled_and_remat_give_one_result() -> None:
    config, params = QWEN2, params_of(QWEN2)
    tokens = np.random.default_rng(1).integers(0, 61, (2, 10))
    reach = np.array([[6] * 6 + [10] * 4, [8] * 8 + [10] * 2])
    weight = np.random.default_rng(2).normal(size=(2, 10, 32)).astype(np.float32)

    def gradients(layout: Layout | None = None, **how: object) -> dict:
        def loss(p: dict) -> jax.Array:
            p = layout.lay(p) if layout else p
            return (forward(config, p, tokens, tokens * 0 + np.arange(10), reach, Compute(**how)) * weight).sum()

        value, grads = jax.jit(jax.value_and_grad(loss))(params)
        return {"loss": value, **flatten(grads)}

    expected = gradients()
    apart, joined = Layout(config.num_hidden_layers), Layout(config.num_hidden_layers, ("qkv", "gate_up"))
    for how in ({"layout": apart}, {"layout": joined}, {"remat": "full"}, {"layout": apart, "remat": "full"}):
        for name, value in gradients(**how).items():
            np.testing.assert_allclose(value, expected[name], rtol=2e-4, atol=2e-4, err_msg=f"{name} with {how}")


def test_bfloat16_is_near_float32() -> None:
    params, tokens = params_of(QWEN2), np.arange(16)[None]
    full, half = (run(QWEN2, params, tokens, whole(tokens), dtype=d) for d in ("float32", "bfloat16"))
    assert half.dtype == jnp.bfloat16
    assert 0 < np.abs(full - half.astype(np.float32)).max() < 0.3


@given(
    length=st.sampled_from([1, 7, 64, 65, 150]),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=8, deadline=None)
def test_attention_equals_a_loop(length: int, heads: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    count, kv = heads
    q = rng.normal(size=(2, length, count, 4)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, length, kv, 4)).astype(np.float32)
    reach = np.arange(length) + rng.integers(1, 1 + length, (2, length))  # any at all, beyond the token itself
    got = np.asarray(jax.jit(row_attention)(jnp.array(q), jnp.array(k), jnp.array(v), jnp.array(reach)))
    for b in range(2):
        for i in rng.choice(length, min(length, 20), replace=False):
            seen = [j for j in range(i + 1) if i < reach[b, j]]
            for h in range(count):
                scores = k[b, seen, h // (count // kv)] @ q[b, i, h] / 2.0
                weights = np.exp(scores - scores.max())
                expected = weights / weights.sum() @ v[b, seen, h // (count // kv)]
                np.testing.assert_allclose(got[b, i, h], expected, atol=1e-5)


def test_rope_rotates_pairs_half_a_head_apart() -> None:
    x = np.random.default_rng(3).normal(size=(1, 3, 2, 8)).astype(np.float32)
    positions = np.array([[0, 1, 700]])
    turned = np.asarray(apply_rope(jnp.array(x), rope_table(QWEN2, jnp.array(positions))))
    angles = positions[..., None, None] * 10_000.0 ** (-np.arange(0, 8, 2) / 8)
    expected = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)
    np.testing.assert_allclose(turned, np.concatenate([expected.real, expected.imag], -1), atol=5e-4)


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones() -> None:
    plain = rope_frequencies(dataclasses.replace(LLAMA, rope_scaling=None, head_dim=64))
    scaled = rope_frequencies(dataclasses.replace(LLAMA, head_dim=64))
    waves = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[waves < 4], plain[waves < 4])
    np.testing.assert_allclose(scaled[waves > 16], plain[waves > 16] / 8, rtol=1e-6)
    between = (waves > 4) & (waves < 16)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_the_module_owns_the_declared_parameters() -> None:
    config = QWEN3
    decoder = nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()
    specs = param_specs(config)
    assert {p: v.shape for p, v in flatten(decoder.params()).items()} == {p: s.shape for p, s in specs.items()}
    assert sum(v.size for v in jax.tree.leaves(decoder.params())) == parameter_count(config)
    state = nnx.state(decoder, nnx.Param)
    assert state["layers"]["k"].axes == ("layers", "embed", "kv_heads")
    tokens = jnp.arange(6)[None]
    hidden = nnx.jit(lambda m: m(tokens, tokens, tokens * 0 + 1))(decoder)
    np.testing.assert_allclose(
        hidden, run(config, decoder.params(), np.asarray(tokens), np.ones((1, 6), int)), atol=1e-5
    )
    assert decoder.unembed().shape == (32, 61)


def test_tied_head_is_the_embedding() -> None:
    tied, free = params_of(QWEN2), params_of(QWEN3)
    np.testing.assert_array_equal(unembedding(tied), tied["embedding"].T)
    assert unembedding(free) is free["lm_head"]


@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=lambda c: c.model_type)
def test_joined_matrices_give_the_same_block(config: ModelConfig) -> None:
    layer = jax.tree.map(lambda p: p[1], params_of(config)["layers"])
    x = jax.random.normal(jax.random.key(5), (1, 4, 32))
    rope = rope_table(config, jnp.arange(4)[None])
    attended = jax.random.normal(jax.random.key(6), (1, 4, config.num_attention_heads, config.head_dim))

    @jax.jit
    def run_block(layer: dict) -> tuple[jax.Array, ...]:
        return *project_qkv(config, layer, x, rope), finish_block(config, layer, x, attended)

    for apart, joined in zip(run_block(layer), run_block(join_parts(layer)), strict=True):
        np.testing.assert_allclose(apart, joined, atol=1e-5)


def test_unstacked_layers_are_the_slices() -> None:
    layers = params_of(LLAMA)["layers"]
    parts = unstack_layers(layers, 3)
    for name, stacked in layers.items():
        np.testing.assert_array_equal(np.stack([p[name] for p in parts]), stacked)
