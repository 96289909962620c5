"""Metrics of episodes."""

import pytest

from rollout.types import Trajectory, Turn
from sqlrl_jax.eval_table import set_rows, sets_of
from sqlrl_jax.metrics import eval_metrics, rollout_metrics
from sqlrl_jax.voting import wilson


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


def test_lengths_of_episodes_that_earned_something_and_that_did_not():
    episodes = [episode("q", n, "correct" if n == 0 else "wrong") for n in range(3)]
    for played, length in zip(episodes, (1, 4, 7), strict=True):
        played.loss_mask = [1, 0] * length
    m = rollout_metrics(episodes)
    names = ("min_num_tokens", "avg_num_tokens", "max_num_tokens", "std_num_tokens")
    assert [m[f"generate/{name}"] for name in names] == [1, 4, 7, pytest.approx(6**0.5)]
    assert (m["generate/avg_tokens_non_zero_rewards"], m["generate/avg_tokens_zero_rewards"]) == (1, 5.5)
    assert rollout_metrics(episodes[:1])["generate/avg_tokens_zero_rewards"] == 0


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
    assert m["eval/mean_over_sets"] == 0.25
    assert m["eval/all/ci_low"] < 0.25 < m["eval/all/ci_high"]


def test_eval_metrics_of_one_sample_are_a_plain_share():
    m = eval_metrics([episode(f"q{i}", 0, "correct" if i < 30 else "wrong") for i in range(100)])
    assert (m["eval/all/ci_low"], m["eval/all/ci_high"]) == wilson(0.3, 100)
    assert m["eval/all/stderr"] == pytest.approx((0.3 * 0.7 / 100) ** 0.5)
    assert "eval/all/pass_at_1" not in m
    assert "eval/all/maj_at_n" not in m


def test_the_mean_over_sets_gives_small_sets_the_same_weight():
    small = [episode("s", 0, "correct", source="small")]
    large = [episode(f"l{i}", 0, "wrong", source="large") for i in range(9)]
    m = eval_metrics(small + large)
    assert (m["eval/all/avg_score"], m["eval/mean_over_sets"]) == (0.1, 0.5)


def test_a_set_may_be_called_all():
    m = eval_metrics([episode("q", 0, "correct", source="all"), episode("r", 0, "wrong", source="b")])
    assert (m["eval/all/avg_score"], m["eval/all (set)/avg_score"], m["eval/b/avg_score"]) == (0.5, 1.0, 0.0)
    assert sets_of(m) == ["all (set)", "b"]
    _, rows = set_rows(eval_metrics([episode("q", i, "correct", source="all") for i in range(2)]))
    assert [row[0] for row in rows] == ["all (set)"]


def test_failures_of_infrastructure_are_left_out():
    m = eval_metrics([episode("q", 0, "correct"), episode("r", 0, "infrastructure")])
    assert (m["eval/questions"], m["eval/all/avg_score"]) == (1.0, 1.0)
    assert eval_metrics([episode("r", 0, "infrastructure")]) == {"eval/questions": 0.0}


def voted(outcomes_and_answers):
    out = []
    for sample, (outcome, answer) in enumerate(outcomes_and_answers):
        out.append(episode("q", sample, outcome))
        out[-1].turns[-1].answer = answer
    return eval_metrics(list(reversed(out)))["eval/all/maj_at_n"]  # the order of arrival does not matter


def test_majority_voting():
    assert voted([("wrong", "x"), ("correct", "y"), ("correct", "y")]) == 1.0
    assert voted([("wrong", "x"), ("correct", "y")]) == 0.0  # a tie goes to the earlier sample
    assert voted([("sql_error", ""), ("malformed", ""), ("correct", "y")]) == 1.0
    assert voted([("sql_error", ""), ("malformed", "")]) == 0.0


def test_no_vote_where_answers_are_not_told():
    assert "eval/all/maj_at_n" not in eval_metrics([episode("q", 0, "correct"), episode("q", 1, "wrong")])


def test_gradings_besides_the_reward():
    right, wrong, silent, uncovered, unanswered = (episode(name, 0, "wrong") for name in "abcde")
    right.metrics, wrong.metrics = ({"sql/queries": 1.0, "grade/bird_set": grade} for grade in (1.0, 0.0))
    silent.turns = []  # a prompt that was too long: not passed
    uncovered.metrics = unanswered.metrics = {"sql/queries": 1.0}  # can't be graded, whatever the model did
    unanswered.turns = []
    m = eval_metrics([right, wrong, silent, uncovered, unanswered])
    assert m["eval/all/grade/bird_set"] == pytest.approx(1 / 3)
    assert m["eval/all/graded/bird_set"] == 3.0
