"""Several services behind one client, real processes all: they die, hang, stop, join, lag behind and lose their network, and
every episode of a batch comes exactly once, the same whoever played it, of the weights that were asked for."""

import os
import re
import signal
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from rollout.client import RolloutClient
from rollout.stub import BridgeError, Stub
from rollout.supervisor import ServiceProcess
from tests.integration.bridge_helpers import DEADLINE, SAMPLING, key, push, service, tasks, wait_until, weights
from tests.integration.tcp_relay import Relay

pytestmark = pytest.mark.timeout(240)
BATCH = tasks(9)
VERSION = 4


class Services:
    """Three services with the same weights."""

    def __init__(self, folder, count):
        self.processes: list[ServiceProcess] = []
        self.folder = folder
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(lambda _: self.start(), range(count)))

    def start(self, *options: str, version: int = VERSION) -> ServiceProcess:
        process = service(self.folder / uuid.uuid4().hex, "--delay", "0.02", *options)
        self.processes.append(process)
        process.start()
        give(process, version)
        return process

    @property
    def addresses(self) -> list[str]:
        return [process.address for process in self.processes]

    def stop(self) -> None:
        for process in self.processes:
            process.stop(grace=0.2)


def give(process, version):
    with Stub(process.address) as stub:
        push(stub, key(version), weights(version))


def client_of(addresses, **options):
    client = RolloutClient(addresses, **options)
    client.identify("run", 1)
    return client


def play(client, batch=BATCH, samples=4, **options):
    return client.rollout(batch, samples, SAMPLING, **{"version": VERSION, "seed": 3, "max_turns": 5, **options})


def ids(episodes):
    return [(e.task_id, e.sample, e.response_ids, e.spans) for e in episodes]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The batch as one undisturbed service plays it."""
    services = Services(tmp_path_factory.mktemp("quiet"), 1)
    client = client_of(services.addresses)
    try:
        return ids(play(client))
    finally:
        client.close()
        services.stop()


@pytest.fixture
def three(tmp_path):
    services = Services(tmp_path, 3)
    yield services
    services.stop()


class Watch:
    """Does something after the fifth episode; notes what comes and who is lost."""

    def __init__(self, act):
        self.act, self.seen, self.lost = act, [], {}

    def on_trajectory(self, trajectory):
        self.seen.append((trajectory.task_id, trajectory.sample))
        if len(self.seen) == 5:
            self.act()

    def on_lost(self, address, error):
        self.lost[address] = error

    def play(self, client, expected):
        episodes = play(client, on_trajectory=self.on_trajectory, on_lost=self.on_lost)
        assert ids(episodes) == expected
        assert sorted(self.seen) == sorted((t, s) for t, s, *_ in expected), "nothing lost, nothing doubled"


def test_the_others_play_what_a_dead_one_held(three, expected):
    client = client_of(three.addresses)
    victim = three.processes[1]
    watch = Watch(lambda: os.kill(victim.pid, signal.SIGKILL))
    watch.play(client, expected)
    assert list(watch.lost) == [victim.address]
    assert client.addresses == [three.addresses[0], three.addresses[2]]
    assert (client.lost, client.duplicates) == (1, 0)
    assert ids(play(client)) == expected  # the next batch does without
    client.close()


def test_only_what_is_missing_is_asked_for_again(tmp_path):
    """Of a group of which one sample has come the other one alone is played again."""
    services = Services(tmp_path, 1)
    stuck = services.start("--stuck-from", "1")
    client = client_of([stuck.address, services.addresses[0]])
    watch = Watch(lambda: None)

    def first(trajectory):
        watch.seen.append((trajectory.task_id, trajectory.sample))
        if trajectory.task_id == "q0":
            os.kill(stuck.pid, signal.SIGKILL)

    assert len(play(client, tasks(1), samples=2, on_trajectory=first)) == 2
    with Stub(services.addresses[0]) as stub:
        assert stub.status().stats["generated_tokens"] == 8  # one episode of two turns
    client.close()
    services.stop()


def test_a_hung_one_is_noticed_and_replaced(three, expected):
    client = client_of(three.addresses, silence_timeout=4.0)
    victim = three.processes[0]
    watch = Watch(lambda: os.kill(victim.pid, signal.SIGSTOP))
    watch.play(client, expected)
    assert "silent" in str(watch.lost[victim.address])
    os.kill(victim.pid, signal.SIGCONT)
    wait_until(client.members.look, "the one that hung")  # it has the weights still, so it plays again
    assert len(client.addresses) == 3
    assert ids(play(client)) == expected
    client.close()


def test_one_that_is_told_to_stop_hands_back_what_it_cannot_finish(tmp_path, expected):
    services = Services(tmp_path, 2)
    stopping = services.start("--drain-timeout", "1", "--stuck-from", "6")  # half of its part never ends
    client = client_of(services.addresses)
    watch = Watch(lambda: os.kill(stopping.pid, signal.SIGTERM))
    watch.play(client, expected)
    assert watch.lost[stopping.address].stopping
    handed_back = re.search(
        r"this service is stopping: it hands back (\d+) episodes", str(watch.lost[stopping.address])
    )
    assert int(handed_back[1]) >= 6, "those that never end; on a busy machine others do not end in time"
    assert (client.lost, client.handed_back, client.duplicates) == (0, 1, 0)
    client.close()
    services.stop()


def test_one_that_is_told_to_stop_finishes_what_it_can(tmp_path, expected):
    services = Services(tmp_path, 1)
    stopping = services.start("--delay", "0.1")
    client = client_of(services.addresses)
    watch = Watch(lambda: os.kill(stopping.pid, signal.SIGTERM))
    with Stub(stopping.address) as stub:
        states = []
        watch.act = lambda: (
            os.kill(stopping.pid, signal.SIGTERM),
            wait_until(lambda: stub.status().stopping, "the service to stop"),
            states.append((stub.healthy(DEADLINE), str(stub.trouble(DEADLINE)))),
        )
        watch.play(client, expected)
    assert not watch.lost
    assert states == [(False, f"rollout service {stopping.address} is stopping")]
    assert client.playing == client.stubs[:1]
    watch = Watch(lambda: None)
    watch.play(client, expected)  # does not even try it
    assert not watch.lost
    client.close()
    services.stop()


def test_one_that_joins_gets_weights_and_then_episodes(tmp_path, expected):
    """Behind a name: what it stands for changes while the run goes on."""
    services = Services(tmp_path, 1)
    named = list(services.addresses)
    client = client_of(["dns:///rollout.test:8700"], lookup=lambda name, port: named if name == "rollout.test" else [])
    assert ids(play(client)) == expected
    late = services.start(version=VERSION - 1)
    named.append(late.address)
    assert client.members.look() == [late.address]
    give(late, VERSION)
    assert ids(play(client)) == expected
    with Stub(late.address) as stub:
        assert stub.status().stats["generated_tokens"] == 4 * 4 * 8  # every second question, two turns of 4 tokens each
    os.kill(services.processes[0].pid, signal.SIGKILL)
    named.remove(services.addresses[0])
    assert ids(play(client)) == expected
    assert client.members.look() == []
    assert client.members.away == []  # gone, and its name too
    client.close()
    services.stop()


def test_one_with_other_weights_plays_nothing(three, expected):
    give(three.processes[2], VERSION + 1)
    client = client_of(three.addresses)
    watch = Watch(lambda: None)
    watch.play(client, expected)
    assert "is not live: this service generates with version 5" in str(watch.lost[three.addresses[2]])
    client.close()


def test_weights_that_change_under_an_episode_do_not_pass(tmp_path, expected):
    """Only another learner could do that. What it touched is asked for again, and refused then."""
    services = Services(tmp_path, 1)
    touched = services.start("--delay", "0.15")  # it plays long enough
    client = client_of(services.addresses)
    watch = Watch(lambda: give(touched, VERSION + 1))
    watch.play(client, expected)
    assert client.retried > 0
    client.close()
    services.stop()


def test_a_cut_network_is_survived_and_mended(three, expected):
    relay = Relay(three.addresses[1])
    client = client_of([three.addresses[0], relay.address, three.addresses[2]])
    watch = Watch(relay.cut)
    watch.play(client, expected)
    assert list(watch.lost) == [relay.address]
    with Stub(three.addresses[1]) as stub:  # it has forgotten whom it played for
        wait_until(lambda: stub.status().stats["open_sessions"] == 0, "the episodes to end")
    relay.mend()
    wait_until(client.members.look, "the network")
    assert ids(play(client)) == expected
    assert client.lost == 1
    client.close()
    relay.close()


def test_with_nobody_left_somebody_is_brought_back(three, expected):
    client = client_of(three.addresses)
    revived = []

    def revive(error):
        revived.append(str(error))
        for process in three.processes:
            old = process.address
            process.restart()
            give(process, VERSION)
            client.members.replace(process.address, old)
        client.members.wait(60.0, for_all=True)

    def kill_all(trajectory):
        if not revived:
            for process in three.processes:
                if process.alive():
                    os.kill(process.pid, signal.SIGKILL)

    assert ids(play(client, on_trajectory=kill_all, revive=revive)) == expected
    assert len(revived) == 1
    client.close()


def test_nobody_there_is_an_error_that_says_so(tmp_path):
    client = client_of(["127.0.0.1:9", "127.0.0.1:10"])
    with pytest.raises(BridgeError, match=r"no rollout service answered within 0 s; is one running\? .*127\.0\.0\.1:9"):
        client.wait_ready(0.2)
    with pytest.raises(BridgeError, match="no rollout service is there"):
        play(client)
    client.close()
    unknown = client_of(["dns:///nowhere.test:8700"], lookup=lambda name, port: [])
    with pytest.raises(BridgeError, match=r"dns:///nowhere\.test:8700 stands for no address"):
        unknown.wait_ready(0.2)
    unknown.close()


def test_one_that_does_not_come_is_not_waited_for_long(tmp_path):
    services = Services(tmp_path, 1)
    client = client_of([*services.addresses, "127.0.0.1:9"])
    started = time.monotonic()
    assert client.wait_ready(1.0) == ["127.0.0.1:9"]
    assert time.monotonic() - started >= 1.0
    assert client.addresses == services.addresses
    client.close()
    services.stop()
