"""Batches from a stream that ends groups in any order and loses some: staleness, back-pressure, and the books."""

import random
import threading
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.stream import Finished, Unplayed
from rollout.stub import BridgeError
from rollout.types import Trajectory
from sqlrl_jax import config_file
from sqlrl_jax.answer import Answer
from sqlrl_jax.batches import Watch
from sqlrl_jax.data.order import Shuffled, Supply
from sqlrl_jax.fleet import Fleet, IdleMeter
from sqlrl_jax.stop import Stopped
from sqlrl_jax.streamed import StreamedBatches, staleness
from tests.unit.test_batches import WATCH, names
from tests.unit.test_order import tasks

SAMPLES = 2


def configuration(staleness, batch, *more):
    return config_file.load(
        None,
        [
            f"trainer.max_staleness={staleness}",
            f"trainer.train_batch_size={batch}",
            f"trainer.policy_mini_batch_size={batch}",
            f"generator.n_samples_per_prompt={SAMPLES}",
            *more,
        ],
    )


class Cluster(Fleet):
    """A fleet whose stream ends groups in random order, loses some with their service, and changes weights meanwhile."""

    def __init__(self, rng, losses=0.2):
        self.rng, self.losses = rng, losses
        self.running, self.version, self.recovered, self.most = {}, 0, Counter(), 0

    def stream(self):
        return self

    def begin_batch(self):
        """Nobody comes."""

    def recover(self, lost):
        self.recovered.update({address for address, _, _ in lost})

    # What a GroupStream does.

    def submit(self, questions, *, version, seed):
        for task in questions:
            assert task.id not in self.running
            self.running[task.id] = (task, version)
        self.most = max(self.most, len(self.running))

    def take(self, timeout):
        if not self.running or (timeout == 0 and self.rng.random() < 0.4):
            return None
        name = self.rng.choice(list(self.running))
        task, started = self.running.pop(name)
        if self.rng.random() < self.losses:
            error = BridgeError("here:1", "gone") if self.rng.random() < 0.5 else None
            return Unplayed([task], error)
        first = self.rng.randint(started, self.version)
        spans = [(first, 0, 1)] if first == self.version else [(first, 0, 1), (self.version, 1, 2)]
        return Finished(
            [
                Trajectory(name, "test", s, [1], [2, 3], [1, 1], [0.0] * 2, spans, float(s % 2), "correct", "solution")
                for s in range(SAMPLES)
            ]
        )

    def close(self):
        self.running = {}


def train(batches, supply, cluster, steps, start=0):
    """The questions of each step, the state after it, and what the metrics said."""
    out = []
    for step in range(start, steps):
        batch = batches.take(step)
        assert all(0 <= staleness(group, step) <= batches._config.trainer.max_staleness for group in batch.groups)
        cluster.version = step + 1
        batches.trained(batch)
        out.append((names(batch), supply.state, batch.metrics))
    return out


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 6), st.integers(1, 8), st.integers(0))
def test_every_question_is_trained_on_once_an_epoch_whatever_ends_first(bound, batch, spare, steps, seed):
    rng = random.Random(seed)
    questions = tasks(batch + spare)
    order = Shuffled(questions, batch, 0)
    config = configuration(bound, batch)
    supply, cluster = Supply(order, steps * batch), Cluster(rng)
    batches = StreamedBatches(config, supply, cluster, WATCH)
    done = train(batches, supply, cluster, steps)
    assert all(len(group) == batch for group, _, _ in done)
    assert Counter(name for group, _, _ in done for name in group) == Counter(
        order.at(i).id for i in range(steps * batch)
    )
    assert cluster.most <= (bound + 1) * batch
    assert batches.take(steps) is None

    kept = rng.randrange(steps)  # killed, and gone on with from the checkpoint of an earlier step
    supply = Supply(Shuffled(questions, batch, 0), steps * batch)
    if kept:
        supply.restore(done[kept - 1][1], {task.id: task for task in questions})
    cluster = Cluster(rng)
    cluster.version = kept
    again = train(StreamedBatches(config, supply, cluster, WATCH), supply, cluster, steps, kept)
    trained = [name for group, _, _ in done[:kept] + again for name in group]
    assert Counter(trained) == Counter(order.at(i).id for i in range(steps * batch))


class Meeting:
    """What the processes of a run exchange, here threads."""

    def __init__(self, count):
        self.told, self.barrier = [b""] * count, threading.Barrier(count, timeout=60)

    def exchange(self, index, data):
        self.told[index] = data
        self.barrier.wait()
        all_told = list(self.told)
        self.barrier.wait()  # nobody overwrites what another has yet to read
        return all_told


class Process(Cluster):
    """One of several processes, each with services of its own."""

    def __init__(self, rng, index, meeting):
        super().__init__(rng)
        self.index, self.meeting = index, meeting

    def share(self, questions, turn=0):
        count = len(self.meeting.told)
        return questions[(self.index + turn) % count :: count]

    def agree(self, answer):
        return [Answer.unpack(data) for data in self.meeting.exchange(self.index, answer.pack())]


@pytest.mark.parametrize("bound", [1, 3])
def test_several_processes_make_the_same_batches(bound):
    count, batch, steps, questions = 3, 4, 6, tasks(9)
    meeting, done = Meeting(count), [None] * count
    order = Shuffled(questions, batch, 0)

    def process(index):
        supply = Supply(Shuffled(questions, batch, 0), steps * batch)
        cluster = Process(random.Random(index), index, meeting)
        batches = StreamedBatches(configuration(bound, batch), supply, cluster, WATCH)
        done[index] = train(batches, supply, cluster, steps)

    threads = [threading.Thread(target=process, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert done[0] is not None
    assert done[0] == done[1] == done[2]  # batches, books, metrics
    trained = Counter(name for group, _, _ in done[0] for name in group)
    assert trained == Counter(order.at(i).id for i in range(steps * batch))


def source(bound=1, batch=2, count=8, steps=4, losses=0.0, watch=WATCH, more=()):
    supply = Supply(Shuffled(tasks(count), batch, 0), steps * batch)
    cluster = Cluster(random.Random(0), losses)
    return StreamedBatches(configuration(bound, batch, *more), supply, cluster, watch), supply, cluster


def test_groups_past_the_bound_are_dropped_counted_and_asked_again():
    batches, _, cluster = source()
    first = batches.take(0)
    cluster.version = 2  # two updates meanwhile: what runs and waits is two versions behind
    batches.trained(first)
    old = set(cluster.running) | {group.episodes[0].task_id for group in batches._ready}
    for name, (task, _) in cluster.running.items():
        cluster.running[name] = (task, 0)
    batch = batches.take(2)
    assert batch.metrics["async/staleness_dropped"] > 0
    assert batch.metrics["async/staleness_max"] <= 1
    assert old <= set(cluster.running) | set(names(batch)) | {group.episodes[0].task_id for group in batches._ready}


def test_of_the_groups_that_wait_the_oldest_go_first():
    batches, _, cluster = source(bound=2, batch=2, steps=4)
    batches.trained(batches.take(0))
    cluster.version = 1
    while cluster.running:
        batches._listen()
    for group, version in zip(batches._ready, (1, 0, 1, 0), strict=False):
        for episode in group.episodes:
            episode.spans = [(version, 0, 2)]
    batch = batches.take(1)
    assert [staleness(group, 1) for group in batch.groups] == [1, 1]


def test_the_next_batch_is_asked_when_the_weights_are_live():
    batches, supply, cluster = source(bound=1, batch=2)
    first = batches.take(0)
    assert supply.out == 4  # the batch that is trained on counts
    assert len(cluster.running) + len(batches._ready) == 2
    batches.trained(first)
    assert len(cluster.running) + len(batches._ready) == supply.out == 4
    assert {version for _, version in cluster.running.values()} <= {0, 1}


def test_a_lost_service_is_recovered_and_its_groups_asked_again():
    batches, supply, cluster = source(losses=0.5, steps=8)
    done = train(batches, supply, cluster, 8)
    assert cluster.recovered["here:1"] > 0
    assert Counter(name for group, _, _ in done for name in group) == Counter(t.id for t in tasks(8) for _ in range(2))


def test_groups_without_spread_make_room_at_once():
    batches, supply, _ = source(more=["trainer.algorithm.dynamic_sampling.type=filter"], steps=20)
    spread = {"q1", "q4", "q5"}
    listen = batches._listen

    def only_some_differ():
        listen()
        for group in batches._ready:
            if group.episodes[0].task_id not in spread:
                for episode in group.episodes:
                    episode.reward = 1.0

    batches._listen = only_some_differ
    batch = batches.take(0)
    assert set(names(batch)) < spread
    assert batch.metrics["generate/groups_without_spread"] > 0
    assert supply.out <= 4


def test_a_stop_leaves_the_wait_with_everything_owed():
    def stop():
        raise Stopped("SIGINT")

    batches, supply, _ = source(watch=Watch(WATCH.bar, stop))
    with pytest.raises(Stopped, match="SIGINT"):
        batches.take(0)
    state = supply.state
    assert len(state["owed"]) == state["next"] == 4


def test_idle_shares_are_between_two_looks_at_a_service():
    class Reply:
        def __init__(self, pid, busy):
            self.pid, self.stats = pid, {"busy_seconds": busy}

    meter = IdleMeter()
    assert meter.shares(10.0, {"a": Reply(1, 2.0), "b": Reply(2, 0.0)}) == []
    assert meter.shares(14.0, {"a": Reply(1, 5.0), "b": Reply(3, 1.0)}) == [0.25]  # b was started again
    assert meter.shares(16.0, {"a": Reply(1, 5.0), "b": Reply(3, 3.0)}) == [1.0, 0.0]
