"""New weights for a running SGLang engine, in buckets that its scheduler processes map instead of copying.

A bucket is one flat tensor in shared memory with a list of names, shapes, types and places. While the schedulers load
one, the next is filled, so two exist at a time. SGLang itself only warns about names it does not know and dies of shapes
that do not fit: what is handed to `load` must have been checked against the manifest.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from rollout.engine.base import EngineError
from rollout.engine.sglang_runtime import Runtime

T = TypeVar("T")
BUCKET_BYTES = 512 << 20
TIMEOUT = 600.0
"""Seconds that the schedulers may take for one bucket."""


@dataclass(frozen=True)
class Bucket:
    """Tensors to be loaded together. A tensor larger than a bucket has one to itself."""

    names: tuple[str, ...]
    size: int


def plan(tensors: Mapping[str, Any], limit: int) -> list[Bucket]:
    """Cuts the tensors into buckets, in their order. `limit` is in bytes."""
    out: list[Bucket] = []
    names: list[str] = []
    size = 0
    for name, value in tensors.items():
        if names and size + _aligned(value.nbytes) > limit:
            out.append(Bucket(tuple(names), size))
            names, size = [], 0
        names.append(name)
        size += _aligned(value.nbytes)
    return [*out, Bucket(tuple(names), size)]


def bucket_of(tensors: Mapping[str, Any]) -> Bucket:
    """All of them as one."""
    return Bucket(tuple(tensors), sum(_aligned(value.nbytes) for value in tensors.values()))


def load(runtime: Runtime, tensors: Mapping[str, Any], version: int, ranks: int) -> None:
    """Loads all `tensors` (numpy, by Hugging Face name) while generation is paused, and drops every cached prefix.

    `version` is stamped with the last bucket. Raises EngineError; the engine then holds nobody knows what.
    """
    from sglang.srt.managers.io_struct import (
        BeginWeightUpdateReqInput,
        EndWeightUpdateReqInput,
        UpdateWeightsFromTensorReqInput,
    )

    manager = runtime.manager
    _require(runtime.call(manager.begin_weight_update(BeginWeightUpdateReqInput()), "open an update", TIMEOUT))
    buckets = plan(tensors, BUCKET_BYTES)
    pending = None
    try:
        for number, payload in enumerate(payloads(tensors, buckets, ranks)):
            if pending is not None:
                _require(runtime.result(pending, "load a bucket of weights", TIMEOUT))
            last = number == len(buckets) - 1
            request = UpdateWeightsFromTensorReqInput(
                serialized_named_tensors=payload.serialized,
                load_format="flattened_bucket",
                flush_cache=last,
                weight_version=str(version) if last else None,
            )
            pending = runtime.submit(payload.keep(manager.update_weights_from_tensor(request)))
        if pending is not None:
            _require(runtime.result(pending, "load the last bucket of weights", TIMEOUT))
    finally:  # or no later update could begin
        ended = runtime.call(manager.end_weight_update(EndWeightUpdateReqInput()), "close an update", TIMEOUT)
    _require(ended)


@dataclass(frozen=True)
class Payload:
    """A filled bucket as SGLang takes it: a handle for each rank, because a handle of shared memory can be opened once.

    The receivers map `flat`, which must therefore live until they are done.
    """

    serialized: list[bytes]
    flat: Any

    async def keep(self, update: Coroutine[Any, Any, T]) -> T:
        answer = await update
        assert self.flat is not None
        return answer


def payloads(tensors: Mapping[str, Any], buckets: list[Bucket], ranks: int) -> Iterator[Payload]:
    """Each bucket, filled when it is asked for."""
    import torch
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorMetadata

    for bucket in buckets:
        flat = torch.empty(bucket.size, dtype=torch.uint8).share_memory_()
        memory, metadata, start = flat.numpy(), [], 0
        for name in bucket.names:
            value = np.ascontiguousarray(tensors[name])
            end = start + value.nbytes
            memory[start:end] = value.reshape(-1).view(np.uint8)
            dtype = getattr(torch, value.dtype.name)
            metadata.append(FlattenedTensorMetadata(name, torch.Size(value.shape), dtype, start, end, end - start))
            start += _aligned(value.nbytes)
        content = {"flattened_tensor": flat, "metadata": metadata}
        yield Payload([MultiprocessingSerializer.serialize(content) for _ in range(ranks)], flat)


def _require(answer: tuple[bool, str]) -> None:
    success, message = answer
    if not success:
        raise EngineError(f"SGLang refused: {message}")


def _aligned(size: int) -> int:
    return -(-size // 64) * 64
