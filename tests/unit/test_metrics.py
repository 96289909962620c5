"""Metrics of episodes, and the data order."""

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.types import Trajectory, Turn
from sqlrl_jax.data.order import batch_at, steps_per_epoch
from sqlrl_jax.metrics import eval_metrics, rollout_metrics
from sqlrl_jax.voting import pass_at_k


def episode(task, sample, outcome, statuses=("solution",), source="a"):
    turns = [Turn("", sql="SELECT 1", status=s) for s in statuses]
    reward = float(outcome == "correct")
    return Trajectory(
        task, source, sample, [1], [2, 3, 4], [1, 1, 0], [0.0] * 3, [], reward, outcome, "solution", turns
    )


def test_rollout_metrics():
    m = rollout_metrics(
        [
            episode("q", 0, "correct", ("ok", "solution")),
            episode("q", 1, "wrong", ("error", "solution")),
            episode("r", 0, "malformed", ("timeout", "invalid")),
            episode("r", 1, "wrong"),
        ]
    )
    assert m["reward/avg_raw_reward"] == 0.25
    assert m["reward/avg_pass_at_n"] == m["reward/groups_with_spread"] == 0.5
    assert m["generate/tokens"] == 8
    assert m["generate/looked_first"] == 0.25
    assert (m["sql/queries"], m["sql/error_rate"], m["sql/timeouts"]) == (4, 0.25, 1)
    assert m["outcome/malformed"] == 0.25


def test_eval_metrics_by_source_and_samples():
    m = eval_metrics(
        [
            episode("q", 0, "correct"),
            episode("q", 1, "wrong"),
            episode("r", 0, "wrong", source="b"),
            episode("r", 1, "wrong", source="b"),
        ]
    )
    assert m["eval/all/avg_score"] == 0.25
    assert m["eval/a/avg_score"] == m["eval/all/pass_at_n"] == m["eval/all/pass_at_2"] == 0.5
    assert m["eval/b/avg_score"] == 0.0


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_counts_the_subsets_with_a_success(case):
    n, correct, k = case
    subsets = list(combinations([i < correct for i in range(n)], k))
    assert math.isclose(pass_at_k(correct, n, k), sum(map(any, subsets)) / len(subsets), abs_tol=1e-12)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3))
def test_an_epoch_uses_each_question_at_most_once(tasks, batch, seed):
    per_epoch = steps_per_epoch(tasks, batch)
    if per_epoch == 0:
        return
    for epoch in range(2):
        used = [t for s in range(per_epoch) for t in batch_at(range(tasks), batch, seed, epoch * per_epoch + s)]
        assert len(used) == len(set(used)) == per_epoch * batch


def test_data_order_depends_on_seed_and_epoch():
    orders = {tuple(batch_at(range(50), 50, seed, epoch)) for seed in range(2) for epoch in range(2)}
    assert len(orders) == 4


def test_pass_at_k_all_correct():
    assert pass_at_k(3, 3, 2) == pytest.approx(1.0)
