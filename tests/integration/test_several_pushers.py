"""Weights of which two learner processes own parts, pushed to one real service. The processes are threads here."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from rollout import bridge_pb2 as pb
from rollout import frames
from rollout.client import RolloutClient
from rollout.supervisor import ServiceProcess
from sqlrl_jax.buckets import Cut, Piece, Weights
from sqlrl_jax.weights import Pusher, PushError
from tests.integration.bridge_helpers import DEADLINE, key, level, service, weights
from tests.integration.bridge_service import SPECS
from tests.integration.thread_world import worlds
from tests.unit.tiny_model import model_config

CUT = 100  # rows of the first tensor that process 0 owns


def raw(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


class Owned(Weights):
    """What one process owns of the test service's two tensors."""

    def __init__(self, index: int, arrays: list[np.ndarray]) -> None:
        rows, width = arrays[0].shape
        cut = (((0, 0), (CUT, width)), ((CUT, 0), (rows - CUT, width)))
        super().__init__(
            [
                Cut(SPECS[0].name, (rows, width), "float32", cut),
                Cut(SPECS[1].name, arrays[1].shape, "float32", (((0,), arrays[1].shape),)),
            ]
        )
        self.pieces = [Piece(0, index, raw(np.split(arrays[0], [CUT])[index]), 4)]
        self.pieces += [Piece(1, 0, raw(arrays[1]), 4)] * (index == 0)

    def buckets(self) -> Iterator[list[Piece]]:
        for piece in self.pieces:
            yield [piece]


@pytest.fixture
def process(tmp_path) -> Iterator[ServiceProcess]:
    process = service(tmp_path)
    process.start()
    yield process
    process.stop()


@pytest.fixture
def pushers(process) -> Iterator[list[Pusher]]:
    clients = [RolloutClient([process.address]) for _ in range(2)]
    yield [
        Pusher(client, model_config(300), "float32", run_id="run", epoch=1, timeout=DEADLINE, world=world)
        for client, world in zip(clients, worlds(2), strict=True)
    ]
    for client in clients:
        client.close()


def push(pushers: list[Pusher], version: int, arrays: list[np.ndarray]) -> list[Any]:
    """The metrics of each process, or what it raised."""

    def one(index: int) -> Any:
        try:
            return pushers[index].push_weights(Owned(index, arrays), version)
        except PushError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(2)))


def sent(results: list[Any]) -> float:
    """Bytes that both processes sent: both tell the same."""
    first, second = (metrics["bridge/sent_bytes"] for metrics in results)
    assert first == second
    return float(first)


def served(pushers: list[Pusher], version: int) -> float:
    [status] = pushers[0]._client.status().values()
    assert status.live == key(version)
    return float(status.stats["level"])


def test_each_process_sends_what_it_owns(process, pushers):
    arrays = weights(1)
    size = sum(array.nbytes for array in arrays)
    assert size <= sent(push(pushers, 1, arrays)) < size * 1.01
    assert served(pushers, 1) == pytest.approx(level(arrays), rel=1e-6)
    assert sent(push(pushers, 1, arrays)) == 0, "what is live already is not sent again"


def test_each_process_sends_the_differences_of_what_it_owns(process, pushers):
    arrays = weights(1)
    push(pushers, 1, arrays)
    for version in (2, 3):
        for row in (0, 250):  # of either process
            arrays[0][row, :50] += 1
        metrics, _ = results = push(pushers, version, arrays)
        assert sent(results) < 10_000
        assert metrics["bridge/delta_density"] == pytest.approx(100 / 300_007)
        assert served(pushers, version) == pytest.approx(level(arrays), rel=1e-6)


def test_a_broken_transfer_of_one_is_mended_by_the_next_attempt(process, pushers):
    stub = pushers[1]._client.stubs[0]
    whole, breaks = stub.push, [True]

    def breaking(state: pb.PushState, every: Iterator[frames.Frame], timeout: float) -> pb.PushReply:
        """Refused as corrupt once, which is transient."""
        first = next(every)
        wrong = frames.Frame(first.head, memoryview(bytes(first.head.length)))
        return whole(state, iter([wrong]) if breaks and breaks.pop() else itertools.chain([first], every), timeout)

    stub.push = breaking
    arrays = weights(2)
    size = sum(array.nbytes for array in arrays)
    assert size < sent(push(pushers, 1, arrays)) < size * 1.01, "what process 0 had sent was not sent twice"
    assert served(pushers, 1) == pytest.approx(level(arrays), rel=1e-6)


def test_a_dead_service_is_the_same_error_in_both(process, pushers):
    process.stop()
    errors = push(pushers, 1, weights(3))
    assert [str(error) for error in errors] == [str(errors[0])] * 2
    assert errors[0].transient
    assert errors[0].address == pushers[0]._client.addresses[0]
