"""What broken, hostile or lazy peers do to a service over real sockets, and that it answers and plays afterwards."""

import json
import resource
import socket
import time

import numpy as np
import pytest

from rollout import bridge_pb2 as pb
from rollout import frames, wire
from rollout.channel import METHODS, SERVICE, grpc
from rollout.client import RolloutClient
from rollout.stub import Stub
from tests.integration.bridge_helpers import DEADLINE, SAMPLING, begin, key, service, tasks, wait_until

pytestmark = pytest.mark.timeout(180)
CALLS = 6
LIMITS = {"calls": CALLS, "handshake_seconds": 2.0, "idle_seconds": 3.0, "consumer_seconds": 3.0, "episodes": 4000}
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    options = ["--version", "0", "--limits", json.dumps(LIMITS), "--stuck-from", "100"]
    process = service(tmp_path_factory.mktemp("limited"), *options)
    yield process.start()
    process.stop()


@pytest.fixture(autouse=True)
def plays_afterwards(address):
    """Whatever a test does, the service answers and plays after it."""
    yield
    client = RolloutClient([address])
    assert client.wait_ready(DEADLINE) == []
    assert len(client.rollout(tasks(3), 4, SAMPLING, version=0, seed=1, max_turns=5)) == 12
    client.close()


@pytest.fixture
def connect(address):
    """Opens connections; all are closed at the end."""
    host, _, port = address.rpartition(":")
    opened = []

    def run() -> socket.socket:
        opened.append(socket.create_connection((host, int(port)), timeout=DEADLINE))
        return opened[-1]

    yield run
    for connection in opened:
        connection.close()


def is_closed(connection):
    """Whether the service hangs up before the deadline; what it says until then is read."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def request(batch, samples):
    return pb.RolloutRequest(
        weights=pb.WeightsKey(version=0),
        tasks=[wire.task_to_proto(task) for task in batch],
        n_samples=samples,
        sampling=wire.sampling_to_proto(SAMPLING),
        max_turns=5,
    )


def code_of(call, *arguments):
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, timeout=DEADLINE)
    return caught.value.code(), caught.value.details()


def test_a_thousand_idle_connections(address, connect):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 2048)), hard))
    idle = [connect() for _ in range(1000)]
    client = RolloutClient([address])
    client.wait_ready(DEADLINE)
    assert len(client.rollout(tasks(3), 4, SAMPLING, version=0, seed=1, max_turns=5)) == 12, "while they are open"
    client.close()
    assert all(map(is_closed, idle)), "nobody may take longer than handshake_seconds"


def test_a_connection_without_a_call_is_closed(connect):
    connection = connect()
    connection.sendall(PREFACE + SETTINGS)
    started = time.monotonic()
    assert is_closed(connection)
    assert time.monotonic() - started > 2.0, "not as if it had never shaken hands"


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /sqlrl.bridge.v1.Bridge/Push HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n" + b"x" * 100_000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the start of a TLS handshake
        PREFACE,
        PREFACE + SETTINGS[:5],
        PREFACE + SETTINGS + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",  # a frame of 16 MiB
        PREFACE + SETTINGS + b"\x00\x00\x08\x06\x00\x00\x00\x00\x00",  # a ping without its eight bytes
    ],
    ids=range(7),
)
def test_what_is_not_grpc_is_hung_up_on(connect, data):
    connection = connect()
    connection.sendall(data)
    assert is_closed(connection)


def test_random_bytes_before_and_after_the_handshake(connect):
    rng = np.random.default_rng(0)
    for start in [b"", PREFACE, PREFACE + SETTINGS] * 20:
        connection = connect()
        try:
            connection.sendall(start + rng.bytes(int(rng.integers(1, 5000))))
        except ConnectionError:
            continue  # it may hang up before it has read all
    for size in (1, 100, 10_000):
        with Stub(f"127.0.0.1:{connection.getpeername()[1]}") as stub:
            raw = {kind: stub.channel.unary_unary(f"/{SERVICE}/{kind}") for kind in ("Begin", "Commit", "Abort")}
            for call in raw.values():
                assert code_of(call, rng.bytes(size))[0] in (
                    grpc.StatusCode.INTERNAL,
                    grpc.StatusCode.INVALID_ARGUMENT,
                    grpc.StatusCode.FAILED_PRECONDITION,
                    grpc.StatusCode.UNKNOWN,
                )


def test_a_push_that_breaks_off_in_the_middle_of_a_frame(address):
    with Stub(address) as stub:
        state = begin(stub, key(1))
        whole = frames.encode(frames.frame(state.push_id, 0, 0, 0, memoryview(bytes(1000))))
        push = stub.channel.stream_unary(METHODS["Push"].path)
        for cut in (1, 20, len(whole) - 1):
            assert code_of(push, iter([whole[:cut]]))[0] is grpc.StatusCode.DATA_LOSS
        assert stub.status().received_bytes == 0
        stub.abort(pb.AbortRequest(weights=key(1)), timeout=DEADLINE)


def test_messages_and_manifests_that_are_too_large(address):
    with Stub(address) as stub:
        code, said = code_of(stub.channel.unary_unary(f"/{SERVICE}/Abort"), bytes(65 << 20))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in said
        many = [pb.TensorSpec(name="w", shape=[1 << 40, 1 << 20], dtype="float32")] * 100_000
        code, said = code_of(stub.begin, pb.BeginRequest(weights=key(1), manifest=many, lease_seconds=9))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "a manifest of 100000 tensors in 0 slices; the engine has 2 tensors" in said
        vast = [pb.TensorSpec(name="embed.weight", shape=[1 << 40, 1 << 20], dtype="float32")]
        code, said = code_of(stub.begin, pb.BeginRequest(weights=key(1), manifest=vast, lease_seconds=9))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "'embed.weight' is float32[1099511627776, 1048576]" in said


def test_requests_for_too_much(address):
    with Stub(address) as stub:
        for batch, samples, said in (
            (tasks(1), 4_000_000_000, "4000000000 episodes in one request, 4000 are allowed"),
            (tasks(41), 100, "4100 episodes in one request"),
        ):
            with pytest.raises(grpc.RpcError, match=said):
                list(stub.rollout(request(batch, samples), timeout=DEADLINE))
        twice = request(tasks(1), 2)
        twice.tasks[0].samples.extend([1, 1])
        with pytest.raises(grpc.RpcError, match="samples must be different numbers below 2"):
            list(stub.rollout(twice, timeout=DEADLINE))


def test_more_calls_than_it_takes(address):
    with Stub(address) as stub:
        running = [stub.rollout(request(tasks(30), 4), timeout=DEADLINE) for _ in range(CALLS)]  # the last never end
        for call in running:
            next(call)
        with pytest.raises(grpc.RpcError, match="6 calls are running, no more are allowed"):
            stub.begin(pb.BeginRequest(), timeout=DEADLINE)
        running[0].cancel()
        wait_until(lambda: stub.trouble() is None, "a call to be free")
        for call in running:
            call.cancel()
        wait_until(lambda: stub.trouble() is None and stub.status().active_requests == 0, "the calls to end")


def test_clients_that_do_not_read(address):
    """Their episodes are played and thrown away; they do not keep others out for long."""
    large = request(tasks(40, question="long " * 1900), 1).SerializeToString()
    narrow = [("grpc.http2.bdp_probe", 0)]  # nor do their connections read ahead
    with grpc.insecure_channel(address, options=narrow) as lazy, Stub(address) as other:
        calls = [lazy.unary_stream(f"/{SERVICE}/Rollout")(large, timeout=DEADLINE) for _ in range(CALLS)]
        wait_until(lambda: "no more are allowed" in str(other.trouble()), "the calls to begin")
        wait_until(lambda: other.trouble() is None, "the service to lose its patience")
        assert not any(call.done() for call in calls)
        wait_until(lambda: other.status().active_requests == 0, "the episodes to end")
        assert other.status().stats["open_sessions"] == 0
