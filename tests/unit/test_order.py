"""The order of the questions, and that each is used exactly as often as the epochs say."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.errors import UserError
from rollout.types import Task
from sqlrl_jax.data.order import Shuffled, Supply, steps_per_epoch


def tasks(count):
    return [Task(f"q{i}", "test", {}) for i in range(count)]


def ids(handed_out):
    return [task.id for task in handed_out]


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
        batch = ids(supply.take(4))
        out += batch
        supply.used(batch)
    assert out == [order.at(i).id for i in range(20)]
    assert supply.done
    assert supply.take(4) == []


@given(st.data())
def test_every_position_is_used_once_whatever_happens(data):
    count, batch = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    if count < batch:
        return
    questions = tasks(count)
    order = Shuffled(questions, batch, seed=7)
    limit = batch * data.draw(st.integers(1, 9))
    supply, out, used = Supply(order, limit), {}, Counter()
    for _ in range(200):
        step = data.draw(st.sampled_from(("take", "used", "again", "restart")))
        some = [name for name in out if data.draw(st.booleans())]
        if step == "take":
            for task in supply.take(data.draw(st.integers(1, 9))):
                assert task.id not in out  # groups are told apart by their question
                out[task.id] = task
        elif step == "used":
            supply.used(some)
            used.update(some)
        elif step == "again":
            supply.again(some)
        else:  # killed, and gone on with from a checkpoint
            state = json.loads(json.dumps(supply.state))
            supply = Supply(Shuffled(questions, batch, seed=7), limit)
            supply.restore(state, {task.id: task for task in questions})
            some = list(out)
        if step in ("used", "again", "restart"):
            out = {name: task for name, task in out.items() if name not in some}
        assert supply.out == len(out)
    while not supply.done:  # a batch can always be made of what is left
        taken = ids(supply.take(batch))
        assert len(out) + len(taken) >= min(batch, limit - used.total())
        supply.used([*out, *taken])
        used.update([*out, *taken])
        out = {}
    assert used == Counter(order.at(i).id for i in range(limit))


def test_what_comes_back_goes_out_first():
    supply = Supply(Shuffled(tasks(20), 4, 0), 20)
    first = supply.take(4)
    supply.again(ids(first[1:3]))
    assert supply.take(3)[:2] == first[1:3]
    assert supply.place(first[1].id) == 1


def test_a_question_that_is_gone_is_named():
    supply = Supply(Shuffled(tasks(4), 4, 0), 8)
    supply.take(2)
    with pytest.raises(UserError, match=r"still owes question 'q\d'"):
        Supply(Shuffled(tasks(4), 4, 0), 8).restore(supply.state, {})
