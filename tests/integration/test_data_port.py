"""The socket that takes the bytes of weights, over real connections: who gets in, what is refused, and what happens when
it is not reached or breaks."""

import logging
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rollout import bridge_pb2 as pb
from rollout import frames
from rollout.channel import grpc
from rollout.client import RolloutClient
from rollout.data_port import DataPort, DataStream, Refusal
from rollout.errors import UserError
from rollout.listener import Limits
from rollout.manifest import Refused
from rollout.security import PLAIN, Security
from rollout.stub import BridgeError, Stub
from rollout.types import TensorSpec
from sqlrl_jax.config import BridgeConfig
from sqlrl_jax.sending import Stream
from sqlrl_jax.weights import Pusher
from tests.integration.bridge_helpers import (
    DEADLINE,
    Arrays,
    begin,
    commit,
    key,
    level,
    missing_frames,
    service,
    through_grpc,
    wait_until,
    weights,
)
from tests.integration.tcp_relay import Relay
from tests.unit.tiny_model import model_config

pytestmark = pytest.mark.timeout(180)
HOST, PUSH = "127.0.0.1", 7
HUNG_UP = (ConnectionError, ssl.SSLError)
LIMITS = Limits(data_connections=4, handshake_seconds=2.0)
FRAMES = [frames.frame(PUSH, 0, 0, start, memoryview(bytes([start % 251]) * 1000)) for start in range(0, 50_000, 1000)]


class Door(DataPort):
    """A port that keeps what it takes."""

    def __init__(self, security=PLAIN, refuse_at=None):
        super().__init__(HOST, 0, security, LIMITS)
        self.taken, self.refuse_at, self.hold = [], refuse_at, threading.Event()
        self.hold.set()
        self.open(self.take)

    def take(self, frame):
        assert self.hold.wait(DEADLINE)
        if len(self.taken) == self.refuse_at:
            raise Refused("this push is not open")
        self.taken.append((frame.head, bytes(frame.payload)))
        return True

    def state(self, push=PUSH):
        return pb.PushState(push_id=push, data_port=self.port, ticket=self.ticket(push))

    def connect(self):
        return socket.create_connection((HOST, self.port), timeout=DEADLINE)


@pytest.fixture
def door():
    opened = []

    def make(*arguments, **options):
        opened.append(Door(*arguments, **options))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def stream(door, security=PLAIN, name="", timeout=DEADLINE, state=None):
    return DataStream(HOST, state or door.state(), security, name, timeout)


def is_closed(connection):
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize(
    ("ours", "theirs", "name", "works"),
    [
        (("", ""), ("", ""), "", True),
        (("service", ""), ("", "ca"), "", True),
        (("service", "ca"), ("learner", "ca"), "", True),
        (("elsewhere", ""), ("", "ca"), "elsewhere.test", True),
        (("elsewhere", ""), ("", "ca"), "", False),
        (("expired", ""), ("", "ca"), "", False),
        (("service", ""), ("", "other"), "", False),
        (("stranger", ""), ("", "ca"), "", False),
        (("service", "ca"), ("", "ca"), "", False),
        (("service", "ca"), ("expired", "ca"), "", False),
        (("service", ""), ("", ""), "", False),
        (("", ""), ("", "ca"), "", False),
    ],
)
def test_who_gets_in(certificates, door, ours, theirs, name, works):
    security = [Security.load(BridgeConfig(**certificates.settings(*means))) for means in (ours, theirs)]
    opened = door(security[0])
    if works:
        reply = stream(opened, security[1], name).send(iter(FRAMES))
        assert (reply.frames, reply.duplicates) == (50, 0)
        assert opened.taken == [(frame.head, bytes(frame.payload)) for frame in FRAMES]
    else:
        with pytest.raises(HUNG_UP):
            stream(opened, security[1], name).send(iter(FRAMES))
        assert opened.taken == []


@pytest.mark.parametrize("chosen", [lambda d: d.state(8).ticket, lambda d: bytes(16)], ids=["another's", "none"])
def test_a_wrong_ticket_opens_nothing(door, chosen):
    opened = door()
    wrong = pb.PushState(push_id=PUSH, data_port=opened.port, ticket=chosen(opened))
    with pytest.raises(HUNG_UP):
        stream(opened, state=wrong).send(iter(FRAMES * 100))
    assert opened.taken == []


def test_random_bytes_and_silence_are_hung_up_on(door):
    opened, rng = door(), np.random.default_rng(0)
    for data in (b"", b"GET / HTTP/1.1\r\n\r\n", *(rng.bytes(int(rng.integers(28, 5000))) for _ in range(30))):
        with opened.connect() as connection:
            connection.sendall(data)
            assert is_closed(connection), "within handshake_seconds"
    state = opened.state()
    for data in (rng.bytes(5000), FRAMES[0].head.pack()[:-1] + b"x", FRAMES[0].head.pack() + b"x" * 1000):
        with stream(opened, state=state)._connection as connection:  # past the ticket
            connection.sendall(data)
            answer = connection.recv(65536)
        assert pb.DataEnd.FromString(answer[4:]).code == "DATA_LOSS"
    assert opened.taken == []
    assert stream(opened).send(iter(FRAMES)).frames == 50


def test_more_connections_than_are_allowed_are_closed(door):
    opened = door()
    held = [stream(opened) for _ in range(4)]
    with pytest.raises(HUNG_UP):
        stream(opened).send(iter(FRAMES * 100))
    for one in held:
        one._connection.close()
    wait_until(lambda: not is_closed_at_once(opened), "a place to be free")
    assert stream(opened).send(iter(FRAMES)).frames == 50


def is_closed_at_once(opened):
    with opened.connect() as connection:
        connection.settimeout(0.2)
        try:
            return connection.recv(1) == b""
        except TimeoutError:
            return False


def test_a_port_that_is_taken_is_named():
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"bridge.data_port {port} at {HOST}: Address already in use$"):
            DataPort(HOST, port, PLAIN, LIMITS)


def test_what_breaks_off_in_the_middle_of_a_frame_leaves_only_whole_ones(door):
    opened = door()
    with stream(opened)._connection as connection:
        connection.sendall(FRAMES[0].head.pack() + FRAMES[0].payload + FRAMES[1].head.pack() + FRAMES[1].payload[:999])
        wait_until(lambda: opened.taken, "the first frame")
    wait_until(lambda: not any(thread.name == "weights" for thread in threading.enumerate()), "the connection to end")
    assert [head.offset for head, _ in opened.taken] == [0]


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_refusal_ends_a_transfer_early_and_says_why(certificates, door, encrypted):
    ours, theirs = (Security.load(BridgeConfig(**certificates.settings(*m))) for m in (("service", ""), ("", "ca")))
    opened = door(ours if encrypted else PLAIN, refuse_at=10)
    sent = []

    def endless():
        while True:
            sent.append(0)
            yield FRAMES[0]

    with pytest.raises(Refusal, match="this push is not open") as caught:
        stream(opened, theirs if encrypted else PLAIN).send(endless())
    assert caught.value.code == Refused.code
    assert len(opened.taken) == 10


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_service_that_reads_nothing_is_not_waited_for_without_end(certificates, door, encrypted):
    ours, theirs = (Security.load(BridgeConfig(**certificates.settings(*m))) for m in (("service", ""), ("", "ca")))
    opened = door(ours if encrypted else PLAIN)
    opened.hold.clear()
    large = frames.frame(PUSH, 0, 0, 0, memoryview(bytes(frames.MAX_PAYLOAD)))
    with pytest.raises((TimeoutError, BlockingIOError)):
        stream(opened, theirs if encrypted else PLAIN, timeout=1.0).send(iter([large] * 10_000))
    opened.hold.set()


def tell(stub, data_port):
    """Has `stub` hear of another port than the service's own, as behind a tunnel or a firewall."""
    answered = stub.begin

    def begin(request, timeout):
        state = answered(request, timeout=timeout)
        state.data_port = data_port
        return state

    stub.begin = begin


@pytest.fixture
def running(tmp_path):
    process = service(tmp_path, "--version", "0")
    yield process.start()
    process.stop()


def test_where_the_port_is_not_reached_weights_go_through_grpc(running, caplog):
    with socket.create_server((HOST, 0)) as taken:
        nobody = taken.getsockname()[1]
    with Stub(running) as stub, caplog.at_level(logging.WARNING):
        tell(stub, nobody)
        for version in (1, 2):
            state = begin(stub, key(version))
            stub.push(state, iter(missing_frames(state, weights(version))), DEADLINE)
            commit(stub, key(version), pb.PREPARE)
            assert commit(stub, key(version), pb.APPLY).state == pb.LIVE
            assert stub.status().stats["level"] == pytest.approx(level(weights(version)), rel=1e-5)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1, "once, not for every push"
    assert f"its port {nobody} for weights cannot be used" in said[0]


def test_a_connection_that_is_cut_in_mid_push_is_mended_through_grpc(tmp_path):
    specs = [TensorSpec(f"layer.{number}", (1 << 20,), "float32") for number in range(24)]
    arrays = [np.full(spec.shape, number, spec.dtype) for number, spec in enumerate(specs)]
    process = service(tmp_path, specs=specs)
    client = RolloutClient([process.start()])
    [stub] = client.stubs
    pusher = Pusher(client, model_config(300), "float32", run_id="run", epoch=1, timeout=DEADLINE, delta=False)
    pusher.push_weights(Arrays(arrays, specs), 1)
    relay = Relay(f"{HOST}:{pushed_to(stub, specs)}")
    tell(stub, int(relay.address.rpartition(":")[2]))
    arrays.reverse()

    def cut(number):
        if number == 12:
            wait_until(lambda: stub.status().received_bytes > 0, "the first bytes")
            relay.cut()

    sent = pusher.push_weights(Arrays(arrays, specs, on_bucket=cut), 2)["bridge/sent_bytes"]
    status = stub.status()
    assert (status.live, status.stats["level"]) == (key(2), pytest.approx(level(arrays)))
    assert 0 < sent < sum(array.nbytes for array in arrays), "what had come was not sent again"
    relay.close()
    client.close()
    process.stop()


def pushed_to(stub, specs):
    """The service's own data port."""
    state = begin(stub, key(9), specs)
    stub.abort(pb.AbortRequest(weights=key(9)), timeout=DEADLINE)
    return state.data_port


def test_a_transfer_that_grpc_ends_early_leaves_no_thread_that_waits(running):
    with Stub(running) as stub, ThreadPoolExecutor(1) as pool:
        state = through_grpc(begin(stub, key(1)))
        stub.abort(pb.AbortRequest(weights=key(1)), timeout=DEADLINE)
        before = threading.active_count()
        stream = Stream(stub, state, DEADLINE, pool)
        stream.put(lambda: frames.frame(state.push_id, 0, 0, 0, memoryview(b"weights")))
        wait_until(stream._sent.done, "the refusal")
        with pytest.raises(BridgeError, match="this push is not open"):
            stream.finish()
        wait_until(lambda: threading.active_count() <= before + 1, "all but the pool's thread to end")


def test_a_service_that_ends_in_mid_push_is_one_transient_error(tmp_path):
    process = service(tmp_path, "--version", "0")
    with Stub(process.start()) as stub:
        state = begin(stub, key(1))

        def ending():
            first, *others = missing_frames(state, weights(5))
            yield first
            process.stop()
            yield from others * 1000

        with pytest.raises(BridgeError, match=r"sending weights broke off: .*") as caught:
            stub.push(state, ending(), DEADLINE)
        assert caught.value.transient
        with pytest.raises(grpc.RpcError):
            begin(stub, key(1))
