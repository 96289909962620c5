"""Pushing: the learner's parameters become every rollout service's weights, all services or none.

One jitted call turns the parameter tree into Hugging Face tensors in the engine's dtype, sharded as they are; only shards
that this process owns (`replica_id == 0`) leave the device. They travel as raw frames; a broken transfer goes on from the
byte ranges that the service still misses. Two phases: every service has everything, checked, before any applies it. With
several learner processes each sends its own shards to every service, and process 0 leads through the phases.

Left out: sending only what changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np

from rollout import bridge_pb2 as pb
from rollout import frames
from rollout.channel import grpc
from rollout.client import RolloutClient
from rollout.stub import BridgeError, Stub, explain
from sqlrl_jax.config_lora import LoraConfig
from sqlrl_jax.distributed import World
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.hf import to_hf_tensors
from sqlrl_jax.model.peft import to_peft_tensors

T = TypeVar("T")

ATTEMPTS = 3
RETRY_SECONDS = 5.0  # for a service to answer again after a broken transfer


class PushError(BridgeError):
    """The weights did not arrive at `address`. The services go on with what they had, or are quarantined."""


@dataclass(frozen=True)
class _Problem:
    """Why a service did not do what it was asked. `alive`: it answers, so another attempt may go through."""

    address: str
    text: str
    transient: bool
    alive: bool


@dataclass(frozen=True)
class HostTensor:
    """A tensor as the bridge cuts it: all slices of all hosts in one order, and the bytes of those that are ours."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    slices: list[tuple[tuple[int, ...], tuple[int, ...]]]  # (start, size)
    owned: dict[int, np.ndarray]  # slice number → its bytes, uint8[n]

    def to_proto(self) -> pb.TensorSpec:
        cut = [pb.Slice(start=start, size=size) for start, size in self.slices]
        return pb.TensorSpec(name=self.name, shape=self.shape, dtype=self.dtype, slices=cut)


def host_tensor(name: str, array: jax.Array) -> HostTensor:
    """Brings the shards of `array` that this process owns to the host; every other shard stays where it is."""
    places = [_place(i, array.shape) for i in array.sharding.devices_indices_map(array.shape).values()]
    slices = sorted(set(places))
    owned = {}
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            data = np.ascontiguousarray(np.asarray(shard.data)).reshape(-1).view(np.uint8)
            owned[slices.index(_place(shard.index, array.shape))] = data
    return HostTensor(name, array.shape, array.dtype.name, slices, owned)


def _place(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    bounds = [part.indices(length) for part, length in zip(index, shape, strict=True)]
    return tuple(start for start, _, _ in bounds), tuple(stop - start for start, stop, _ in bounds)


class Pusher:
    """Pushes to all services of `client` as learner (run_id, epoch); `epoch` grows with each start of the run.

    `dtype` is the engine's ("float32", "bfloat16"). With the rank of `lora` above 0 what is pushed are adapters, under PEFT's
    names. `timeout` bounds one transfer, and the time a service keeps the bytes of one that does not go on.
    """

    def __init__(
        self,
        client: RolloutClient,
        model_config: ModelConfig,
        dtype: str,
        lora: LoraConfig | None = None,
        *,
        run_id: str,
        epoch: int,
        timeout: float = 300.0,
        world: World | None = None,
    ) -> None:
        self._world = world or World()
        self._client, self._run, self._epoch, self._timeout = client, run_id, epoch, timeout
        named = partial(to_peft_tensors, lora=lora) if lora and lora.rank else to_hf_tensors
        self._convert = jax.jit(partial(named, config=model_config, dtype=dtype))
        client.identify(run_id, epoch)

    def push(self, params: Any, version: int) -> dict[str, float]:
        """Makes trained `params` the weights of every service as `version`; returns seconds and bytes as bridge/… metrics.

        Idempotent: a service that has this version already is left alone. Raises PushError naming the service, in every
        process the same.
        """
        clock = _Clock()
        converted = jax.block_until_ready(self._convert(params))
        clock.lap("convert")
        tensors = [host_tensor(name, converted[name]) for name in sorted(converted)]
        clock.lap("device_to_host")
        key = pb.WeightsKey(run=self._run, epoch=self._epoch, version=version)
        sent = self._stage(key, tensors)
        clock.lap("wire")
        states = self._apply(key)
        clock.lap("apply")
        size = sum(data.nbytes for tensor in tensors for data in tensor.owned.values())
        totals = self._world.gather("bytes pushed", [size, sent])
        return clock.seconds | {
            "bridge/pause_seconds": max((state.pause_seconds for state in states), default=0.0),
            "bridge/model_bytes": float(sum(size for size, _ in totals)),
            "bridge/sent_bytes": float(sum(sent for _, sent in totals)),
            "bridge/services": float(len(self._client.stubs)),
        }

    def _stage(self, key: pb.WeightsKey, tensors: Sequence[HostTensor]) -> int:
        """Brings every service everything, checked; returns the bytes that this process sent. Raises PushError.

        Each process sends its shards; when all have, process 0 has the services check that they are whole. Another attempt
        goes on where a broken one stopped, because Begin tells what is missing.
        """
        manifest = [tensor.to_proto() for tensor in tensors]
        begin = pb.BeginRequest(weights=key, manifest=manifest, lease_seconds=self._timeout)
        sent = 0
        for attempt in range(1, ATTEMPTS + 1):
            bytes_sent, problems = self._everywhere(lambda stub: self._send(stub, begin, tensors))
            sent += sum(bytes_sent)
            problems = self._of_all("pushed", problems) or self._commit(key, pb.PREPARE)[1]
            if not problems:
                return sent
            worst = min(problems, key=lambda problem: (problem.transient, problem.alive))
            if attempt == ATTEMPTS or not worst.transient or not worst.alive:
                break
        self._abort(key)
        raise PushError(
            worst.address,
            f"pushing weight version {key.version} failed (attempt {attempt} of {ATTEMPTS}): {worst.text}",
            transient=worst.transient,
        )

    def _send(self, stub: Stub, begin: pb.BeginRequest, tensors: Sequence[HostTensor]) -> int:
        """Begin and Push on one service; returns the bytes sent. Raises grpc.RpcError."""
        state = stub.begin(begin, timeout=self._timeout)
        mine = list(owned_ranges(tensors, state.missing))
        if not mine:
            return 0
        sent: int = stub.push(frames_of(tensors, state.push_id, mine), timeout=self._timeout).bytes
        return sent

    def _apply(self, key: pb.WeightsKey) -> list[pb.PushState]:
        """Every service takes the new weights. Returns their states in process 0. Raises PushError."""
        states, problems = self._commit(key, pb.APPLY)
        if problems:
            raise PushError(problems[0].address, f"weight version {key.version} was not applied: {problems[0].text}")
        return states

    def _commit(self, key: pb.WeightsKey, phase: pb.Phase) -> tuple[list[pb.PushState], list[_Problem]]:
        """Process 0 takes all services through a phase; the others wait for what came of it."""
        request = pb.CommitRequest(weights=key, phase=phase)
        states: list[pb.PushState] = []
        problems: list[_Problem] = []
        if self._world.is_main:
            states, problems = self._everywhere(lambda stub: stub.commit(request, timeout=self._timeout))
        return states, self._of_all("committed", problems)

    def _everywhere(self, function: Callable[[Stub], T]) -> tuple[list[T], list[_Problem]]:
        """Calls `function` for all services at the same time; waits for all. Returns the results and what went wrong."""

        def call(stub: Stub) -> T | _Problem:
            try:
                return function(stub)
            except grpc.RpcError as error:
                problem = explain(stub.address, error)
            alive = not problem.transient or stub.healthy(RETRY_SECONDS, wait=True)
            return _Problem(stub.address, str(problem), problem.transient, alive)

        stubs = self._client.stubs
        with ThreadPoolExecutor(len(stubs), thread_name_prefix="push") as pool:
            done = list(pool.map(call, stubs))
        return [d for d in done if not isinstance(d, _Problem)], [d for d in done if isinstance(d, _Problem)]

    def _of_all(self, name: str, problems: list[_Problem]) -> list[_Problem]:
        """The problems of all processes, in every process."""
        return [_Problem(*p) for part in self._world.gather(name, [astuple(p) for p in problems]) for p in part]

    def _abort(self, key: pb.WeightsKey) -> None:
        """Tells all services to forget a push that has failed somewhere; leases cover those that cannot be told."""
        for stub in self._client.stubs if self._world.is_main else ():
            call = stub.abort.future(pb.AbortRequest(weights=key), timeout=5.0)
            call.exception()


def owned_ranges(tensors: Sequence[HostTensor], missing: Sequence[pb.ByteRange]) -> Iterator[pb.ByteRange]:
    """Those of `missing` that lie in slices of ours."""
    return (gap for gap in missing if gap.slice in tensors[gap.tensor].owned)


def frames_of(tensors: Sequence[HostTensor], push: int, missing: Sequence[pb.ByteRange]) -> Iterator[bytes]:
    """The frames that a service still misses, of the slices that are ours, in the order of `missing`."""
    wanted: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for gap in owned_ranges(tensors, missing):
        wanted.setdefault((gap.tensor, gap.slice), []).append((gap.offset, gap.length))
    for (tensor, part), ranges in wanted.items():
        yield from frames.slice_frames(push, tensor, part, tensors[tensor].owned[part].data, ranges)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[f"bridge/{name}_seconds"] = now - self._last
        self._last = now
