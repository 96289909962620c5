"""Cached decoding against whole forward passes, and sampling against a slow, obvious version."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import model_config, sharp_params

from sqlrl_jax import sampler, slots
from sqlrl_jax.model.decoder import forward, unembedding

CHUNK = 6


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def model(request):
    kind = request.param
    config = model_config(
        61,
        model_type=kind,
        attention_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
    )
    return config, sharp_params(config, 1)


def full_logprobs(model, ids: list[int], temperature: float) -> np.ndarray:
    """Log-probabilities of every next token after each prefix of `ids`: [len(ids), V]."""
    config, params = model
    padded = jnp.asarray([ids + [0] * (64 - len(ids))])
    positions = jnp.arange(64)[None]
    hidden = _forward(config, params, padded, positions, jnp.full_like(positions, 64))[0, : len(ids)]
    return np.asarray(jax.nn.log_softmax(hidden @ unembedding(params) / (temperature or 1.0)))


_forward = jax.jit(forward, static_argnums=0)


def make_sequences(config, count: int, temperature: float, top_p: float = 1.0) -> list[slots.Sequence]:
    rng = np.random.default_rng(3)
    return [
        slots.Sequence(
            slot=i,
            ids=rng.integers(0, config.vocab_size, 3 + 4 * i).tolist(),
            limit=CHUNK,
            seed=(i, 7),
            temperature=temperature,
            top_p=top_p,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_cached_decoding_equals_the_full_forward_pass(model, temperature):
    config, params = model
    runner = slots.Slots(config, "float32", CHUNK)
    runner.load(runner.prepare(params))
    sequences = make_sequences(config, 7, temperature)
    for _ in range(3):  # chunks, each on top of what the last one cached
        starts = [len(s.ids) for s in sequences]
        for s, start, (ids, logprobs) in zip(sequences, starts, runner.run(sequences, []), strict=True):
            s.ids += ids
            assert len(ids) == CHUNK
            table = full_logprobs(model, s.ids, temperature)[start - 1 : -1]
            np.testing.assert_allclose(logprobs, table[np.arange(CHUNK), ids], atol=1e-4)
            if temperature == 0.0:
                assert ids == table.argmax(-1).tolist()
    assert runner.counters.prefill_tokens == sum(3 + 4 * i - 1 for i in range(7))
    runner.close()


def test_a_later_turn_on_the_cached_prefix_equals_a_fresh_start(model):
    config, params = model
    outputs = []
    for reuse in (True, False):
        runner = slots.Slots(config, "float32", CHUNK)
        runner.load(runner.prepare(params))
        sequences = make_sequences(config, 5, 0.0)
        for s, (ids, _) in zip(sequences, runner.run(sequences, []), strict=True):
            s.ids += [*ids[:4], 9, 8, 7]  # cut inside the chunk, then an observation
            s.cached = min(s.cached, len(s.ids) - 4) if reuse else 0
        outputs.append(runner.run(sequences, []))
        runner.close()
    for (ids, logprobs), (fresh_ids, fresh_logprobs) in zip(*outputs, strict=True):
        assert ids == fresh_ids
        np.testing.assert_allclose(logprobs, fresh_logprobs, atol=1e-4)


def test_equal_prompts_are_computed_once(model):
    config, params = model
    runner = slots.Slots(config, "float32", CHUNK)
    runner.load(runner.prepare(params))
    sequences = [slots.Sequence(slot=i, ids=[5, 6, 7, 8], limit=CHUNK, temperature=0.0) for i in range(4)]
    results = runner.run(sequences, [])
    assert runner.counters.prefill_tokens == 3
    assert runner.counters.shared_tokens == 9
    assert all(result == results[0] for result in results)
    runner.close()


def test_rows_stop_at_their_limit_and_after_an_end_id(model):
    config, params = model
    runner = slots.Slots(config, "float32", CHUNK)
    runner.load(runner.prepare(params))
    whole = [ids for ids, _ in runner.run(make_sequences(config, 4, 0.7), [])]
    limited = make_sequences(config, 4, 0.7)
    limited[1].limit = 2
    out = [ids for ids, _ in runner.run(limited, [whole[0][2]])]
    assert out[1] == whole[1][:2]
    for got, ids in zip(out, whole, strict=True):
        cut = ids.index(whole[0][2]) + 1 if whole[0][2] in ids else CHUNK
        assert got == ids[: min(cut, len(got))]
    assert len(out[0]) <= 3
    runner.close()


def test_noise_does_not_depend_on_the_batch(model):
    config, params = model
    runner = slots.Slots(config, "float32", CHUNK)
    runner.load(runner.prepare(params))
    together = runner.run(make_sequences(config, 7, 1.0), [])
    alone = runner.run(make_sequences(config, 7, 1.0)[4:5], [])
    assert together[4][0] == alone[0][0]
    assert len({tuple(ids) for ids, _ in together}) > 1
    runner.close()


def test_writing_near_the_end_of_the_cache_spares_what_is_there(model):
    config, _ = model
    cache = jax.tree.map(lambda x: x - 1.0, sampler.make_cache(config, 3, 10, "float32"))
    new = jax.tree.map(
        lambda x: jnp.broadcast_to(jnp.arange(6.0)[:, None], (2, config.num_key_value_heads, 6, config.head_dim)), cache
    )
    out = sampler.put(cache, new, jnp.array([2, 1]), jnp.array([7, 3]), jnp.int32(2))
    for array in jax.tree.leaves(out):
        rows = np.asarray(array)[:, 0, :, 0]
        assert rows[0].tolist() == [-1.0] * 10
        assert rows[1].tolist() == [-1.0] * 3 + [0, 1, 2, 3, 4, 5] + [-1.0]
        assert rows[2].tolist() == [-1.0] * 7 + [0, 1, 2]


def nucleus(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """The top-p distribution, slowly: sort, accumulate, cut, renormalise. Equal probabilities are kept together."""
    p = np.exp((logits - logits.max()) / temperature).astype(np.float64)
    p /= p.sum()
    before = np.array([p[p > x].sum() for x in p])
    kept = np.where((before < top_p) | (top_p >= 1), p, 0)
    return kept / kept.sum()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.3, 1.0, 2.0]), st.sampled_from([0.05, 0.5, 0.9, 1.0]))
def test_sampling_follows_the_top_p_distribution(seed, temperature, top_p):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=37).astype(np.float32) * 2
    draws = 4096
    args = jnp.broadcast_to(logits, (draws, 37)), jnp.full((draws, 2), seed, jnp.uint32)
    positions = jnp.arange(draws, dtype=jnp.uint32)
    tokens, logprobs = _sample(*args, positions, jnp.full(draws, temperature), jnp.full(draws, top_p))
    wanted = nucleus(logits, temperature, top_p)
    assert wanted[np.asarray(tokens)].min() > 0  # never outside the set
    frequency = np.bincount(np.asarray(tokens), minlength=37) / draws
    assert np.abs(frequency - wanted).max() < 5 * (0.25 / draws) ** 0.5
    scaled = logits / temperature
    table = scaled - np.log(np.exp(scaled - scaled.max()).sum()) - scaled.max()
    np.testing.assert_allclose(np.asarray(logprobs), table[np.asarray(tokens)], atol=1e-5)


_sample = jax.jit(sampler.sample)


def test_impossible_words_are_never_drawn_and_greedy_takes_the_first_of_equals():
    logits = jnp.full((512, 1000), -jnp.inf).at[:, jnp.array([3, 900, 999])].set(jnp.array([1.0, 2.0, 2.0]))
    seeds, positions = jnp.ones((512, 2), jnp.uint32), jnp.arange(512, dtype=jnp.uint32)
    tokens, _ = _sample(logits, seeds, positions, jnp.ones(512), jnp.ones(512))
    assert set(np.asarray(tokens).tolist()) == {3, 900, 999}
    tokens, logprobs = _sample(logits, seeds, positions, jnp.zeros(512), jnp.ones(512))
    assert set(np.asarray(tokens).tolist()) == {900}
    np.testing.assert_allclose(logprobs, np.log(np.exp(2) / (np.exp(1) + 2 * np.exp(2))), atol=1e-6)


@given(st.integers(1, 5000), st.integers(1, 400))
def test_buckets_hold_what_they_are_for(length, count):
    assert length <= slots.length_bucket(length) < max(65, 2 * length)
    assert length <= slots.power_bucket(length, 128)
    assert count <= sum(slots.decode_groups(count)) < count + 16
    passes, left = 0, length
    while left > 0:
        left -= slots.extend_size(left)
        passes += 1
    assert passes <= length // 512 + 6
