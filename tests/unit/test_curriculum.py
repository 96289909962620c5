"""Questions by difficulty: each once an epoch, sorted by what was measured, the same after a resume."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.errors import UserError
from rollout.types import Task, Trajectory
from sqlrl_jax.data.curriculum import (
    ByDifficulty,
    Difficulty,
    counts_of,
    go_on,
    pass_rates,
    question_order,
    sorted_places,
)

DIFFICULTIES: tuple[Difficulty, ...] = ("learnable_first", "easy_first")


def questions(count: int) -> list[Task]:
    return [Task(f"q{i}", "ab"[i % 2], {}) for i in range(count)]


def episode(task: str, sample: int, outcome: str) -> Trajectory:
    return Trajectory(task, "a", sample, [1], [2], [1], [0.0], [], 0.0, outcome, "solution")


def group(task: Task, right: int, samples: int = 4) -> list[Trajectory]:
    return [episode(task.id, i, "correct" if i < right else "wrong") for i in range(samples)]


def play(order: ByDifficulty, batch: int, first: int, last: int) -> list[list[str]]:
    """Batches of a run whose answers hang on question and epoch, as a model's would."""
    asked = []
    for step in range(first, last):
        tasks = [order.at(position) for position in range(step * batch, (step + 1) * batch)]
        for task in tasks:
            order.tell(group(task, (3 * int(task.id[1:]) + step * batch // len(order)) % 5))
        asked.append([task.id for task in tasks])
    return asked


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 3), st.sampled_from(DIFFICULTIES))
def test_an_epoch_asks_each_question_at_most_once(tasks, batch, seed, difficulty):
    order = ByDifficulty(questions(tasks), batch, seed, difficulty)
    per_epoch = tasks // batch
    assert len(order) == per_epoch * batch
    for epoch in range(3 if per_epoch else 0):
        asked = [name for names in play(order, batch, epoch * per_epoch, (epoch + 1) * per_epoch) for name in names]
        assert len(asked) == len(set(asked)) == len(order)


def test_easy_and_learnable_questions_come_first():
    rates = {"q0": 1.0, "q1": 0.0, "q2": 0.5, "q3": 0.75, "q4": 0.125}
    tasks = questions(5)
    names = {d: [tasks[i].id for i in sorted_places(tasks, 0, 1, d, rates)] for d in DIFFICULTIES}
    assert names["easy_first"] == ["q0", "q3", "q2", "q4", "q1"]
    assert names["learnable_first"][:3] == ["q2", "q3", "q4"]


def test_an_epoch_is_sorted_by_what_the_one_before_measured():
    tasks = questions(4)
    order = ByDifficulty(tasks, 2, 0, "easy_first")
    for task, right in zip(tasks, (0, 4, 2, 3), strict=True):  # the first epoch
        order.at(0)
        order.tell(group(task, right))
    assert [order.at(position).id for position in range(4, 8)] == ["q1", "q3", "q2", "q0"]
    order.tell(group(tasks[0], 4))  # too late for this epoch, in time for the next
    assert [order.at(position).id for position in range(4, 8)] == ["q1", "q3", "q2", "q0"]
    assert {order.at(position).id for position in (8, 9)} == {"q0", "q1"}


def test_equal_rates_stay_shuffled():
    tasks = questions(20)
    orders = {
        tuple(sorted_places(tasks, seed, epoch, "easy_first", pass_rates(tasks, {})))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_a_question_that_was_not_asked_is_judged_by_its_source():
    rates = pass_rates([*questions(4), Task("q9", "new", {})], {"q0": (3, 4), "q1": (0, 4), "q3": (2, 4)})
    assert rates == {"q0": 0.75, "q1": 0.0, "q2": 0.75, "q3": 0.5, "q9": pytest.approx(1.25 / 3)}


def test_failures_of_infrastructure_are_not_counted():
    played = [episode("x", 0, "correct"), episode("x", 1, "wrong"), episode("x", 2, "infrastructure")]
    assert counts_of([*played, episode("y", 0, "infrastructure")]) == {"x": (1, 2)}


@pytest.mark.parametrize("cut", [1, 3, 4, 7])
def test_a_resumed_run_asks_the_same_questions(cut):
    tasks, batch, steps = questions(13), 4, 12
    order = ByDifficulty(tasks, batch, 0, "learnable_first")
    expected = play(order, batch, 0, steps)
    assert expected[3:] != play(ByDifficulty(tasks, batch, 1, "learnable_first"), batch, 0, steps)[3:]
    stopped = ByDifficulty(tasks, batch, 0, "learnable_first")
    play(stopped, batch, 0, cut)
    saved = json.loads(json.dumps(stopped.state))
    play(stopped, batch, cut, steps)  # steps that are lost
    resumed = ByDifficulty(tasks, batch, 0, "learnable_first")
    resumed.restore(saved)
    assert play(resumed, batch, cut, steps) == expected[cut:]


def test_another_order_is_refused_in_the_middle_of_a_run():
    tasks = questions(8)
    saved = json.loads(json.dumps(question_order(tasks, 4, 0, "easy_first").state))
    go_on(question_order(tasks, 4, 0, "easy_first"), saved)
    go_on(question_order(tasks, 4, 0, "shuffled"), None)  # a checkpoint from before there were several
    for state, kind in ((saved, "shuffled"), (None, "easy_first")):
        with pytest.raises(UserError, match=r"data\.order = .*, but this run began with"):
            go_on(question_order(tasks, 4, 0, kind), state)
