"""The order of the questions, and that each is used exactly as often as the epochs say."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.errors import UserError
from rollout.types import Task
from sqlrl_jax.data.order import Shuffled, Supply, steps_per_epoch


def tasks(count):
    return [Task(f"q{i}", "test", {}) for i in range(count)]


def ids(handed_out):
    return [task.id for _, task in handed_out]


def places(handed_out):
    return [position for position, _ in handed_out]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3))
def test_an_epoch_uses_each_question_at_most_once(count, batch, seed):
    order = Shuffled(tasks(count), batch, seed)
    assert len(order) == steps_per_epoch(count, batch) * batch
    for epoch in range(2):
        used = [order.at(epoch * len(order) + i).id for i in range(len(order))]
        assert len(used) == len(set(used))


def test_the_order_depends_on_seed_and_epoch():
    orders = [Shuffled(tasks(50), 50, seed) for seed in range(2)]
    assert len({tuple(order.at(50 * epoch + i).id for i in range(50)) for order in orders for epoch in range(2)}) == 4


def test_whole_batches_go_out_epoch_by_epoch():
    order = Shuffled(tasks(11), 4, 0)
    supply, out = Supply(order, 5 * 4), []
    for _ in range(5):
        batch = supply.take(4)
        out += ids(batch)
        supply.used(places(batch))
    assert out == [order.at(i).id for i in range(20)]
    assert supply.done
    assert supply.take(4) == []


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(0, 8), st.integers(1, 9), st.integers(0))
def test_every_position_is_used_once_whatever_happens(batch, spare, batches, seed):
    rng = random.Random(seed)
    questions = tasks(batch + spare)
    order, limit = Shuffled(questions, batch, seed=7), batch * batches
    supply, out, used = Supply(order, limit), {}, set()
    for _ in range(60):
        step = rng.choice(("take", "used", "again", "restart"))
        some = [position for position in out if rng.random() < 0.5]
        if step == "take":
            taken = dict(supply.take(rng.randint(1, 9), repeat := rng.random() < 0.5))
            names = [task.id for task in taken.values()]
            assert len(names) == len(set(names))
            assert repeat or not set(names) & {task.id for task in out.values()}
            assert not taken.keys() & (out.keys() | used)
            assert all(order.at(position) == task for position, task in taken.items())
            out |= taken
        elif step == "used":
            supply.used(some)
            used |= set(some)
        elif step == "again":
            supply.again(some)
        else:  # killed, and gone on with from a checkpoint
            state = json.loads(json.dumps(supply.state))
            supply = Supply(Shuffled(questions, batch, seed=7), limit)
            supply.restore(state, {task.id: task for task in questions})
            some = list(out)
        if step in ("used", "again", "restart"):
            out = {position: task for position, task in out.items() if position not in some}
        assert supply.out == len(out)
    while not supply.done:
        supply.used(out)
        used |= out.keys()
        out = dict(supply.take(batch))
        assert out or supply.done  # never stuck while nothing is out
    assert used == set(range(limit))


def test_what_comes_back_goes_out_first():
    supply = Supply(Shuffled(tasks(20), 4, 0), 20)
    first = supply.take(4)
    supply.again([1, 2])
    assert supply.take(3)[:2] == first[1:3]


def test_a_question_that_is_gone_is_named():
    supply = Supply(Shuffled(tasks(4), 4, 0), 8)
    supply.take(2)
    with pytest.raises(UserError, match=r"still owes question 'q\d'"):
        Supply(Shuffled(tasks(4), 4, 0), 8).restore(supply.state, {})
