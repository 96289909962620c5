"""Weights of which two learner processes own parts, pushed to one real service. The processes are threads here."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from rollout.client import RolloutClient
from rollout.supervisor import ServiceProcess
from sqlrl_jax.distributed import World
from sqlrl_jax.weights import HostTensor, Pusher, PushError
from tests.integration.bridge_helpers import DEADLINE, key, level, service, weights
from tests.integration.bridge_service import SPECS
from tests.unit.tiny_model import model_config

CUT = 100  # rows of the first tensor that process 0 owns


class ThreadWorld(World):
    """One of two threads that exchange bytes through a list."""

    count = 2

    def __init__(self, index: int, parts: list[bytes], barrier: threading.Barrier) -> None:
        self.index, self.parts, self.at = index, parts, barrier

    def exchange(self, name: str, data: bytes) -> list[bytes]:
        self.parts[self.index] = data
        self.at.wait()
        out = list(self.parts)
        self.at.wait()
        return out


def raw(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def owned_by(index: int, arrays: list[np.ndarray]) -> list[HostTensor]:
    rows, width = arrays[0].shape
    cut = [((0, 0), (CUT, width)), ((CUT, 0), (rows - CUT, width))]
    first = HostTensor(SPECS[0].name, (rows, width), "float32", cut, {index: raw(np.split(arrays[0], [CUT])[index])})
    second = HostTensor(SPECS[1].name, arrays[1].shape, "float32", [((0,), arrays[1].shape)], {})
    if index == 0:
        second.owned[0] = raw(arrays[1])
    return [first, second]


@pytest.fixture
def process(tmp_path) -> Iterator[ServiceProcess]:
    process = service(tmp_path)
    process.start()
    yield process
    process.stop()


@pytest.fixture
def pushers(process) -> Iterator[list[Pusher]]:
    parts, barrier = [b"", b""], threading.Barrier(2)
    clients = [RolloutClient([process.address]) for _ in range(2)]
    yield [
        Pusher(client, model_config(300), "float32", run_id="run", epoch=1, timeout=DEADLINE, world=world)
        for client, world in zip(clients, (ThreadWorld(i, parts, barrier) for i in range(2)), strict=True)
    ]
    for client in clients:
        client.close()


def push(pushers: list[Pusher], version: int, arrays: list[np.ndarray]) -> list[Any]:
    """Bytes sent by each process, or what it raised."""

    def one(index: int) -> Any:
        try:
            sent = pushers[index]._stage(key(version), owned_by(index, arrays))
            pushers[index]._apply(key(version))
        except PushError as error:
            return error
        return sent

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(2)))


def test_each_process_sends_what_it_owns(process, pushers):
    arrays = weights(1)
    sent = push(pushers, 1, arrays)
    [status] = pushers[0]._client.status().values()
    assert status.live == key(1)
    assert status.stats["level"] == pytest.approx(level(arrays), rel=1e-6)
    own = [CUT * 4000 + 28, 200 * 4000]
    assert all(mine <= got < mine * 1.01 for got, mine in zip(sent, own, strict=True)), sent
    assert push(pushers, 1, arrays) == [0, 0], "what is live already is not sent again"


def test_a_broken_transfer_of_one_is_mended_by_the_next_attempt(process, pushers):
    stub = pushers[1]._client._stubs[0]
    whole, breaks = stub.push, [True]

    def breaking(stream: Any, timeout: float) -> Any:
        if breaks and breaks.pop():
            return whole(iter([b"rubbish"]), timeout=timeout)  # refused as corrupt, which is transient
        return whole(stream, timeout=timeout)

    stub.push = breaking
    arrays = weights(2)
    first, second = push(pushers, 1, arrays)
    assert first < CUT * 4000 * 1.01, "process 0 did not send twice"
    assert second > 200 * 4000
    [status] = pushers[0]._client.status().values()
    assert status.stats["level"] == pytest.approx(level(arrays), rel=1e-6)


def test_a_dead_service_is_the_same_error_in_both(process, pushers):
    process.stop()
    errors = push(pushers, 1, weights(3))
    assert [str(error) for error in errors] == [str(errors[0])] * 2
    assert errors[0].transient
    assert errors[0].address == pushers[0]._client.addresses[0]
