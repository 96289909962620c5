"""Advantages and what becomes of rewards before them, against slow versions written from the formulas."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.errors import UserError
from rollout.types import Trajectory, Turn
from sqlrl_jax import config_file
from sqlrl_jax.config_algorithm import ADVANTAGE_ESTIMATORS, AlgorithmConfig
from sqlrl_jax.rl.advantages import (
    ESTIMATORS,
    Rewards,
    advantage_metrics,
    grpo,
    load_estimator,
    maxrl,
    rloo,
)
from sqlrl_jax.rl.rewards import context_tokens, final_rewards, overlong_penalty


def slow_grpo(rewards: list[float], groups: list[int], norm_by_std: bool) -> list[float]:
    out = []
    for reward, group in zip(rewards, groups, strict=True):
        mine = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        if len(mine) == 1:
            mean, std = 0.0, 1.0
        else:
            mean = math.fsum(mine) / len(mine)
            std = math.sqrt(math.fsum((r - mean) ** 2 for r in mine) / (len(mine) - 1))
        out.append((reward - mean) / (std + 1e-6) if norm_by_std else reward - mean)
    return out


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 1.0, 0.1, -1.0, 0.5]), st.integers(0, 4)), min_size=1, max_size=30),
    st.booleans(),
)
def test_equals_the_formula(episodes: list[tuple[float, int]], norm_by_std: bool) -> None:
    rewards, groups = [r for r, _ in episodes], [g for _, g in episodes]
    got = grpo(np.asarray(rewards), groups, norm_by_std)
    np.testing.assert_allclose(got, slow_grpo(rewards, groups, norm_by_std), rtol=1e-5, atol=1e-6)


def test_a_group_of_one_keeps_its_reward() -> None:
    np.testing.assert_allclose(grpo(np.array([1.0, 0.0]), ["a", "b"]), [1.0, 0.0], atol=1e-5)


def test_equal_rewards_give_exactly_zero() -> None:
    assert (grpo(np.full(5, 1.0), ["a"] * 5) == 0).all()
    assert (grpo(np.full(3, 0.1), ["a"] * 3) == 0).all()


def test_refuses_what_is_not_a_reward() -> None:
    with pytest.raises(ValueError, match="episode 1 is not finite"):
        grpo(np.array([0.0, math.nan]), ["a", "a"])
    with pytest.raises(ValueError, match="one reward an episode"):
        grpo(np.zeros(3), ["a"])


EPISODES = st.lists(
    st.tuples(st.sampled_from([0.0, 1.0, 0.1, 0.5, 2.0]), st.integers(0, 4), st.integers(0, 5)), max_size=30
)


@given(EPISODES)
def test_rloo_is_the_reward_less_the_mean_of_the_others(episodes: list[tuple[float, int, int]]) -> None:
    want = []
    for i, (reward, group, _) in enumerate(episodes):
        others = [r for j, (r, g, _) in enumerate(episodes) if g == group and j != i]
        want.append(reward - math.fsum(others) / len(others) if others else 0.0)
    got = rloo(np.array([r for r, _, _ in episodes]), [g for _, g, _ in episodes])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@given(EPISODES)
def test_maxrl_divides_by_the_mean(episodes: list[tuple[float, int, int]]) -> None:
    want = []
    for reward, group, _ in episodes:
        mine = [r for r, g, _ in episodes if g == group]
        mean = math.fsum(mine) / len(mine)
        want.append((reward - mean) / (mean + 1e-6) if len(mine) > 1 else reward)
    got = maxrl(np.array([r for r, _, _ in episodes]), [g for _, g, _ in episodes])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_equal_rewards_and_groups_of_one() -> None:
    for estimator in (rloo, maxrl):
        assert (estimator(np.full(5, 0.1), ["a"] * 5) == 0).all()
    np.testing.assert_array_equal(rloo(np.array([1.0, 0.0]), ["a", "b"]), [0, 0])
    np.testing.assert_array_equal(maxrl(np.array([1.0, 0.0]), ["a", "b"]), [1, 0])
    with pytest.raises(UserError, match="needs none below 0, but an episode earned -1"):
        maxrl(np.array([1.0, -1.0]), ["a", "a"])


def test_the_names_of_the_configuration_are_the_estimators() -> None:
    assert tuple(ESTIMATORS) == ADVANTAGE_ESTIMATORS
    lengths = np.array([2, 1, 3])
    batch = Rewards(np.array([1.0, 0.0, 0.0]), ["a", "a", "a"], lengths, values=[np.zeros(n) for n in lengths])
    for name in ADVANTAGE_ESTIMATORS:
        got = load_estimator(name)(batch, AlgorithmConfig(grpo_norm_by_std=False))
        assert np.ravel(got[0])[0] > 0 > np.ravel(got[1])[0]
        assert set(advantage_metrics(batch.rewards, got)) == {
            "loss/avg_final_rewards",
            "loss/avg_raw_advantages",
            "loss/avg_raw_advantages_abs",
        }
    dr_grpo = ESTIMATORS["grpo"](batch, AlgorithmConfig(grpo_norm_by_std=False))
    np.testing.assert_allclose(dr_grpo, [2 / 3, -1 / 3, -1 / 3], rtol=1e-6)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0, 2.0], None),
        ([np.zeros(2), np.zeros(1)], None),
        ([1.0], "returned 1 advantages of shapes"),
        ([np.zeros(2), np.zeros(2)], "expected one number an episode, or for each an array of its `lengths`"),
        ([1.0, math.nan], "the advantage of episode 1 is not finite"),
        (None, "returned NoneType and not numbers"),
    ],
)
def test_an_estimator_of_ones_own_is_checked(monkeypatch: pytest.MonkeyPatch, result: object, message: str) -> None:
    module = ModuleType("own_estimator")
    module.mine = lambda batch, settings: result  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_estimator", module)
    estimate = load_estimator("own_estimator:mine")
    batch = Rewards(np.array([1.0, 0.0]), ["a", "a"], np.array([2, 1]))
    if message is None:
        assert len(estimate(batch, AlgorithmConfig())) == 2
    else:
        with pytest.raises(UserError, match=message):
            estimate(batch, AlgorithmConfig())


def episode(stop_reason: str, tokens: int, reward: float) -> Trajectory:
    return Trajectory("t", "s", 0, [1] * 10, [1] * (tokens - 10), [], [], [], reward, "wrong", stop_reason)


@given(st.integers(10, 200), st.integers(0, 50), st.sampled_from([0.5, 1.0]))
def test_overlong_penalty_falls_linearly_over_the_buffer(tokens: int, buffer: int, factor: float) -> None:
    got = overlong_penalty(tokens, 100, buffer, factor)
    if buffer == 0 or tokens <= 100 - buffer:
        assert got == 0
    elif tokens >= 100:
        assert got == -factor
    else:
        assert got == pytest.approx(factor * ((100 - buffer) - tokens) / buffer)


@given(st.integers(0, 6), st.sampled_from(["correct", "wrong", "malformed"]), st.sampled_from([0.0, 0.02, 0.1]))
def test_turns_after_the_first_cost_right_answers_alone(turns: int, outcome: str, penalty: float) -> None:
    played = replace(episode("solution", 50, 1.0), outcome=outcome, turns=[Turn("") for _ in range(turns)])
    config = config_file.load(None, [f"trainer.algorithm.turn_penalty={penalty}"])
    lost = penalty * (turns - 1) if outcome == "correct" and turns > 1 else 0.0
    assert final_rewards([played], config)[0] == pytest.approx(1.0 - lost)


def test_an_episode_whose_context_is_rewritten_is_as_long_as_its_longest_turn() -> None:
    long = episode("solution", 120, 1.0)
    assert context_tokens(long) == 120
    turns = [Turn("a", tokens=20), Turn("b", tokens=30)]
    rewritten = dataclasses.replace(long, turns=turns, contexts=[[1] * 60, [1] * 40])
    assert context_tokens(rewritten) == 80
    options = ["generator.max_input_length=100", "generator.sampling_params.max_generate_length=8"]
    config = config_file.load(None, [*options, "trainer.algorithm.overlong_buffer.len=40"])
    np.testing.assert_array_equal(final_rewards([long, rewritten], config), [0.0, 0.5])


def test_final_rewards() -> None:
    played = [episode("solution", 50, 1.0), episode("length", 50, 1.0), episode("overflow", 120, 0.5)]
    options = ["generator.max_input_length=100", "generator.sampling_params.max_generate_length=8"]
    np.testing.assert_array_equal(final_rewards(played, config_file.load(None, options)), [1.0, 1.0, 0.5])
    options += ["generator.zero_reward_on_non_stop=true", "trainer.algorithm.overlong_buffer.len=20"]
    np.testing.assert_array_equal(final_rewards(played, config_file.load(None, options)), [1.0, 0.0, -1.0])
