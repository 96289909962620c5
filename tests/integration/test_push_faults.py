"""Everything that can break while weights are pushed, with real service processes: no mixed version is ever served, and what
is whole goes on. Faults of a whole transfer on the level of single calls are in test_faults.py."""

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from bridge_helpers import DEADLINE, ROOT, SAMPLING, Arrays, begin, key, level, service, tasks, wait_until, weights

from rollout import bridge_pb2 as pb
from rollout import delta, frames
from rollout.channel import grpc
from rollout.client import RolloutClient
from rollout.probe import Probe
from rollout.stub import BridgeError, explain
from rollout.types import TensorSpec
from sqlrl_jax.weights import Pusher, PushError
from tests.integration.bridge_service import SPECS
from tests.unit.tiny_model import model_config

pytestmark = pytest.mark.timeout(240)
SIZE = sum(array.nbytes for array in weights())
LAYERS = [TensorSpec(f"layer.{number}", (1 << 20,), "float32") for number in range(24)]  # of 4 MiB


class Fleet:
    """Services, and a learner that pushes to them."""

    def __init__(self, folder, *options, count=1, specs=SPECS):
        self.processes = [service(folder / str(number), *options, specs=specs) for number in range(count)]
        self.client = RolloutClient([process.start() for process in self.processes])
        self.pusher = self.learner(1)

    def learner(self, epoch):
        return Pusher(self.client, model_config(300), "float32", run_id="run", epoch=epoch, timeout=DEADLINE)

    def push(self, version, arrays, probe=None, **options):
        return self.pusher.push_weights(Arrays(arrays, **options), version, probe)

    def restart(self, number):
        lost = self.client.addresses[number]
        self.client.members.replace(self.processes[number].restart(), lost)
        self.client.members.look()

    def serve(self, version, arrays):
        """All services generate, and with exactly these weights."""
        episodes = self.client.rollout(tasks(4), 1, SAMPLING, version=version, seed=0, max_turns=5)
        for episode in episodes:
            assert [span[0] for span in episode.spans] == [version]
            assert episode.logprobs[0] == pytest.approx(level(arrays), rel=1e-5)

    def close(self):
        self.client.close()
        for process in self.processes:
            process.stop()


@pytest.fixture
def fleet(tmp_path):
    made = []

    def start(*options, **more):
        made.append(Fleet(tmp_path, *options, **more))
        return made[-1]

    yield start
    for one in made:
        one.close()


def changed(arrays, by=1.0):
    """A version in which little is different."""
    out = [array.copy() for array in arrays]
    out[0][::50, ::50] += by
    return out


def layers(version=0):
    """Weights of LAYERS; a version differs little from the one before."""
    arrays = [np.full(LAYERS[0].shape, number, np.float32) for number in range(len(LAYERS))]
    for array in arrays:
        array[:: 1 << 12] += version
    return arrays


def test_a_service_killed_while_staging(fleet):
    two, first = fleet(count=2), weights(1)
    two.push(1, first)
    second = changed(first)

    def kill(number):
        if number == 1:
            os.kill(two.processes[1].pid, signal.SIGKILL)
            wait_until(lambda: not two.processes[1].alive(), "its end")

    with pytest.raises(PushError, match="pushing weight version 2 failed") as caught:
        two.push(2, second, on_bucket=kill)
    assert caught.value.transient
    assert caught.value.address == two.client.addresses[1]
    assert two.client.stubs[0].status().live == key(1)  # all or none
    two.restart(1)
    metrics = two.push(2, second)
    assert metrics["bridge/delta_services"] == 1  # the other one gets everything
    assert SIZE < metrics["bridge/sent_bytes"] < 1.1 * SIZE
    two.serve(2, second)


def test_a_service_killed_while_applying(fleet):
    two, first = fleet("--slow-apply", "2", count=2), weights(1)
    two.push(1, first)
    second, errors = changed(first), []

    def push():
        try:
            two.push(2, second)
        except PushError as error:
            errors.append(error)

    thread = threading.Thread(target=push)
    thread.start()
    stubs = two.client.stubs
    wait_until(lambda: all(stub.status().state == pb.APPLYING for stub in stubs), "both to apply")
    for number in (0, 1):
        os.kill(two.processes[number].pid, signal.SIGKILL)
    thread.join(DEADLINE)
    assert "was not applied" in str(errors[0])
    assert errors[0].transient
    for number in (0, 1):
        two.restart(number)
    third = changed(second)
    assert two.push(3, third)["bridge/delta_services"] == 0
    two.serve(3, third)


def test_a_learner_killed_in_mid_difference(fleet):
    one, first = fleet(specs=LAYERS), layers()
    script = (
        "import sys, time\n"
        "from tests.integration.test_push_faults import *\n"
        "client = RolloutClient([sys.argv[1]])\n"
        "pusher = Pusher(client, model_config(300), 'float32', run_id='run', epoch=1)\n"
        "pusher.push_weights(Arrays(layers(), LAYERS), 1)\n"
        "stop = lambda number: number == 12 and time.sleep(600)\n"
        "pusher.push_weights(Arrays(layers(1), LAYERS, stop), 2)\n"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests/integration"), str(ROOT / "tests/unit")])
    environment = os.environ | {"PYTHONPATH": paths}
    learner = subprocess.Popen([sys.executable, "-c", script, one.client.addresses[0]], cwd=ROOT, env=environment)
    stub = one.client.stubs[0]
    try:
        wait_until(lambda: stub.status().staging == key(2) and stub.status().received_bytes, "the second push")
    finally:
        learner.kill()
        learner.wait()
    status = stub.status()
    assert (status.live, status.stats["level"]) == (key(1), pytest.approx(level(first), rel=1e-5))
    again = begin(stub, key(2), LAYERS, base=key(1))  # who holds the base can go on where it stopped
    assert again.delta
    assert 12 <= len({gap.tensor for gap in again.missing}) < 24
    one.pusher = one.learner(2)  # the run's next start has no base, and sends everything
    assert one.push(3, layers(2), specs=LAYERS)["bridge/delta_services"] == 0
    assert (stub.status().live, stub.status().stats["level"]) == (key(3, 2), pytest.approx(level(layers(2)), rel=1e-5))


def test_a_service_that_holds_another_version_takes_everything(fleet):
    one, first = fleet(), weights(1)
    one.push(1, first)
    refused = begin(one.client.stubs[0], key(2), base=key(7))
    assert (refused.delta, refused.HasField("held")) == (False, False)  # what it held is being overwritten
    one.client.stubs[0].abort(pb.AbortRequest(weights=key(2)), timeout=DEADLINE)
    second = changed(first)
    metrics = one.push(3, second)
    assert (metrics["bridge/delta_services"], metrics["bridge/sent_bytes"] > SIZE) == (0, True)
    third = changed(second)
    metrics = one.push(4, third)
    assert (metrics["bridge/delta_services"], metrics["bridge/sent_bytes"] < SIZE / 10) == (1, True)
    assert one.client.stubs[0].status().live == key(4)
    one.serve(4, third)


class Tampering:
    """Changes the first DELTA frame of a transfer, once."""

    def __init__(self, push, tamper):
        self.push, self.tamper = push, tamper

    def __call__(self, state, every, timeout):
        def through():
            for frame in every:
                if self.tamper is not None and frame.head.kind == frames.DELTA:
                    frame, self.tamper = self.tamper(frame), None
                yield frame

        return self.push(state, through(), timeout)


def flip_a_bit(frame):
    payload = bytearray(frame.payload)
    payload[-1] ^= 1
    return frames.Frame(frame.head, memoryview(payload))


def say_something_else(frame):
    rng, head = np.random.default_rng(0), frame.head
    size = delta.covered(frame.payload)
    payload, _ = delta.encode(rng.integers(0, 9, size, np.uint8), rng.integers(0, 9, size, np.uint8), 4)
    return frames.frame(head.push_id, head.tensor, head.slice, head.offset, memoryview(payload), frames.DELTA)


@pytest.mark.parametrize(("tamper", "on_delta"), [(flip_a_bit, True), (say_something_else, False)])
def test_corrupted_differences(fleet, tamper, on_delta):
    """A frame damaged on the way is sent again; differences that give other bytes than the learner's are given up."""
    one, first = fleet(), weights(1)
    one.push(1, first)
    second = changed(first)
    stub = one.client.stubs[0]
    stub.push = Tampering(stub.push, tamper)
    sent = one.push(2, second)["bridge/sent_bytes"]
    assert (sent < SIZE / 10) is on_delta
    assert stub.push.tamper is None
    one.serve(2, second)


@pytest.mark.parametrize("wrong", [1, 9])
def test_an_engine_that_computes_something_else(fleet, wrong):
    """It is quarantined and gets everything once more; if that does not help, the push fails."""
    one, first = fleet("--wrong-scores", str(wrong)), weights(1)
    probe = Probe([[1, 2, 3]], [[level(first)] * 2], tolerance=0.1)
    if wrong == 1:
        metrics = one.push(1, first, probe)
        assert metrics["bridge/sent_bytes"] > 2 * SIZE
        assert metrics["bridge/probe_logprob_diff_max"] < 1e-3
        one.serve(1, first)
        return
    with pytest.raises(PushError, match="differ from the learner's by 1 nats a token") as caught:
        one.push(1, first, probe)
    assert caught.value.transient  # a service that the run started is started anew
    status = one.client.stubs[0].status()
    assert (status.state, status.HasField("live")) == (pb.QUARANTINED, False)
    with pytest.raises(BridgeError, match="differ from the learner's"):
        one.serve(1, first)


def test_an_engine_without_time_for_the_probe_goes_on_and_nothing_is_claimed(fleet):
    one, first = fleet("--busy"), weights(1)
    metrics = one.push(1, first, Probe([[1, 2, 3]], [[0.0] * 2], tolerance=0.1))
    assert "bridge/probe_logprob_diff" not in metrics
    one.serve(1, first)


def test_memory_that_is_full(fleet):
    large = [TensorSpec("embed.weight", (5000, 100_000), "float32")]
    one = fleet("--version", "0", "--memory", "1000", specs=large)
    weights_never_made = Arrays([], large, on_bucket=lambda number: pytest.fail("nothing is to be sent"))
    with pytest.raises(PushError, match=r"takes 2\.0 GB of the service's host memory.*it was refused") as caught:
        one.pusher.push_weights(weights_never_made, 1)
    assert not caught.value.transient
    assert len(RolloutClient(one.client.addresses).rollout(tasks(2), 1, SAMPLING, version=0, seed=0, max_turns=5)) == 2


def test_a_slow_service_does_not_pile_up_frames(fleet):
    """The learner waits for it; then all have the same."""
    two, arrays = fleet(count=2, specs=LAYERS), layers()
    slow, reached = two.processes[1].pid, []

    def on_bucket(number):
        reached.append(number)
        if number == 2:
            os.kill(slow, signal.SIGSTOP)

    thread = threading.Thread(target=two.push, args=(1, arrays), kwargs={"specs": LAYERS, "on_bucket": on_bucket})
    thread.start()
    try:
        seen = []

        def stands():
            seen.append(len(reached))
            return len(seen) > 60 and seen[-60] == seen[-1] > 2

        wait_until(stands, "the learner to wait")
    finally:
        os.kill(slow, signal.SIGCONT)
    assert len(reached) < 16  # 4 MiB each: queues, threads and the network's windows are all that waits
    thread.join(DEADLINE)
    for stub in two.client.stubs:
        assert stub.status().stats["level"] == pytest.approx(level(arrays), rel=1e-5)


def test_tensors_of_another_model_are_refused_by_name_before_anything_is_sent(fleet):
    one = fleet("--version", "0")
    embed, norm = SPECS
    for specs, message in (
        ([embed], "'norm.weight' is missing"),
        ([*SPECS, TensorSpec("head.weight", (3,), "float32")], "'head.weight' is not one of the engine's"),
        (
            [TensorSpec(embed.name, (1000, 300), "float32"), norm],
            "float32[1000, 300], the engine's is float32[300, 1000]",
        ),
        ([TensorSpec(embed.name, embed.shape, "bfloat16"), norm], "bfloat16[300, 1000], the engine's is float32"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            begin(one.client.stubs[0], key(1), specs)
        assert message in caught.value.details()
        assert not explain("x", caught.value).transient
    assert one.client.stubs[0].status().state == pb.LIVE
