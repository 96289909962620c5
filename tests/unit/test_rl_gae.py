"""Token-level credit against slow scalar versions: gae, reinforce++, whitening, rewards at tokens, the critic's loss."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rl_cases import GARBAGE

from rollout.types import Trajectory, Turn
from sqlrl_jax import config_file
from sqlrl_jax.rl.advantages import Rewards, gae, gae_returns, reinforce_plus_plus, whiten
from sqlrl_jax.rl.rewards import final_rewards, token_rewards
from sqlrl_jax.rl.values import explained_variance, value_loss

REWARD = st.sampled_from([0.0, 0.0, 1.0, 0.1, -1.0])
# One sampled token: its reward and the critic's value.
STEP = st.tuples(REWARD, st.floats(-3, 3, width=32))
BATCH = st.lists(st.lists(STEP, max_size=6), min_size=1, max_size=6)
SHARE = st.sampled_from([1.0, 0.95, 0.5])


def batch_of(episodes: list[list[tuple[float, float]]]) -> Rewards:
    rewards = [np.array([r for r, _ in episode]) for episode in episodes]
    values = [np.array([v for _, v in episode], np.float32) for episode in episodes]
    lengths = np.array([len(episode) for episode in episodes])
    return Rewards(np.array([r.sum() for r in rewards]), ["q"] * len(episodes), lengths, rewards, values)


def slow_returns(episode: list[tuple[float, float]], gamma: float, lambd: float) -> list[float]:
    """By the definition: a sum over all later tokens for each token."""
    n = len(episode)
    value = [v for _, v in episode] + [0.0]
    delta = [r + gamma * value[t + 1] - value[t] for t, (r, _) in enumerate(episode)]
    return [value[t] + math.fsum((gamma * lambd) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]


def slow_whiten(parts: list[list[float]]) -> list[list[float]]:
    tokens = [x for part in parts for x in part]
    mean = math.fsum(tokens) / len(tokens)
    variance = math.fsum((x - mean) ** 2 for x in tokens) / (len(tokens) - 1)
    return [[(x - mean) / math.sqrt(variance + 1e-8) for x in part] for part in parts]


def assert_parts(got: list[np.ndarray], want: list[list[float]], tolerance: float = 1e-4) -> None:
    assert [len(part) for part in got] == [len(part) for part in want]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@given(BATCH, SHARE, st.sampled_from([1.0, 0.9, 0.0]))
def test_gae_equals_its_definition(episodes: list[list[tuple[float, float]]], gamma: float, lambd: float) -> None:
    batch = batch_of(episodes)
    returns = [slow_returns(episode, gamma, lambd) for episode in episodes]
    assert_parts(gae_returns(batch, gamma, lambd), returns, 1e-9)
    advantages = [[r - v for r, (_, v) in zip(part, e, strict=True)] for part, e in zip(returns, episodes, strict=True)]
    tokens = [a for part in advantages for a in part]
    assume(len(tokens) > 1 and np.std(tokens) > 1e-3)
    assert_parts(gae(batch, gamma, lambd), slow_whiten(advantages))


@given(BATCH, SHARE)
def test_reinforce_plus_plus_whitens_discounted_returns(
    episodes: list[list[tuple[float, float]]], gamma: float
) -> None:
    returns = []
    for episode in episodes:
        running, backwards = 0.0, []
        for reward, _ in reversed(episode):
            running = reward + gamma * running
            backwards.append(running)
        returns.append(backwards[::-1])
    tokens = [x for part in returns for x in part]
    assume(len(tokens) > 1 and np.std(tokens) > 1e-3)
    assert_parts(reinforce_plus_plus(batch_of(episodes), gamma), slow_whiten(returns))


def test_a_reward_without_a_place_comes_with_the_last_token() -> None:
    bare = Rewards(np.array([1.0, -1.0, 3.0]), ["a", "a", "b"], np.array([3, 1, 0]))
    assert [part.tolist() for part in bare.at_tokens()] == [[0, 0, 1], [-1], []]
    placed = dataclasses.replace(bare, token_rewards=bare.at_tokens())
    assert_parts(reinforce_plus_plus(bare, 0.5), [part.tolist() for part in reinforce_plus_plus(placed, 0.5)])


def test_without_a_critic_and_discount_gae_is_the_return() -> None:
    rewards = [np.array([0.0, 0.5, 1.0]), np.array([0.0])]
    batch = Rewards(np.array([1.5, 0]), ["a", "b"], np.array([3, 1]), rewards, [np.zeros(3), np.zeros(1)])
    assert [part.tolist() for part in gae_returns(batch, 1.0, 1.0)] == [[1.5, 1.5, 1.0], [0.0]]
    assert_parts(gae(batch), [part.tolist() for part in reinforce_plus_plus(batch)])


def test_equal_numbers_and_one_alone_whiten_to_zeros() -> None:
    assert [part.tolist() for part in whiten([np.full(3, 0.1), np.full(2, 0.1)])] == [[0, 0, 0], [0, 0]]
    assert [part.tolist() for part in whiten([np.array([7.0]), np.zeros(0)])] == [[0], []]
    assert whiten([]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": [np.array([0.0, math.nan])]}, "values of episode 0 are not finite"),
        ({"values": [np.zeros(3)]}, r"values of shapes \[\(3,\)\]"),
        ({"values": ()}, r"values of shapes \[\]"),
        ({"token_rewards": [np.array([math.inf, 0.0])]}, "rewards of episode 0 are not finite"),
    ],
)
def test_refuses_what_no_token_can_have(change: dict[str, object], message: str) -> None:
    batch = batch_of([[(0.0, 0.0), (1.0, 0.5)]])
    with pytest.raises(ValueError, match=message):
        gae(dataclasses.replace(batch, **change))


def episode(stop_reason: str, *turns: tuple[int, float]) -> Trajectory:
    """Turns of (tokens, reward) with an observation of one token between them."""
    mask = [m for tokens, _ in turns for m in [1] * tokens + [0]][:-1]
    played = [Turn("a", tokens=tokens, reward=reward) for tokens, reward in turns]
    reward = sum(reward for _, reward in turns)
    ids = [1] * len(mask)
    return Trajectory("t", "s", 0, [1] * 10, ids, mask, [], [], reward, "wrong", stop_reason, played)


def test_rewards_lie_where_they_were_earned() -> None:
    played = [episode("solution", (2, 0.25), (3, 1.0)), episode("length", (1, 0.5), (2, 0.0))]
    config = config_file.load(None, [])
    finals = final_rewards(played, config)
    got = token_rewards(played, finals, config)
    assert [part.tolist() for part in got] == [[0, 0.25, 0, 0, 1.0], [0.5, 0, 0]]
    options = [
        "generator.zero_reward_on_non_stop=true",
        "generator.max_input_length=16",
        "generator.sampling_params.max_generate_length=8",
        "trainer.algorithm.overlong_buffer.len=16",
    ]
    config = config_file.load(None, options)
    finals = final_rewards(played, config)
    got = token_rewards(played, finals, config)
    np.testing.assert_allclose(got[0], [0, 0.25, 0, 0, 0.0])  # 16 tokens of context: all of the penalty, at the end
    np.testing.assert_allclose(got[1], [0, 0, -14 / 16])  # what its first turn earned is gone too
    assert [part.sum() for part in got] == pytest.approx(finals.tolist())


def test_turns_that_are_not_the_masks_are_refused() -> None:
    broken = dataclasses.replace(episode("solution", (2, 0.0), (3, 1.0)), loss_mask=[1, 1, 0, 1, 1, 0])
    with pytest.raises(ValueError, match="its turns have 5 tokens, its loss_mask 4"):
        token_rewards([broken], np.array([1.0]), config_file.load(None, []))


LOSS = jax.jit(jax.value_and_grad(value_loss, has_aux=True), static_argnums=4)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(*[st.floats(-8, 8, width=32)] * 3, st.booleans()), min_size=1, max_size=8),
    st.sampled_from([0.25, None]),
    GARBAGE,
)
def test_the_value_loss_equals_its_formula(
    cases: list[tuple[float, float, float, bool]], clip: float | None, garbage: float
) -> None:
    want = want_clipped = 0.0
    slopes = []
    for value, old, target, kept in cases:
        error, moved = (value - target) ** 2, max(min(value - old, clip), -clip) if clip else 0.0
        other = (old + moved - target) ** 2 if clip else 0.0
        assume(not clip or abs(other - error) > 1e-4 or other == error)
        held = bool(clip) and other > error
        want += kept * 0.5 * (other if held else error)
        want_clipped += kept and held
        slopes.append((0.0 if held else value - target) if kept else 0.0)
    mask = np.array([[kept for *_, kept in cases] + [False] * (8 - len(cases))])
    arrays = [np.full((1, 8), garbage, np.float32) for _ in range(3)]
    for i, case in enumerate(cases):
        for array, x in zip(arrays, case, strict=False):
            array[0, i] = x if mask[0, i] else garbage
    (loss, sums), gradient = LOSS(*map(jnp.asarray, arrays), jnp.asarray(mask), clip)
    assert float(loss) == pytest.approx(want, rel=1e-4, abs=1e-4)
    assert float(sums["clip_frac"]) == want_clipped
    assert float(sums["tokens"]) == mask.sum()
    # Both terms are one, or the step is just as long as the clip: the gradient is that of either, or half of each.
    equal = [v == o or (clip is not None and abs(abs(v - o) - clip) < 1e-6) for v, o, *_ in cases]
    for got, slope, same in zip(np.asarray(gradient)[0], slopes, equal, strict=False):
        assert same or got == pytest.approx(slope, rel=1e-4, abs=1e-4)
    assert np.isfinite(gradient).all()


def test_explained_variance() -> None:
    returns = [np.array([1.0, 0.0]), np.array([2.0])]
    assert explained_variance(returns, returns) == 1
    assert explained_variance([np.full(2, 0.7), np.full(1, 0.7)], returns) == pytest.approx(0)
    assert explained_variance([np.array([0.0, 2.0]), np.array([-1.0])], returns) < 0
    assert explained_variance([np.zeros(2)], [np.ones(2)]) == 0
