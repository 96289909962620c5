"""What the bridge's tests share: real service processes, tasks, and small sets of weights."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rollout import bridge_pb2 as pb
from rollout import frames
from rollout.security import PLAIN, Security
from rollout.stub import Stub
from rollout.supervisor import ServiceProcess
from rollout.types import SamplingParams, Task, TensorSpec
from sqlrl_jax.buckets import Cut, Piece, Weights
from tests.integration.bridge_service import SPECS
from tests.slices import slice_frames

ROOT = Path(__file__).resolve().parents[2]
SAMPLING = SamplingParams(temperature=1.0, max_tokens=8)
DEADLINE = 60.0


def tasks(count: int, **fields: Any) -> list[Task]:
    return [Task(f"q{i}", "test", {"question": f"question {i}", **fields}) for i in range(count)]


def service(
    tmp_path: Path, *options: str, specs: list[TensorSpec] | None = None, security: Security = PLAIN
) -> ServiceProcess:
    """A service process, not started yet; `options` are those of bridge_service.py."""
    os.environ["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "tests.integration.bridge_service", *options]
    if specs is not None:
        command += ["--specs", json.dumps([[s.name, s.shape, s.dtype] for s in specs])]
    return ServiceProcess(command, tmp_path / "service.log", start_timeout=DEADLINE, security=security)


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"waited {DEADLINE:.0f} s for {what}"
        time.sleep(0.02)


def weights(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(spec.shape).astype(spec.dtype) for spec in SPECS]


class Arrays(Weights):
    """Arrays as a learner's weights, whole tensors, a bucket each. `on_bucket` is called with its number before each."""

    def __init__(
        self,
        arrays: list[np.ndarray],
        specs: list[TensorSpec] = SPECS,
        on_bucket: Callable[[int], object] = lambda number: None,
    ) -> None:
        whole = [(((0,) * len(spec.shape), spec.shape),) for spec in specs]
        super().__init__([Cut(s.name, s.shape, s.dtype, cut) for s, cut in zip(specs, whole, strict=True)])
        self.arrays, self.on_bucket = arrays, on_bucket

    def buckets(self) -> Iterator[list[Piece]]:
        for number, array in enumerate(self.arrays):
            self.on_bucket(number)
            yield [Piece(number, 0, array.reshape(-1).view(np.uint8), array.dtype.itemsize)]

    def sample(self) -> list[Piece]:
        return [Piece(0, 0, self.arrays[0].reshape(-1).view(np.uint8), self.arrays[0].dtype.itemsize)]


def level(arrays: list[np.ndarray]) -> float:
    """What the test engine gives as every logprob under these weights."""
    return float(np.float32(sum(float(np.asarray(a, np.float64).sum()) for a in arrays)))


def key(version: int, epoch: int = 1, run: str = "run") -> pb.WeightsKey:
    return pb.WeightsKey(run=run, epoch=epoch, version=version)


def begin(
    stub: Stub, weights_key: pb.WeightsKey, specs: list[TensorSpec] | None = None, base: pb.WeightsKey | None = None
) -> pb.PushState:
    manifest = [pb.TensorSpec(name=s.name, shape=s.shape, dtype=s.dtype) for s in specs or SPECS]
    request = pb.BeginRequest(weights=weights_key, manifest=manifest, lease_seconds=DEADLINE, base=base)
    state: pb.PushState = stub.begin(request, timeout=DEADLINE)
    return state


def missing_frames(state: pb.PushState, arrays: list[np.ndarray]) -> list[frames.Frame]:
    return [
        frame
        for gap in state.missing
        for frame in slice_frames(
            state.push_id, gap.tensor, gap.slice, memoryview(arrays[gap.tensor].tobytes()), [(gap.offset, gap.length)]
        )
    ]


def through_grpc(state: pb.PushState) -> pb.PushState:
    """As if the data port were not reached."""
    state.ClearField("data_port")
    return state


def commit(stub: Stub, weights_key: pb.WeightsKey, phase: int) -> pb.PushState:
    request = pb.CommitRequest(weights=weights_key, phase=pb.Phase.Name(phase))
    state: pb.PushState = stub.commit(request, timeout=DEADLINE)
    return state


def push(stub: Stub, weights_key: pb.WeightsKey, arrays: list[np.ndarray]) -> pb.PushState:
    state = begin(stub, weights_key)
    stub.push(state, iter(missing_frames(state, arrays)), DEADLINE)
    commit(stub, weights_key, pb.PREPARE)
    return commit(stub, weights_key, pb.APPLY)
