"""Batches of groups: dynamic sampling, and a synchronous source that was interrupted."""

import json
from contextlib import nullcontext

import pytest

from rollout.types import Trajectory
from sqlrl_jax import config_file
from sqlrl_jax.batches import SynchronousBatches, Watch
from sqlrl_jax.config import ConfigError
from sqlrl_jax.data.order import Shuffled, Supply
from sqlrl_jax.stop import Stopped
from tests.unit.test_order import tasks

WATCH = Watch(lambda label, total: nullcontext(lambda done: None), lambda: None)
QUESTIONS, BATCH, SAMPLES = 24, 4, 2


class Fleet:
    """Plays at once. The questions of which `spread` is true have episodes that differ in reward."""

    def __init__(self, spread):
        self.spread, self.asked = spread, []

    def share(self, questions):
        return questions

    def rollout(self, questions, *, samples, seed, version, **_):
        self.asked.append((version, seed, [task.id for task in questions]))
        return [
            Trajectory(
                task.id,
                "test",
                sample,
                [1],
                [2],
                [1],
                [0.0],
                [(version, 0, 1)],
                float(sample == 0 or not self.spread(task.id, version)),
                "correct",
                "solution",
            )
            for task in questions
            for sample in range(samples)
        ]


def source(spread, *settings, limit=QUESTIONS * 4):
    config = config_file.load(
        None,
        [
            f"trainer.train_batch_size={BATCH}",
            f"trainer.policy_mini_batch_size={BATCH}",
            f"generator.n_samples_per_prompt={SAMPLES}",
            *settings,
        ],
    )
    supply = Supply(Shuffled(tasks(QUESTIONS), BATCH, 0), limit)
    fleet = Fleet(spread)
    return SynchronousBatches(config, supply, fleet, WATCH), supply, fleet


def some(task_id, version):
    return (int(task_id[1:]) + version) % 3 == 0


FILTER = "trainer.algorithm.dynamic_sampling.type=filter"


def take(batches, step):
    batch = batches.take(step)
    if batch is not None:
        batches.trained(batch)
    return batch


def names(batch):
    return [group.episodes[0].task_id for group in batch.groups]


def test_without_it_a_batch_is_asked_once_and_taken_as_it_is():
    batches, supply, fleet = source(some, limit=3 * BATCH)
    order = Shuffled(tasks(QUESTIONS), BATCH, 0)
    for step in range(3):
        batch = take(batches, step)
        assert names(batch) == [order.at(BATCH * step + i).id for i in range(BATCH)]
        assert batch.metrics == {}
        assert fleet.asked[step] == (step, step, names(batch))
    assert supply.done
    assert batches.take(3) is None


def test_a_batch_is_full_of_groups_with_spread():
    batches, _, fleet = source(some, FILTER)
    for step in range(4):
        batch = take(batches, step)
        assert len(batch.groups) == BATCH
        assert all(some(name, step) for name in names(batch))
        assert all([e.sample for e in group.episodes] == [0, 1] for group in batch.groups)
        assert batch.metrics["generate/groups_missing"] == 0
        assert batch.metrics["generate/sample_batches"] > 1
    assert len({seed for _, seed, _ in fleet.asked}) == len(fleet.asked)  # a question asked again is played anew


def test_dynamic_sampling_resumed_equals_uninterrupted():
    batches, _, fleet = source(some, FILTER)
    whole = [names(take(batches, step)) for step in range(6)]
    first, supply, _ = source(some, FILTER)
    parts = [names(take(first, step)) for step in range(3)]
    state = json.loads(json.dumps(supply.state))
    second, supply, played = source(some, FILTER)
    supply.restore(state, {task.id: task for task in tasks(QUESTIONS)})
    parts += [names(take(second, step)) for step in range(3, 6)]
    assert parts == whole
    assert played.asked == fleet.asked[-len(played.asked) :]


def test_stopped_in_the_middle_of_a_batch_and_resumed_equals_uninterrupted():
    batches, _, _ = source(some, FILTER)
    whole = [names(take(batches, step)) for step in range(4)]
    first, supply, fleet = source(some, FILTER)
    parts, play = [names(take(first, step)) for step in range(2)], fleet.rollout

    def stop_in_the_second_round(questions, **request):
        if request["seed"] >> 40:
            raise Stopped("SIGINT")
        return play(questions, **request)

    fleet.rollout = stop_in_the_second_round
    with pytest.raises(Stopped):
        first.take(2)
    second, later, _ = source(some, FILTER)
    later.restore(json.loads(json.dumps(supply.state)), {task.id: task for task in tasks(QUESTIONS)})
    parts += [names(take(second, step)) for step in range(2, 4)]
    assert parts == whole


def test_the_limit_fills_the_batch_up_and_says_so():
    batches, supply, fleet = source(
        lambda name, version: name == "q5", FILTER, "trainer.algorithm.dynamic_sampling.max_sample_batches=3"
    )
    found = [take(batches, step) for step in range(2)]  # 12 of 24 questions each
    assert [len(set(names(batch))) for batch in found] == [BATCH, BATCH]
    assert sum("q5" in names(batch) for batch in found) == 1
    assert sorted(batch.metrics["generate/groups_missing"] for batch in found) == [BATCH - 1, BATCH]
    assert sum(len(asked) for _, _, asked in fleet.asked) == QUESTIONS
    assert supply.state == {"next": QUESTIONS, "owed": []}


def test_the_questions_run_out():
    batches, supply, _ = source(lambda name, version: name in ("q1", "q2"), FILTER, limit=QUESTIONS)
    assert take(batches, 0) is None
    assert supply.done


def test_one_sample_a_question_has_no_spread():
    with pytest.raises(ConfigError, match="n_samples_per_prompt = 1"):
        source(some, FILTER, "generator.n_samples_per_prompt=1")
