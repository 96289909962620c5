"""The services of a run as its learner sees them, with real processes: its own are started again when they die, those that
come get the weights first, and several learner processes agree on which are there."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import pytest

from rollout.errors import InfrastructureError
from rollout.stub import BridgeError, Stub
from sqlrl_jax import local_services
from sqlrl_jax.config import Config
from sqlrl_jax.fleet import Fleet
from sqlrl_jax.shared_fleet import SharedFleet
from sqlrl_jax.weights import Pusher, PushError
from tests.integration.bridge_helpers import DEADLINE, SAMPLING, Arrays, level, service, tasks, wait_until, weights
from tests.integration.thread_world import worlds
from tests.unit.tiny_model import model_config

pytestmark = pytest.mark.timeout(240)
BATCH = tasks(8)
OWN = """
import sys
from tests.integration import bridge_service
port = sys.argv[sys.argv.index("--port-file") + 1]
sys.argv = ["service", "--port-file", port, "--version", "0", "--delay", "0.01"]
bridge_service.main()
"""


def config_of(services=(), engines=1, **bridge):
    generator = {"services": services, "inference_engine": {"num_engines": engines}}
    return Config.model_validate({"generator": generator, "bridge": {"start_timeout": DEADLINE, **bridge}})


def play(fleet, on_trajectory=lambda trajectory: None):
    episodes = fleet.rollout(
        BATCH, samples=3, sampling=SAMPLING, version=0, seed=5, max_turns=5, on_trajectory=on_trajectory
    )
    assert [(e.task_id, e.sample) for e in episodes] == [(task.id, s) for task in BATCH for s in range(3)]
    return [e.response_ids for e in episodes]


def pid_at(address):
    with Stub(address) as stub:
        return stub.status().pid


def kill(address):
    os.kill(pid_at(address), signal.SIGKILL)


class Run:
    """A fleet that keeps what is said and how often weights were pushed to how many services."""

    def __init__(self, make):
        self.said, self.pushed = [], []
        self.fleet = make(self.said.append)
        self.fleet.republish = lambda: self.pushed.append(len(self.fleet.client.addresses))


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Makes a run with services of its own; the small ones of these tests in place of launch.py."""
    launch = tmp_path / "launch.py"
    launch.write_text(OWN)
    monkeypatch.setattr(local_services, "LAUNCH", launch)
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    with ExitStack() as stack:

        def start(**options):
            run = Run(lambda say: Fleet(config_of(**options), tmp_path / "config.yaml", tmp_path / "s.log", say))
            stack.callback(run.fleet.close)
            return run

        yield start


def once(act):
    """Acts when the first episode comes."""
    acted = []

    def on_trajectory(trajectory):
        if not acted:
            acted.append(trajectory)
            act()

    return on_trajectory


def test_one_of_its_own_dies_and_is_back_for_a_later_batch(own):
    run = own(engines=2)
    expected, [victim, other] = play(run.fleet), run.fleet.client.addresses
    assert play(run.fleet, once(lambda: kill(victim))) == expected
    assert run.fleet.client.addresses == [other]
    assert any(f"{victim} is lost" in line and "starting it again" in line for line in run.said)
    assert run.pushed == []  # nobody waited for it

    def is_back():
        run.fleet.look()
        return len(run.fleet.client.addresses) == 2

    wait_until(is_back, "the service to be started again")
    assert run.pushed == [2]
    assert play(run.fleet) == expected
    assert sum(line.endswith("joins") for line in run.said) == 1


def test_its_only_one_dies_and_is_waited_for(own):
    run = own()
    expected, [victim] = play(run.fleet), run.fleet.client.addresses
    assert play(run.fleet, once(lambda: kill(victim))) == expected
    assert run.pushed == [1]
    assert victim not in run.fleet.client.addresses
    assert "is back with the present weights" in run.said[-1]


def test_one_that_dies_again_and_again_ends_the_run(own):
    run = own(max_restarts=1)

    def die(trajectory):
        with suppress(BridgeError):  # it is dead already; this one came before
            kill(run.fleet.client.addresses[0])

    with pytest.raises(InfrastructureError, match=r"lost 2 times .* \(bridge\.max_restarts = 1, services: 1\)"):
        play(run.fleet, die)


def test_close_does_not_leave_one_that_is_being_started(own):
    run = own()
    [address] = run.fleet.client.addresses
    pid = pid_at(address)
    os.kill(pid, signal.SIGKILL)
    run.fleet.lose(address, BridgeError(address, "killed"))
    run.fleet.close()
    [process] = run.fleet._local._processes.values()
    assert not process.alive()


@pytest.fixture
def shared(tmp_path):
    """Two learner processes, threads here, and three services that are started elsewhere."""
    services = [service(tmp_path / str(i), "--version", "0", "--delay", "0.01") for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        addresses = list(pool.map(lambda process: process.start(), services))
    config = config_of(services=addresses)
    with ThreadPoolExecutor(2) as both, ExitStack() as stack:

        def make(world):
            return Run(lambda say: SharedFleet(world, config, tmp_path / "c.yaml", tmp_path / "s.log", say))

        runs = list(both.map(make, worlds(2)))
        for run in runs:
            stack.callback(run.fleet.close)
        for process in services:
            stack.callback(process.stop, 0.2)
        yield runs, services, lambda work: list(both.map(work, runs))


def test_processes_agree_on_who_is_there(shared):
    runs, services, in_both = shared
    expected, other = in_both(lambda run: play(run.fleet))
    assert expected == other
    assert [run.fleet.client.players for run in runs] == [
        [services[0].address, services[2].address],
        [services[1].address],
    ]
    victim = services[1].address
    lock = threading.Lock()
    killed = []

    def die(trajectory):
        with lock:
            if not killed:
                killed.append(victim)
                kill(victim)

    assert in_both(lambda run: play(run.fleet, die)) == [expected, expected]
    assert [run.fleet.client.addresses for run in runs] == [[services[0].address, services[2].address]] * 2
    assert in_both(lambda run: play(run.fleet)) == [expected, expected]
    assert [run.fleet.client.players for run in runs] == [[services[0].address], [services[2].address]]
    assert [run.pushed for run in runs] == [[], []]
    services[1]._command += ["--listen", victim]
    assert services[1].restart() == victim  # by whoever started it
    # Process 0 says who is there: two that looked for themselves could find different ones, and divide a batch differently.
    runs[1].fleet.client.members.look = lambda **how: pytest.fail("process 0 looks for all")
    assert in_both(lambda run: play(run.fleet)) == [expected, expected]
    assert [run.fleet.client.addresses for run in runs] == [[services[i].address for i in (0, 2, 1)]] * 2
    assert [run.pushed for run in runs] == [[3], [3]]


def test_processes_wait_together_when_none_is_left(shared):
    runs, services, in_both = shared
    expected, _ = in_both(lambda run: play(run.fleet))
    comes_back = threading.Event()

    def die(trajectory):
        if not comes_back.is_set():
            comes_back.set()
            for process in services:
                kill(process.address)
            services[2]._command += ["--listen", services[2].address]
            threading.Thread(target=services[2].restart).start()

    assert in_both(lambda run: play(run.fleet, die)) == [expected, expected]
    assert [run.fleet.client.addresses for run in runs] == [[services[2].address]] * 2
    assert [run.pushed for run in runs] == [[1], [1]]


def test_one_that_stops_in_good_order_is_left_by_all_processes(shared):
    """It finishes its part, so nobody has lost anything; the next batch goes to the others."""
    runs, services, in_both = shared
    expected, _ = in_both(lambda run: play(run.fleet))
    leaving = services[1]

    def stop(trajectory):
        if leaving.alive() and not in_time.is_set():
            in_time.set()
            os.kill(leaving.pid, signal.SIGTERM)

    in_time = threading.Event()
    assert in_both(lambda run: play(run.fleet, stop)) == [expected, expected]
    for _ in range(2):
        assert in_both(lambda run: play(run.fleet)) == [expected, expected]
        assert [run.fleet.client.addresses for run in runs] == [[services[0].address, services[2].address]] * 2
    assert [run.pushed for run in runs] == [[], []]
    assert not any("is lost" in line for run in runs for line in run.said)


def test_one_that_was_away_while_weights_were_pushed_gets_the_present_ones(tmp_path):
    """The pushes of a run go on without a dead service, by differences too; when it is back it gets everything."""
    services = [service(tmp_path / str(i), "--delay", "0.01") for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        addresses = list(pool.map(lambda process: process.start(), services))
    run = Run(lambda say: Fleet(config_of(services=addresses), tmp_path / "c.yaml", tmp_path / "s.log", say))
    pusher = Pusher(run.fleet.client, model_config(300), "float32", run_id="run", epoch=1, timeout=DEADLINE)
    now = {"version": 0, "arrays": weights(0)}

    def push():  # as the trainer does
        while True:
            try:
                return pusher.push_weights(Arrays(now["arrays"]), now["version"])
            except PushError as error:
                run.fleet.bring_back(error.address, error)

    def step(change):
        now["version"] += 1
        now["arrays"] = [array.copy() for array in now["arrays"]]
        now["arrays"][0][0, 0] += change
        return push()

    def episodes():
        played = run.fleet.rollout(
            BATCH,
            samples=1,
            sampling=SAMPLING,
            version=now["version"],
            seed=0,
            max_turns=5,
            on_trajectory=lambda trajectory: None,
        )
        assert {version for e in played for version, _, _ in e.spans} == {now["version"]}
        assert [e.logprobs[0] for e in played] == pytest.approx([level(now["arrays"])] * len(played), rel=1e-5)

    run.fleet.republish = push
    try:
        push()
        episodes()
        kill(addresses[1])
        assert step(1.0)["bridge/services"] == 2
        assert step(2.0)["bridge/services"] == 2
        episodes()
        services[1]._command += ["--listen", addresses[1]]
        services[1].restart()
        episodes()
        assert len(run.fleet.client.addresses) == 3
        with Stub(addresses[1]) as stub:
            assert stub.status().stats["generated_tokens"] > 0
        assert step(3.0)["bridge/services"] == 3
        episodes()
    finally:
        run.fleet.close()
        for process in services:
            process.stop(grace=0.2)
