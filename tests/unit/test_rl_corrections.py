"""Off-policy corrections and the selection of clip_cov and kl_cov against slow versions."""

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
from rl_cases import GARBAGE, NEAR, WILD, Token, arrays, by_episode, episodes_of, tokens_of

from sqlrl_jax.config_algorithm import AlgorithmConfig, ClipCovConfig, KLCovConfig, OffPolicyCorrectionConfig
from sqlrl_jax.rl.corrections import PER_EPISODE, correct
from sqlrl_jax.rl.covariance import select_clip_cov, select_kl_cov
from sqlrl_jax.rl.losses import POLICY_LOSSES
from sqlrl_jax.rl.objective import means, policy_objective

# Thresholds lie between the ratios that the cases can have (exp of eighths, and means of up to four of these).
KINDS: dict[str, dict[str, Any]] = {
    "token": {"tis_ratio_type": "token"},
    "sequence": {"tis_ratio_type": "sequence"},
    "geometric": {"sequence_mask_metric": "geometric", "geo_mask_low": 0.8, "geo_mask_high": 1.3},
    "product": {"sequence_mask_metric": "product", "tis_ratio_type": "token"},
    "outlier": {"outlier_token_is_threshold_low": 0.3, "outlier_token_is_threshold_high": 3.1},
    "tokens": {"token_mask_is_threshold_low": 0.55, "token_mask_is_threshold_high": 1.9, "tis_ratio_type": "sequence"},
}
CONFIGS = {name: OffPolicyCorrectionConfig(**values) for name, values in KINDS.items()}
COMPILED = {name: jax.jit(lambda a, c=config: correct(tokens_of(a), c)) for name, config in CONFIGS.items()}


def slow_factors(episode: list[Token], c: OffPolicyCorrectionConfig) -> list[float]:
    logs = [t.old - t.rollout for t in episode]
    rho = [math.exp(d) for d in logs]
    product, mean = math.exp(sum(logs)), math.exp(sum(logs) / len(logs))
    out = [1.0] * len(episode)
    if c.tis_ratio_type == "token":
        out = [min(r, c.token_tis_ratio_clip_high) for r in rho]
    if c.tis_ratio_type == "sequence":
        out = [min(product, c.sequence_tis_ratio_clip_high)] * len(episode)
    low, high = c.outlier_token_is_threshold_low, c.outlier_token_is_threshold_high
    dropped = low is not None and high is not None and any(r < low or r > high for r in rho)
    dropped |= c.sequence_mask_metric == "geometric" and not c.geo_mask_low <= mean <= c.geo_mask_high
    dropped |= c.sequence_mask_metric == "product" and not c.product_mask_low <= product <= c.product_mask_high
    low, high = c.token_mask_is_threshold_low, c.token_mask_is_threshold_high
    keep = [not dropped and (low is None or high is None or low <= r <= high) for r in rho]
    return [f if k else 0.0 for f, k in zip(out, keep, strict=True)]


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=40, deadline=None)
@given(episodes_of(NEAR), GARBAGE)
def test_each_correction_equals_its_formula(name: str, cases: list[Token], garbage: float) -> None:
    a = arrays(cases, garbage)
    factor, sums = COMPILED[name](a)
    want = [f for episode in by_episode(cases) for f in slow_factors(episode, CONFIGS[name])]
    np.testing.assert_allclose(np.asarray(factor)[np.asarray(a["mask"])], want, rtol=1e-5)
    assert (np.asarray(factor)[~np.asarray(a["mask"])] == 0).all()
    ratios = [math.exp(t.old - t.rollout) for t in cases]
    assert math.isclose(float(sums["is_ratio_mean"]), sum(ratios), rel_tol=1e-5)
    assert math.isclose(float(sums["is_ratio_max"]), max(ratios, default=0.0), rel_tol=1e-5)


def test_metrics_count_what_each_correction_did() -> None:
    """Three episodes of two tokens: ratios 1, 1; e^2, e^2; e^-2, 1."""
    rollout = [0.0, 0.0, -2.0, -2.0, 2.0, 0.0]
    cases = [Token(0.0, 0.0, r, 1.0, 1.0, False, 0, i // 2) for i, r in enumerate(rollout)]
    got: dict[str, float] = {}
    for name in KINDS:
        _, sums = COMPILED[name](arrays(cases, math.nan))
        got |= {k: float(v) for k, v in sums.items()}
    assert got["tis_token_clip_high_ratio"] == 2
    assert got[PER_EPISODE + "tis_seq_clip_high_ratio"] == 1
    for mask in ("geo_sequence_mask", "product_sequence_mask", "outlier_seq"):
        assert [got[f"{PER_EPISODE}{mask}_{kind}_ratio"] for kind in ("masked", "over_high", "under_low")] == [2, 1, 1]
    assert [got[f"token_mask_{kind}_ratio"] for kind in ("masked", "over_high", "under_low")] == [3, 2, 1]
    averages = means({**got, "tokens": 6.0, "episodes": 3.0, "loss": 9.0})
    assert averages["tis_token_clip_high_ratio"] == pytest.approx(1 / 3)
    assert averages["outlier_seq_masked_ratio"] == pytest.approx(2 / 3)
    assert averages["is_ratio_max"] == pytest.approx(math.exp(2))
    assert "loss" not in averages


def objective(correction: OffPolicyCorrectionConfig, new: jax.Array, a: dict[str, Any]) -> Any:
    config = AlgorithmConfig(off_policy_correction=correction)
    return policy_objective(tokens_of(a | {"new": new}), jnp.zeros_like(new), POLICY_LOSSES["ppo"], config)


WITHOUT = jax.jit(jax.value_and_grad(partial(objective, OffPolicyCorrectionConfig()), has_aux=True))
WITH = {n: jax.jit(jax.value_and_grad(partial(objective, c), has_aux=True)) for n, c in CONFIGS.items()}


@pytest.mark.parametrize("name", KINDS)
def test_on_policy_a_correction_changes_nothing(name: str) -> None:
    cases = [Token(-1.0 - i, -1.0 - i, -1.0 - i, 2.0, 1.0, False, i % 2, 0) for i in range(6)]
    a = arrays(cases, math.nan)
    (loss, sums), gradient = WITH[name](a["new"], a)
    (want, _), want_gradient = WITHOUT(a["new"], a)
    assert float(loss) == float(want)
    np.testing.assert_array_equal(gradient, want_gradient)
    assert float(sums["is_ratio_mean"]) == 6.0
    assert not any(float(v) for k, v in sums.items() if "masked" in k or "clip" in k)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=25, deadline=None)
@given(episodes_of(WILD), GARBAGE)
def test_huge_ratios_and_garbage_stay_out(name: str, cases: list[Token], garbage: float) -> None:
    a = arrays(cases, garbage)
    (loss, sums), gradient = WITH[name](a["new"], a)
    assert np.isfinite([float(loss), *map(float, sums.values())]).all()
    assert np.isfinite(gradient).all()


# clip_cov and kl_cov

NUMBERS = st.lists(
    st.tuples(st.floats(-8, 0, width=32), st.floats(-8, 0, width=32), st.integers(-8, 8).map(lambda k: k / 4)),
    max_size=40,
)
COV = AlgorithmConfig(clip_cov=ClipCovConfig(clip_ratio=0.1), kl_cov=KLCovConfig(kl_cov_frac=0.2))


def slow_covariances(rows: list[tuple[float, float, float]]) -> list[float]:
    n = len(rows)
    mean_new, mean_a = math.fsum(r[0] for r in rows) / n, math.fsum(r[2] for r in rows) / n
    return [(new - mean_new) * (a - mean_a) for new, _, a in rows]


@settings(max_examples=150, deadline=None)
@given(NUMBERS)
def test_kl_cov_selects_the_largest_covariances(rows: list[tuple[float, float, float]]) -> None:
    new, _, advantages = (np.array([r[i] for r in rows], np.float32) for i in range(3))
    selected = select_kl_cov(new, advantages, COV)
    assert selected.sum() == min(max(1, int(0.2 * len(rows))), len(rows))
    if rows:
        values = np.array(slow_covariances(rows))
        assert values[selected].min() >= values[~selected].max(initial=-math.inf) - 1e-9


@settings(max_examples=150, deadline=None)
@given(NUMBERS, st.integers(0, 3))
def test_clip_cov_draws_from_the_tokens_inside_its_bounds(rows: list[tuple[float, float, float]], seed: int) -> None:
    new, old, advantages = (np.array([r[i] for r in rows], np.float32) for i in range(3))
    selected = select_clip_cov(new, old, advantages, COV, np.random.default_rng(seed))
    again = select_clip_cov(new, old, advantages, COV, np.random.default_rng(seed))
    np.testing.assert_array_equal(selected, again)
    inside = 0
    for i, value in enumerate(slow_covariances(rows) if rows else []):
        ratio = math.exp(rows[i][0] - rows[i][1])
        cut = (rows[i][2] > 0 and ratio > 1.2 + 1e-6) or (rows[i][2] < 0 and ratio < 0.8 - 1e-6)
        inside += 1.0 < value < 5.0 and not cut
        if selected[i]:
            assert 1.0 - 1e-6 < value < 5.0 + 1e-6
            assert not cut
    assert selected.sum() == min(max(1, int(0.1 * len(rows))), inside)
