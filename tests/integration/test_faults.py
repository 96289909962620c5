"""Everything that can break between learner and services, with real processes: nothing is lost, doubled or mixed."""

import os
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
from bridge_helpers import (
    DEADLINE,
    ROOT,
    SAMPLING,
    begin,
    commit,
    key,
    level,
    missing_frames,
    push,
    service,
    tasks,
    through_grpc,
    wait_until,
    weights,
)

from rollout import bridge_pb2 as pb
from rollout import frames
from rollout.channel import METHODS, grpc
from rollout.client import RolloutClient
from rollout.stub import BridgeError, Stub, explain
from rollout.supervisor import ServiceError, ServiceProcess

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def start(tmp_path):
    """Starts services; all are stopped at the end."""
    running: list[ServiceProcess] = []

    def run(*options: str) -> ServiceProcess:
        process = service(tmp_path / str(len(running)), *options)
        running.append(process)
        process.start()
        return process

    yield run
    for process in running:
        process.stop()


def play(client, batch, **options):
    return client.rollout(batch, 4, SAMPLING, **{"version": 0, "seed": 3, "max_turns": 5, **options})


def ids(episodes):
    return [(e.task_id, e.sample, e.response_ids) for e in episodes]


def restart(client, process):
    """What a fleet does with a service of its own."""
    old = process.address
    client.members.replace(process.restart(), old)
    assert client.members.look() == [process.address]


def is_gone(pid):
    """A zombie counts: it runs nothing."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_service_killed_in_mid_rollout_loses_and_doubles_nothing(start):
    batch = tasks(8)
    quiet = start("--version", "0")
    client = RolloutClient([quiet.address])
    expected = ids(play(client, batch))
    client.close()

    victim = start("--version", "0", "--delay", "0.02")
    client = RolloutClient([victim.address])
    seen, lost = [], []

    def on_trajectory(trajectory):
        seen.append((trajectory.task_id, trajectory.sample))
        if len(seen) == 5:
            os.kill(victim.pid, signal.SIGKILL)

    def revive(error):
        lost.append(str(error))
        restart(client, victim)

    episodes = play(client, batch, on_trajectory=on_trajectory, revive=revive)
    assert ids(episodes) == expected
    assert sorted(seen) == sorted((t, s) for t, s, _ in expected)
    assert len(lost) == 1
    assert "UNAVAILABLE" in lost[0]
    assert (victim.restarts, client.lost, client.duplicates) == (1, 1, 0)
    client.close()


def test_without_somebody_to_bring_it_back_a_lost_service_is_an_error(start):
    victim = start("--version", "0", "--delay", "0.05")
    client = RolloutClient([victim.address])
    with pytest.raises(BridgeError, match=victim.address) as caught:
        play(client, tasks(8), on_trajectory=lambda _: os.kill(victim.pid, signal.SIGKILL))
    assert caught.value.transient
    client.close()


def test_a_frozen_service_is_noticed_by_its_silence(start):
    victim = start("--version", "0", "--delay", "0.02")
    client = RolloutClient([victim.address], silence_timeout=3.0)
    frozen, lost = [], []

    def freeze(_):
        if not frozen:
            frozen.append(victim.pid)
            os.kill(victim.pid, signal.SIGSTOP)

    def revive(error):
        lost.append(str(error))
        restart(client, victim)

    episodes = play(client, tasks(4), on_trajectory=freeze, revive=revive)
    assert len(episodes) == 16
    assert len(lost) == 1
    assert "silent" in lost[0]
    assert is_gone(frozen[0])
    client.close()


def test_a_service_that_makes_no_progress_is_noticed(start):
    stuck = start("--version", "0", "--stuck-from", "3")
    client = RolloutClient([stuck.address], stall_timeout=4.0)
    with pytest.raises(BridgeError, match="neither an episode nor a token"):
        play(client, tasks(2))
    client.close()
    with Stub(stuck.address) as stub:
        wait_until(lambda: stub.status().stats["open_sessions"] == 0, "the abandoned episodes to end")


def test_a_slow_service_is_not_a_dead_one(start):
    slow = start("--version", "0", "--delay", "0.4")  # no episode for 3 s, but tokens
    client = RolloutClient([slow.address], stall_timeout=3.0, silence_timeout=3.0)
    assert len(play(client, tasks(1))) == 4
    client.close()


def test_a_client_that_goes_away_frees_the_engine(start):
    process = start("--version", "0", "--stuck-from", "0")
    script = (
        "import sys; from tests.integration.bridge_helpers import *; from rollout.client import RolloutClient\n"
        "RolloutClient([sys.argv[1]]).rollout(tasks(5), 4, SAMPLING, version=0, seed=0, max_turns=5)"
    )
    learner = subprocess.Popen([sys.executable, "-c", script, process.address], cwd=ROOT)
    try:
        with Stub(process.address) as stub:
            wait_until(lambda: stub.status().stats["open_sessions"] == 20, "20 sessions")
            learner.kill()
            wait_until(lambda: stub.status().stats["open_sessions"] == 0, "the sessions to close")
            wait_until(lambda: stub.status().active_requests == 0, "the request to end")
    finally:
        learner.kill()
        learner.wait()


def test_an_error_in_the_learner_ends_its_episodes(start):
    process = start("--version", "0", "--stuck-from", "2")
    client = RolloutClient([process.address])

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(client, tasks(5), on_trajectory=stop)
    wait_until(lambda: client.stubs[0].status().stats["open_sessions"] == 0, "the sessions to close")
    client.close()


def test_a_learner_killed_in_mid_push_goes_on_where_it_was(start):
    process = start("--version", "0")
    script = (
        "import sys, time; from tests.integration.bridge_helpers import *\n"
        "stub = Stub(sys.argv[1]); state = begin(stub, key(1)); sent = missing_frames(state, weights(5))[:1]\n"
        "def slowly():\n    yield from sent\n    time.sleep(600)\n"
        "stub.push(state, slowly(), 600)"
    )
    learner = subprocess.Popen([sys.executable, "-c", script, process.address], cwd=ROOT)
    with Stub(process.address) as stub:
        try:
            wait_until(lambda: stub.status().received_bytes > 0, "the first frame")
        finally:
            learner.kill()
            learner.wait()
        state = begin(stub, key(1))
        assert [(r.tensor, r.offset, r.length) for r in state.missing] == [
            (0, 1 << 20, 1_200_000 - (1 << 20)),
            (1, 0, 28),
        ]
        assert stub.status().live == pb.WeightsKey(version=0)  # it generates with the old weights meanwhile
        stub.push(state, iter(missing_frames(state, weights(5))), DEADLINE)
        commit(stub, key(1), pb.PREPARE)
        assert commit(stub, key(1), pb.APPLY).state == pb.LIVE
        assert stub.status().stats["level"] == pytest.approx(level(weights(5)), rel=1e-5)


@pytest.mark.parametrize("way", [lambda state: state, through_grpc], ids=["data port", "gRPC"])
def test_a_corrupted_frame_is_refused_by_name_and_sent_again(start, way):
    process = start()
    arrays = weights()
    with Stub(process.address) as stub:
        state = way(begin(stub, key(1)))
        good = missing_frames(state, arrays)
        flipped = bytearray(good[1].payload)
        flipped[100] ^= 1
        bad = frames.Frame(good[1].head, memoryview(flipped))
        with pytest.raises(BridgeError, match=r"\(DATA_LOSS\)") as caught:
            stub.push(state, iter([good[0], bad, *good[2:]]), DEADLINE)
        assert f"push {state.push_id:016x}, tensor 0, slice 0, offset 1048576: corrupted" in str(caught.value)
        assert caught.value.transient
        with pytest.raises(grpc.RpcError, match="not complete"):
            commit(stub, key(1), pb.PREPARE)
        missing = way(begin(stub, key(1)))
        assert (missing.missing[0].tensor, missing.missing[0].offset) == (0, 1 << 20), "what was sound is kept"
        assert stub.push(missing, iter(missing_frames(missing, arrays)), DEADLINE).duplicates == 0
        commit(stub, key(1), pb.PREPARE)
        assert commit(stub, key(1), pb.APPLY).state == pb.LIVE


def test_a_stale_learner_cannot_push(start):
    process = start()
    with Stub(process.address) as stub:
        push(stub, key(9, epoch=2), weights(1))
        for stale in (key(10, epoch=1), key(8, epoch=2)):
            with pytest.raises(grpc.RpcError, match="is stale") as caught:
                begin(stub, stale)
            assert not explain("x", caught.value).transient
        assert stub.status().live == key(9, epoch=2)


def test_another_run_cannot_push_while_episodes_are_played(start):
    process = start("--stuck-from", "0")
    client = RolloutClient([process.address])
    push(client.stubs[0], key(0), weights())
    client.identify("run", 1)

    def episodes_in_flight():
        with pytest.raises(BridgeError):
            play(client, tasks(1))

    thread = threading.Thread(target=episodes_in_flight)
    thread.start()
    with Stub(process.address) as stub:
        wait_until(lambda: stub.status().active_requests == 1, "the episodes to begin")
        with pytest.raises(grpc.RpcError, match="run 'run' is using this service"):
            begin(stub, key(0, run="other"))
    process.stop()
    thread.join(DEADLINE)
    assert not thread.is_alive()
    client.close()


def test_a_failed_apply_quarantines_until_whole_weights_come(start):
    process = start("--version", "0", "--fail-apply", "2", "--stuck-from", "1")
    client, stub = RolloutClient([process.address]), Stub(process.address)
    results = []

    def episodes_in_flight():
        try:
            play(client, tasks(1))
        except BridgeError as error:
            results.append(str(error))

    thread = threading.Thread(target=episodes_in_flight)
    thread.start()
    wait_until(lambda: stub.status().active_requests == 1, "the episodes to begin")
    with pytest.raises(grpc.RpcError, match="out of memory while loading"):
        push(stub, key(2), weights(2))
    thread.join(DEADLINE)
    assert "failed while it was applied" in results[0]
    status = stub.status()
    assert (status.state, status.HasField("live")) == (pb.QUARANTINED, False)
    for version in (0, 2):
        with pytest.raises(BridgeError, match="out of memory while loading"):
            play(client, tasks(1), version=version)
    assert push(stub, key(2), weights(2)).state == pb.LIVE
    assert client.rollout(tasks(1), 1, SAMPLING, version=2, seed=0, max_turns=5)[0].spans == [(2, 0, 11)]
    client.close()
    stub.close()


def test_random_bytes_and_half_open_connections_do_no_harm(start):
    process = start("--version", "0")
    host, port = process.address.split(":")
    rng = np.random.default_rng(0)
    half_open = [socket.create_connection((host, int(port))) for _ in range(50)]
    for size in (1, 100, 100_000):
        with socket.create_connection((host, int(port))) as connection:
            try:
                connection.sendall(rng.bytes(size))
            except OSError:
                continue  # the server may hang up on rubbish before it has read all of it
    client = RolloutClient([process.address])
    push = client.stubs[0].channel.stream_unary(METHODS["Push"].path)
    unknown = frames.encode(frames.frame(1, 0, 0, 0, memoryview(b"x")))
    for data, said in (
        (b"rubbish", "shorter than its header"),
        (rng.bytes(4096), "not a frame of weights"),
        (unknown, "this push is not open"),
    ):
        with pytest.raises(grpc.RpcError, match=said):
            push(iter([data]), timeout=DEADLINE)
    assert len(play(client, tasks(3))) == 12
    client.close()
    for connection in half_open:
        connection.close()


def test_a_service_dies_with_the_process_that_started_it(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from tests.integration.bridge_helpers import service\n"
        "process = service(Path(sys.argv[1])); process.start(); print(process.pid, flush=True); time.sleep(600)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        child = int(trainer.stdout.readline())
        assert not is_gone(child)
    finally:
        trainer.kill()
        trainer.wait()
        trainer.stdout.close()
    wait_until(lambda: is_gone(child), "the orphan to stop itself")


def test_stop_ends_a_service_that_does_not_listen(start):
    process = start()
    pid = process.pid
    os.kill(pid, signal.SIGSTOP)
    process.stop(grace=0.5)
    assert is_gone(pid)
    assert not process.alive()


def test_an_orderly_stop_tells_the_client(start):
    process = start("--version", "0", "--stuck-from", "1", "--drain-timeout", "0.5")
    client = RolloutClient([process.address])
    with pytest.raises(BridgeError, match="this service is stopping: it hands back 7 episodes") as caught:
        play(client, tasks(2), on_trajectory=lambda _: os.kill(process.pid, signal.SIGTERM))
    assert caught.value.transient
    assert (client.lost, client.handed_back) == (0, 1)
    wait_until(lambda: not process.alive(), "the service to stop")
    client.close()


def test_a_service_that_cannot_start_says_why(tmp_path):
    broken = service(tmp_path, "--specs", "not json")
    with pytest.raises(ServiceError, match=r"(?s)ended with exit status 1 while starting.*JSONDecodeError"):
        broken.start()
    missing = ServiceProcess([str(tmp_path / "nothing")], tmp_path / "log")
    with pytest.raises(ServiceError, match="cannot be started"):
        missing.start()
    lazy = ServiceProcess(
        [sys.executable, "-c", "import time; print('thinking'); time.sleep(600)"], tmp_path / "l", start_timeout=1
    )
    with pytest.raises(ServiceError, match=r"not ready within 1 s \(bridge.start_timeout\)"):
        lazy.start()
    assert not lazy.alive()
