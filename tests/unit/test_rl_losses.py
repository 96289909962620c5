"""Losses against slow scalar versions, with masks, NaN in masked places and huge ratios."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqlrl_jax.rl.losses import add_sums, cross_entropy, ppo

COMPILED = {c: jax.jit(partial(ppo, eps_low=0.2, eps_high=0.28, dual_clip=c)) for c in (None, 3.0)}
FINITE = st.floats(-60, 0, width=32)
TOKEN = st.tuples(FINITE, FINITE, st.floats(-3, 3, width=32), st.floats(0, 2, width=32), st.booleans())


def slow_ppo(tokens: list[tuple[float, ...]], low: float, high: float, c: float | None) -> dict[str, float]:
    out = dict.fromkeys(("loss", "clip_frac", "approx_kl", "ratio", "tokens"), 0.0)
    for new, old, advantage, weight, counts in tokens:
        if not counts:
            continue
        log_ratio = min(max(new - old, -20.0), 20.0)
        ratio = math.exp(log_ratio)
        plain = -advantage * ratio
        clipped = -advantage * min(max(ratio, 1 - low), 1 + high)
        loss, cut = max(plain, clipped), clipped > plain
        if c is not None and advantage < 0 and loss > -c * advantage:
            loss, cut = -c * advantage, True
        out["loss"] += weight * loss
        out["clip_frac"] += cut
        out["approx_kl"] += ratio - 1 - log_ratio
        out["ratio"] += ratio
        out["tokens"] += 1
    return out


def columns(tokens: list[tuple[Any, ...]], garbage: float) -> list[jax.Array]:
    """Arrays of the columns; masked tokens hold `garbage` in every number."""
    mask = np.array([bool(t[-1]) for t in tokens])
    parts = [np.where(mask, np.array([t[i] for t in tokens], np.float32), np.float32(garbage)) for i in range(4)]
    return [*map(jnp.asarray, parts), jnp.asarray(mask)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(TOKEN, min_size=1, max_size=12), st.sampled_from([None, 3.0]), st.sampled_from([0.0, math.nan, math.inf])
)
def test_ppo_equals_the_formula(tokens: list[tuple[Any, ...]], c: float | None, garbage: float) -> None:
    padded = [*tokens, *[(0.0, 0.0, 0.0, 0.0, False)] * (12 - len(tokens))]  # one shape, one compilation
    loss, sums = COMPILED[c](*columns(padded, garbage))
    want = slow_ppo(tokens, 0.2, 0.28, c)
    scale = max(1.0, sum(abs(t[2]) * t[3] for t in tokens) * math.exp(20))
    assert math.isclose(float(loss), want["loss"], rel_tol=1e-4, abs_tol=1e-6 * scale)
    for name in ("ratio", "approx_kl", "tokens"):
        assert math.isclose(float(sums[name]), want[name], rel_tol=1e-4, abs_tol=1e-4)


def test_clip_fraction_counts_the_tokens_without_gradient() -> None:
    new = jnp.log(jnp.array([1.5, 1.5, 0.5, 0.5, 1.0, 9.0]))
    advantage = jnp.array([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    ones, mask = jnp.ones(6), jnp.ones(6, bool)

    def total(x: jax.Array) -> tuple[jax.Array, Any]:
        return ppo(x, jnp.zeros(6), advantage, ones, mask, eps_low=0.2, eps_high=0.2, dual_clip=3.0)

    gradient, sums = jax.grad(total, has_aux=True)(new)
    assert [bool(g == 0) for g in gradient] == [True, False, False, True, False, True]
    assert float(sums["clip_frac"]) == 3


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_masked_places_reach_neither_value_nor_gradient(garbage: float) -> None:
    tokens = [(-1.0, -1.1, 0.5, 1.0, True), (-2.0, -2.0, 1.0, 1.0, False)]
    new, old, advantage, weight, mask = columns(tokens, garbage)
    (value, sums), gradient = jax.value_and_grad(
        lambda x: ppo(x, old, advantage, weight, mask, eps_low=0.2, eps_high=0.2), has_aux=True
    )(new)
    assert np.isfinite([float(value), *map(float, sums.values())]).all()
    assert np.isfinite(gradient).all()
    assert gradient[1] == 0
    value, sums = cross_entropy(new, weight, mask, mask)
    assert float(value) == 1.0
    assert float(sums["nll"]) == 1.0


def test_huge_ratios_stay_finite() -> None:
    value, sums = ppo(
        jnp.array([0.0]),
        jnp.array([-500.0]),
        jnp.array([-1.0]),
        jnp.ones(1),
        jnp.ones(1, bool),
        eps_low=0.2,
        eps_high=0.2,
    )
    assert math.isclose(float(value), math.exp(20), rel_tol=1e-5)
    assert float(sums["logprob_diff_max"]) == 500


def test_cross_entropy_counts_own_tokens_apart() -> None:
    logprobs, weights = jnp.array([-1.0, -2.0, -4.0, -8.0]), jnp.array([1.0, 0.3, 1.0, 1.0])
    greedy, mask = jnp.array([True, True, False, True]), jnp.array([True, True, True, False])
    loss, sums = cross_entropy(logprobs, weights, greedy, mask)
    assert math.isclose(float(loss), 1 + 0.6 + 4, rel_tol=1e-6)
    assert {k: float(v) for k, v in sums.items()} == {"nll": 5.0, "greedy": 1.0, "own_tokens": 2.0, "tokens": 3.0}


def test_add_sums_adds_and_keeps_the_largest() -> None:
    left, right = {"a": jnp.array(1.0), "b_max": jnp.array(5.0)}, {"a": jnp.array(2.0), "b_max": jnp.array(3.0)}
    assert {k: float(v) for k, v in add_sums(left, right).items()} == {"a": 3.0, "b_max": 5.0}
