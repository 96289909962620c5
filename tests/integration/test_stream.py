"""A stream of groups over the real bridge: weights change under it, services fail, and every question comes back once."""

import os
import signal
import time

import pytest
from bridge_helpers import DEADLINE, SAMPLING, key, push, service, tasks, wait_until, weights

from rollout.client import RolloutClient
from rollout.stream import Finished, GroupStream
from rollout.stub import BridgeError, Stub

SAMPLES = 3


@pytest.fixture
def start(tmp_path):
    running = []

    def run(*options):
        process = service(tmp_path / str(len(running)), *options)
        running.append(process)
        process.start()
        return process

    yield run
    for process in running:
        process.stop(grace=2.0)


def stream_of(client):
    return GroupStream(client, SAMPLING, n_samples=SAMPLES, max_turns=5)


def everything(stream):
    """What comes back until nothing is in flight."""
    deadline, back = time.monotonic() + DEADLINE, []
    while stream.in_flight:
        assert time.monotonic() < deadline
        event = stream.take(0.5)
        if event is not None:
            back.append(event)
    return back


def names(events):
    return sorted(e.episodes[0].task_id if isinstance(e, Finished) else e.tasks[0].id for e in events)


def test_groups_come_back_whole_while_weights_change(start):
    process = start("--delay", "0.05")
    with Stub(process.address) as pusher:
        push(pusher, key(3), weights(3))
        client = RolloutClient([process.address])
        client.identify("run", 1)
        stream = stream_of(client)
        stream.submit(tasks(2), version=3, seed=1)
        first = stream.take(DEADLINE)
        push(pusher, key(4), weights(4))
        stream.submit([task for task in tasks(6)[2:]], version=3, seed=2)  # asked before it knew of the push
        back = [first, *everything(stream)]
        assert names(back) == [task.id for task in tasks(6)]
        assert all([e.sample for e in event.episodes] == list(range(SAMPLES)) for event in back)
        versions = {version for event in back for e in event.episodes for version, _, _ in e.spans}
        assert versions == {3, 4}
        stream.submit(tasks(1), version=5, seed=3)  # which nobody has
        (refused,) = everything(stream)
        assert "version 5 of run 'run', start 1 is not live" in str(refused.error)
        stream.close()
        client.close()


def test_groups_of_a_service_that_dies_come_back_unplayed(start):
    victim, other = start("--version", "0", "--stuck-from", "2"), start("--version", "0")
    client = RolloutClient([victim.address, other.address])
    stream = stream_of(client)
    stream.submit(tasks(4), version=0, seed=1)
    back = [stream.take(DEADLINE), stream.take(DEADLINE)]  # the other's, whose share is half
    assert all(isinstance(event, Finished) for event in back)
    os.kill(victim.pid, signal.SIGKILL)
    (lost,) = everything(stream)
    assert lost.error.address == victim.address
    assert sorted([task.id for task in lost.tasks] + names(back)) == [task.id for task in tasks(4)]
    stream.close()
    client.close()


def test_a_service_that_is_told_to_stop_says_so_and_hands_back_what_is_left(start):
    process = start("--version", "0", "--drain-timeout", "1", "--stuck-from", "3")
    client = RolloutClient([process.address], retries=0)
    stream = stream_of(client)
    stream.submit(tasks(3), version=0, seed=1)
    first = stream.take(DEADLINE)
    os.kill(process.pid, signal.SIGTERM)
    notice, left = everything(stream)
    assert (notice.tasks, notice.error.stopping) == ([], True)
    assert left.error.stopping
    assert sorted(names([first]) + [task.id for task in left.tasks]) == [task.id for task in tasks(3)]
    stream.close()
    client.close()


def test_one_that_stops_plays_on_while_the_learner_looks_for_others(start):
    stopping, other = start("--version", "0", "--delay", "0.2"), start("--version", "0")
    client = RolloutClient([stopping.address, other.address], retries=0)
    stream = stream_of(client)
    stream.submit(tasks(4), version=0, seed=1)
    with Stub(stopping.address) as stub:
        wait_until(lambda: stub.status().active_requests, "the episodes to begin")
        os.kill(stopping.pid, signal.SIGTERM)
        wait_until(lambda: stub.status().stopping, "the service to stop")
    client.members.leave(stopping.address)  # what a fleet does that is told
    assert client.members.look() == []
    back = everything(stream)
    assert names([event for event in back if isinstance(event, Finished)]) == [task.id for task in tasks(4)]
    stream.close()
    client.close()


def test_a_frozen_service_is_noticed_while_another_is_busy(start):
    frozen, other = start("--version", "0", "--stuck-from", "0"), start("--version", "0", "--delay", "0.01")
    client = RolloutClient([frozen.address, other.address], silence_timeout=3.0)
    stream = stream_of(client)
    stream.submit(tasks(2), version=0, seed=1)
    os.kill(frozen.pid, signal.SIGSTOP)
    back = everything(stream)
    assert [event.error.address for event in back if not isinstance(event, Finished)] == [frozen.address]
    assert "silent" in next(str(event.error) for event in back if not isinstance(event, Finished))
    stream.close()
    client.close()


def test_a_group_with_a_failed_episode_is_asked_again_and_then_given_up(start):
    process = start("--version", "0")
    client = RolloutClient([process.address], retries=1)
    stream = stream_of(client)
    task = tasks(1, failures=SAMPLES + 1)
    stream.submit(task, version=0, seed=1)
    (failed,) = everything(stream)
    assert (failed.tasks, failed.error) == (task, None)
    stream.submit(task, version=0, seed=2)
    with pytest.raises(BridgeError, match=r"'q0' failed 2 times.*no database for q0") as caught:
        everything(stream)
    assert not caught.value.transient
    stream.submit(task, version=0, seed=3)
    assert names(everything(stream)) == ["q0"]
    stream.close()
    client.close()


def test_closing_ends_what_runs(start):
    process = start("--version", "0", "--stuck-from", "0")
    client = RolloutClient([process.address])
    stream = stream_of(client)
    stream.submit(tasks(2), version=0, seed=1)
    deadline = time.monotonic() + DEADLINE
    while client.stubs[0].status().active_requests == 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    stream.close()
    assert (stream.in_flight, stream.take(0.1)) == (0, None)
    while client.stubs[0].status().active_requests:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    client.close()
