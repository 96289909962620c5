"""Pushing: the learner's parameters become every rollout service's weights, all services or none.

One jitted call turns the parameter tree into Hugging Face tensors in the engine's dtype, sharded as they are; only shards
that this process owns (`replica_id == 0`) leave the device. They travel as raw frames; a broken transfer goes on from the
byte ranges that the service still misses. Two phases: every service has everything, checked, before any applies it.

Left out: several learner processes (they need a barrier between the phases) and sending only what changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from rollout import bridge_pb2 as pb
from rollout import frames
from rollout.channel import grpc
from rollout.client import RolloutClient
from rollout.stub import BridgeError, Stub, explain
from sqlrl_jax.config_lora import LoraConfig
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.hf import to_hf_tensors
from sqlrl_jax.model.peft import to_peft_tensors

ATTEMPTS = 3
RETRY_SECONDS = 5.0  # for a service to answer again after a broken transfer


class PushError(BridgeError):
    """The weights did not arrive at `address`. The services go on with what they had, or are quarantined."""


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
    ) -> None:
        self._client, self._run, self._epoch, self._timeout = client, run_id, epoch, timeout
        named = partial(to_peft_tensors, lora=lora) if lora and lora.rank else to_hf_tensors
        self._convert = jax.jit(partial(named, config=model_config, dtype=dtype))
        client.identify(run_id, epoch)

    def push(self, params: Any, version: int) -> dict[str, float]:
        """Makes trained `params` the weights of every service as `version`; returns seconds and bytes as bridge/… metrics.

        Idempotent: a service that has this version already is left alone. Raises PushError naming the service.
        """
        clock = _Clock()
        converted = jax.block_until_ready(self._convert(params))
        clock.lap("convert")
        tensors = [host_tensor(name, converted[name]) for name in sorted(converted)]
        clock.lap("device_to_host")
        key = pb.WeightsKey(run=self._run, epoch=self._epoch, version=version)
        stubs = self._client.stubs
        try:
            sent = self._everywhere(lambda stub: self._stage(stub, key, tensors))
        except PushError:
            self._abort(key)
            raise
        clock.lap("wire")
        states = self._everywhere(lambda stub: self._apply(stub, key))
        clock.lap("apply")
        size = sum(data.nbytes for tensor in tensors for data in tensor.owned.values())
        return clock.seconds | {
            "bridge/pause_seconds": max(state.pause_seconds for state in states),
            "bridge/model_bytes": float(size),
            "bridge/sent_bytes": float(sum(sent)),
            "bridge/services": float(len(stubs)),
        }

    def _everywhere(self, function: Callable[[Stub], Any]) -> list[Any]:
        """Calls `function` for all services at the same time; waits for all, then raises the first error."""
        stubs = self._client.stubs
        with ThreadPoolExecutor(len(stubs), thread_name_prefix="push") as pool:
            futures = [pool.submit(function, stub) for stub in stubs]
        return [future.result() for future in futures]

    def _stage(self, stub: Stub, key: pb.WeightsKey, tensors: Sequence[HostTensor]) -> int:
        """Begin, Push and PREPARE on one service; returns the bytes sent. Goes on where a broken attempt stopped."""
        manifest = [tensor.to_proto() for tensor in tensors]
        begin = pb.BeginRequest(weights=key, manifest=manifest, lease_seconds=self._timeout)
        sent, attempt = 0, 1
        while True:
            try:
                state = stub.begin(begin, timeout=self._timeout)
                if state.missing:
                    stream = frames_of(tensors, state.push_id, state.missing)
                    sent += stub.push(stream, timeout=self._timeout).bytes
                stub.commit(pb.CommitRequest(weights=key, phase=pb.PREPARE), timeout=self._timeout)
                return sent
            except grpc.RpcError as error:
                problem = explain(stub.address, error)
            if not problem.transient or attempt == ATTEMPTS or not stub.healthy(RETRY_SECONDS, wait=True):
                raise PushError(
                    stub.address,
                    f"pushing weight version {key.version} failed (attempt {attempt} of {ATTEMPTS}): {problem}",
                    transient=problem.transient,
                )
            attempt += 1

    def _apply(self, stub: Stub, key: pb.WeightsKey) -> pb.PushState:
        try:
            state: pb.PushState = stub.commit(pb.CommitRequest(weights=key, phase=pb.APPLY), timeout=self._timeout)
        except grpc.RpcError as error:
            raise PushError(
                stub.address, f"weight version {key.version} was not applied: {explain(stub.address, error)}"
            ) from None
        return state

    def _abort(self, key: pb.WeightsKey) -> None:
        """Tells all services to forget a push that has failed somewhere; leases cover those that cannot be told."""
        for stub in self._client.stubs:
            call = stub.abort.future(pb.AbortRequest(weights=key), timeout=5.0)
            call.exception()


def frames_of(tensors: Sequence[HostTensor], push: int, missing: Sequence[pb.ByteRange]) -> Iterator[bytes]:
    """The frames that a service still misses, of the slices that are ours, in the order of `missing`."""
    wanted: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for gap in missing:
        if gap.slice in tensors[gap.tensor].owned:
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
