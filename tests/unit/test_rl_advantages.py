"""Group-relative advantages against a slow version written from the formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqlrl_jax.rl.advantages import grpo


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
