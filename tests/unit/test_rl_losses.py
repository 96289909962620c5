"""Policy losses against slow scalar versions, value and gradient, with masks, NaN in masked places and huge ratios."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rl_cases import GARBAGE, WILD, Token, arrays, by_episode, episodes_of, tokens_of

from rollout.errors import UserError
from sqlrl_jax.config_algorithm import POLICY_LOSSES as NAMES
from sqlrl_jax.config_algorithm import AlgorithmConfig, DPPOConfig
from sqlrl_jax.rl.losses import POLICY_LOSSES, TokenLoss, add_sums, load_policy_loss, next_token_loss
from sqlrl_jax.rl.objective import means, policy_objective

CONFIG = AlgorithmConfig(eps_clip_low=0.2, eps_clip_high=0.28, use_entropy_loss=False)
KL = CONFIG.model_copy(update={"dppo": DPPOConfig(dppo_type="binary_kl", delta_low=0.05, delta_high=0.07)})

# Of one token: its loss, the derivative of its loss by its log-probability, whether a bound held it.
Slow = tuple[float, float, bool]


def ratio_of(new: float, old: float) -> tuple[float, float]:
    """The clamped ratio and its derivative by `new`, which is 0 where the clamp holds."""
    d = new - old
    ratio = math.exp(min(max(d, -20.0), 20.0))
    return ratio, ratio if abs(d) <= 20 else 0.0


def slow_clip(ratio: float, slope: float, a: float) -> Slow:
    if a > 0 and ratio > 1.28:
        return -a * 1.28, 0.0, True
    if a < 0 and ratio < 0.8:
        return -a * 0.8, 0.0, True
    return -a * ratio, -a * slope, False


def slow_ppo(t: Token, _: list[Token]) -> Slow:
    return slow_clip(*ratio_of(t.new, t.old), t.advantage)


def slow_dual_clip(t: Token, episode: list[Token]) -> Slow:
    loss, slope, cut = slow_ppo(t, episode)
    if t.advantage < 0 and loss > -3.0 * t.advantage:
        return -3.0 * t.advantage, 0.0, True
    return loss, slope, cut


def slow_gspo(t: Token, episode: list[Token]) -> Slow:
    mean = sum(np.float32(o.new) - np.float32(o.old) for o in episode) / len(episode)
    ratio, _ = ratio_of(float(mean), 0.0)
    return slow_clip(ratio, ratio, t.advantage)


def slow_cispo(t: Token, _: list[Token]) -> Slow:
    ratio, _ = ratio_of(t.new, t.old)
    weight = min(ratio, 5.0)
    return -t.advantage * weight * t.new, -t.advantage * weight, ratio > 5.0


def slow_sapo(t: Token, _: list[Token]) -> Slow:
    tau = 1.0 if t.advantage > 0 else 1.05
    ratio, slope = ratio_of(t.new, t.old)
    x = tau * (ratio - 1.0)
    sigmoid = 1.0 / (1.0 + math.exp(-x)) if x < 500 else 1.0
    return -t.advantage * 4.0 / tau * sigmoid, -t.advantage * 4.0 * sigmoid * (1.0 - sigmoid) * slope, False


def slow_importance_sampling(t: Token, _: list[Token]) -> Slow:
    ratio, slope = ratio_of(t.new, t.rollout)
    return -t.advantage * ratio, -t.advantage * slope, False


def slow_dppo(t: Token, episode: list[Token]) -> Slow:
    p, q = math.exp(t.new), math.exp(t.rollout)
    if (t.advantage > 0 and p - q > 0.2) or (t.advantage < 0 and q - p > 0.2):
        return 0.0, 0.0, True
    return slow_importance_sampling(t, episode)


def slow_clip_cov(t: Token, episode: list[Token]) -> Slow:
    return (0.0, 0.0, True) if t.selected else slow_ppo(t, episode)


def slow_kl_cov(t: Token, _: list[Token]) -> Slow:
    ratio, slope = ratio_of(t.new, t.old)
    loss, gradient = -t.advantage * ratio, -t.advantage * slope
    if t.selected:
        loss += ratio - 1.0 - math.log(ratio)
        gradient += slope - (1.0 if slope else 0.0)
    return loss, gradient, False


def slow_cross_entropy(t: Token, _: list[Token]) -> Slow:
    return (-t.new, -1.0, False) if t.advantage > 0 else (0.0, 0.0, False)


SLOW: dict[str, Callable[[Token, list[Token]], Slow]] = {
    "ppo": slow_ppo,
    "dual_clip": slow_dual_clip,
    "gspo": slow_gspo,
    "cispo": slow_cispo,
    "sapo": slow_sapo,
    "dppo": slow_dppo,
    "clip_cov": slow_clip_cov,
    "kl_cov": slow_kl_cov,
    "importance_sampling": slow_importance_sampling,
    "cross_entropy": slow_cross_entropy,
}


def total(name: str, config: AlgorithmConfig, a: dict[str, Any], entropy: Any) -> tuple[Any, Any]:
    def of(new: jax.Array) -> Any:
        return policy_objective(tokens_of(a | {"new": new}), entropy, POLICY_LOSSES[name], config)

    return jax.value_and_grad(of, has_aux=True)(a["new"])


BINARY_KL = jax.jit(partial(total, "dppo", KL))
COMPILED = {name: jax.jit(partial(total, name, CONFIG)) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(episodes_of(WILD), GARBAGE)
def test_each_loss_equals_its_formula(name: str, cases: list[Token], garbage: float) -> None:
    gaps = [np.float32(t.new) - np.float32(other) for t in cases for other in (t.old, t.rollout)]
    assume(20 not in map(abs, gaps))  # either slope is right there
    a = arrays(cases, garbage)
    (loss, sums), gradient = COMPILED[name](a, a["new"])
    slow = [(t, *SLOW[name](t, episode)) for episode in by_episode(cases) for t in episode]
    parts = sum(t.weight * ratio_of(t.new, t.old)[0] for t in cases if name == "kl_cov" and t.selected)  # may cancel
    scale = 1.0 + parts + sum(t.weight * (abs(v) + abs(g)) for t, v, g, _ in slow)
    want = sum(t.weight * value for t, value, _, _ in slow)
    assert math.isclose(float(loss), want, rel_tol=2e-4, abs_tol=2e-5 * scale)
    want_gradient = [t.weight * g for t, _, g, _ in slow]
    np.testing.assert_allclose(np.asarray(gradient)[np.asarray(a["mask"])], want_gradient, rtol=2e-3, atol=2e-5 * scale)
    assert (np.asarray(gradient)[~np.asarray(a["mask"])] == 0).all()
    assert float(sums["clip_frac"]) == sum(cut for *_, cut in slow)
    assert float(sums["tokens"]) == len(cases)
    assert float(sums["episodes"]) == len(by_episode(cases))
    gaps = [abs(t.new - t.rollout) for t in cases]
    assert math.isclose(float(sums["logprob_diff"]), sum(gaps), rel_tol=1e-4, abs_tol=1e-4)
    assert math.isclose(float(sums["logprob_diff_max"]), max(gaps, default=0.0), rel_tol=1e-5, abs_tol=1e-30)


def test_the_names_of_the_configuration_are_the_losses() -> None:
    assert tuple(POLICY_LOSSES) == NAMES
    assert set(SLOW) == set(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cross_entropy"])
def test_on_policy_every_loss_has_the_gradient_of_reinforce(name: str) -> None:
    """-A times the gradient of log p: what all of them are where the ratio is 1. sapo's gate has slope 1 there too."""
    cases = [Token(-1.0 - i, -1.0 - i, -1.0 - i, (-1.0) ** i * (i + 1), 1.0, False, 0, i // 2) for i in range(6)]
    a = arrays(cases, math.nan)
    (_, sums), gradient = COMPILED[name](a, a["new"])
    np.testing.assert_allclose(np.asarray(gradient)[0, :6], [-t.advantage for t in cases], rtol=1e-6)
    assert float(sums["clip_frac"]) == 0
    assert means({k: float(v) for k, v in sums.items()})["ratio_mean"] == pytest.approx(1, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.floats(-8, -0.125, width=32), st.floats(-8, -0.125, width=32), st.sampled_from([-1.0, 1.0]))
def test_binary_kl_bounds_the_divergence_in_the_direction_of_the_advantage(new: float, old: float, a: float) -> None:
    batch = arrays([Token(new, old, old, a, 1.0, False)], math.nan)
    (_, sums), _ = BINARY_KL(batch, batch["new"])
    p, q = math.exp(new), math.exp(old)
    kl = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    bound = 0.07 if a > 0 else 0.05
    if abs(kl - bound) > 1e-4:
        assert float(sums["clip_frac"]) == (kl > bound and (p - q) * a > 0)


def test_entropy_is_subtracted_by_its_weight() -> None:
    config = CONFIG.model_copy(update={"use_entropy_loss": True, "entropy_loss_coef": 0.5})
    a = arrays([Token(-1, -1, -1, 0.0, 1.0, False), Token(-1, -1, -1, 0.0, 3.0, False)], math.nan)
    entropy = jnp.where(a["mask"], 2.0, math.nan)
    loss, gradient = jax.jit(jax.value_and_grad(lambda e: total("ppo", config, a, e)[0][0]))(entropy)
    assert float(loss) == -0.5 * 2.0 * 4.0
    assert gradient[0, :3].tolist() == [-0.5, -1.5, 0.0]


def test_huge_ratios_stay_finite() -> None:
    a = arrays([Token(0.0, -500.0, -500.0, -1.0, 1.0, True), Token(-500.0, 0.0, 0.0, -1.0, 1.0, True)], math.nan)
    for name in NAMES:
        (loss, sums), gradient = COMPILED[name](a, a["new"])
        assert np.isfinite([float(loss), *map(float, sums.values())]).all(), name
        assert np.isfinite(gradient).all(), name
        assert float(sums["logprob_diff_max"]) == 500


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("own_loss")
    module.__file__ = "own_loss.py"
    monkeypatch.setitem(sys.modules, "own_loss", module)
    return module


def test_a_loss_of_ones_own_is_used_and_its_result_checked(own: ModuleType) -> None:
    own.plain = lambda tokens, settings: TokenLoss(-tokens.advantages * tokens.logprobs, tokens.mask)  # type: ignore[attr-defined]
    own.wrong = lambda tokens, settings: tokens.logprobs.sum()  # type: ignore[attr-defined]
    a = arrays([Token(-2.0, -1, -1, 3.0, 1.0, False)], math.nan)
    loss, _ = policy_objective(tokens_of(a), a["new"], load_policy_loss("own_loss:plain"), CONFIG)
    assert float(loss) == 6.0
    with pytest.raises(UserError, match=r"policy_loss_type = 'own_loss:wrong' returned .* expected TokenLoss"):
        policy_objective(tokens_of(a), a["new"], load_policy_loss("own_loss:wrong"), CONFIG)
    with pytest.raises(UserError, match=r"own_loss.py has no function plan; did you mean 'own_loss:plain'\?"):
        load_policy_loss("own_loss:plan")
    with pytest.raises(UserError, match="cannot import no_such_module"):
        load_policy_loss("no_such_module:f")


def test_the_loss_of_given_tokens_counts_own_tokens_apart() -> None:
    logprobs, weights = jnp.array([-1.0, -2.0, -4.0, math.nan]), jnp.array([1.0, 0.3, 1.0, math.nan])
    greedy, mask = jnp.array([True, True, False, True]), jnp.array([True, True, True, False])
    loss, sums = next_token_loss(logprobs, weights, greedy, mask)
    assert math.isclose(float(loss), 1 + 0.6 + 4, rel_tol=1e-6)
    assert {k: float(v) for k, v in sums.items()} == {"nll": 5.0, "greedy": 1.0, "own_tokens": 2.0, "tokens": 3.0}


def test_add_sums_adds_and_keeps_the_largest() -> None:
    left, right = {"a": jnp.array(1.0), "b_max": jnp.array(5.0)}, {"a": jnp.array(2.0), "b_max": jnp.array(3.0)}
    assert {k: float(v) for k, v in add_sums(left, right).items()} == {"a": 3.0, "b_max": 5.0}
