"""The learner's parameters as a push sends them: Hugging Face tensors in the engine's dtype, bucket after bucket.

A bucket is one layer, or one of the tensors outside the layers (all adapters together make one). A jitted call turns it into
tensors sharded as the parameters are; of those each process copies to its host the shards that it owns (`replica_id == 0`).
While one bucket is being sent a thread converts and copies the next, so a push needs memory for about three buckets, never
for another copy of the model. How the devices cut each tensor is known beforehand, from the compiled program.

Hugging Face's matrices lie the other way round than ours. Accelerators turn them round in the jitted call; XLA's transposes
for CPUs are slow (0.1 GB/s where 2 are possible), so there it is done on the host.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from rollout import bridge_pb2 as pb
from rollout.wire import numpy_dtype
from sqlrl_jax.config_lora import LoraConfig
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.hf import Entry, hf_table
from sqlrl_jax.model.params import Params, flatten
from sqlrl_jax.model.peft import peft_table, to_peft_tensors
from sqlrl_jax.model.transpose import transposed

Place = tuple[tuple[int, ...], tuple[int, ...]]
"""(start, size) of a rectangle of a tensor."""


@dataclass(frozen=True)
class Cut:
    """A tensor as the bridge cuts it: the slices of all hosts' devices, in one order."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    slices: tuple[Place, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize

    def to_proto(self) -> pb.TensorSpec:
        cut = [pb.Slice(start=start, size=size) for start, size in self.slices]
        return pb.TensorSpec(name=self.name, shape=self.shape, dtype=self.dtype, slices=cut)


@dataclass(frozen=True)
class Piece:
    """The bytes of a slice that this process owns: uint8[n] of values of `width` bytes."""

    tensor: int
    slice: int
    data: np.ndarray
    width: int


class Weights:
    """What is pushed: its tensors, and their bytes in buckets. `buckets` may be gone through more than once; all processes
    must do so together, because the buckets are computed by all of them."""

    def __init__(self, cuts: list[Cut]) -> None:
        self.cuts = cuts
        self.waited = {"convert": 0.0}
        """Seconds that sending had to wait for the next bucket."""

    def buckets(self) -> Iterator[list[Piece]]:
        raise NotImplementedError

    def sample(self) -> list[Piece]:
        """One bucket, to judge by how much has changed."""
        return next(iter(self.buckets()))


@dataclass(frozen=True)
class _Group:
    """Tensors that are converted together: program(params, *arguments) gives them in the order of `names`. Those that are
    `turned` are still to be transposed, on the host."""

    names: tuple[str, ...]
    turned: tuple[bool, ...]
    program: Any
    arguments: tuple[Any, ...] = ()


class Converter:
    """Makes `Weights` of parameters. `dtype` is the engine's; with adapters, they alone are pushed, under PEFT's names."""

    def __init__(self, config: ModelConfig, dtype: str, lora: LoraConfig | None = None) -> None:
        adapters = lora is not None and lora.rank > 0
        self._groups = _adapter_groups(config, lora, dtype) if lora and adapters else _model_groups(config, dtype)
        self._compiled: list[_Group] = []
        self._cuts: list[Cut] = []
        self._like: Any = None

    def weights(self, params: Params) -> Weights:
        """The weights to push. Compiles when parameters of this kind (shapes, shardings) come for the first time."""
        like = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), params)
        if self._like != like:
            self._compile(params)
            self._like = like
        return _Converted(self._cuts, self._compiled, params)

    def _compile(self, params: Params) -> None:
        programs: dict[int, Any] = {}
        self._compiled, self._cuts = [], []
        for group in self._groups:
            if id(group.program) not in programs:
                programs[id(group.program)] = group.program.lower(params, *group.arguments).compile()
            compiled = programs[id(group.program)]
            self._compiled.append(_Group(group.names, group.turned, compiled, group.arguments))
            out = jax.eval_shape(group.program, params, *group.arguments)
            tensors = zip(group.names, out, compiled.output_shardings, group.turned, strict=True)
            self._cuts += [_cut(name, like.shape, like.dtype, where, turn) for name, like, where, turn in tensors]


class _Converted(Weights):
    def __init__(self, cuts: list[Cut], groups: list[_Group], params: Params) -> None:
        super().__init__(cuts)
        self._groups, self._params = groups, params

    def buckets(self) -> Iterator[list[Piece]]:
        firsts = itertools.accumulate((len(group.names) for group in self._groups), initial=0)
        work = list(zip(firsts, self._groups, strict=False))
        with ThreadPoolExecutor(1, thread_name_prefix="convert") as ahead:
            coming = ahead.submit(self._bucket, *work[0])
            for following in [*work[1:], None]:
                started = time.monotonic()
                bucket = coming.result()
                self.waited["convert"] += time.monotonic() - started
                if following is not None:
                    coming = ahead.submit(self._bucket, *following)
                yield bucket

    def sample(self) -> list[Piece]:
        middle = len(self._groups) // 2
        return self._bucket(sum(len(group.names) for group in self._groups[:middle]), self._groups[middle])

    def _bucket(self, first: int, group: _Group) -> list[Piece]:
        """Converts a bucket and copies it to the host. `first` is the number of its first tensor."""
        arrays = group.program(self._params, *group.arguments)
        for array in arrays:
            for shard in array.addressable_shards:
                if shard.replica_id == 0:
                    shard.data.copy_to_host_async()
        numbered = zip(itertools.count(first), arrays, group.turned, strict=False)
        return [piece for i, array, turn in numbered for piece in pieces(i, self.cuts[i], array, turn)]


def pieces(tensor: int, cut: Cut, array: jax.Array, turn: bool = False) -> Iterator[Piece]:
    """The shards of `array` that this process owns, on the host, transposed where it is to be turned; every other shard stays
    where it is."""
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            data, place = np.asarray(shard.data), _place(shard.index, array.shape)
            if turn:
                data, place = transposed(data), (place[0][::-1], place[1][::-1])
            flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
            yield Piece(tensor, cut.slices.index(place), flat, array.dtype.itemsize)


def cut_of(name: str, array: jax.Array) -> Cut:
    """How the devices cut `array`."""
    return _cut(name, array.shape, array.dtype, array.sharding, False)


def _cut(name: str, shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding, turn: bool) -> Cut:
    places = {_place(index, shape) for index in sharding.devices_indices_map(shape).values()}
    if turn:
        shape, places = shape[::-1], {(start[::-1], size[::-1]) for start, size in places}
    return Cut(name, shape, np.dtype(dtype).name, tuple(sorted(places)))


def _place(index: tuple[slice, ...], shape: tuple[int, ...]) -> Place:
    bounds = [part.indices(length) for part, length in zip(index, shape, strict=True)]
    return tuple(start for start, _, _ in bounds), tuple(stop - start for start, stop, _ in bounds)


def _model_groups(config: ModelConfig, dtype: str) -> list[_Group]:
    """One program for all layers, told which, and one for each tensor outside them."""
    on_host = jax.default_backend() == "cpu"
    groups: dict[int | str, list[Entry]] = {}
    for entry in hf_table(config):
        groups.setdefault(entry.name if entry.layer is None else entry.layer, []).append(entry)
    layers = jax.jit(partial(_layer, tuple(groups[0]), dtype, not on_host))
    out = []
    for entries in groups.values():
        names, layer = tuple(entry.name for entry in entries), entries[0].layer
        turned = tuple(entry.transpose and on_host for entry in entries)
        if layer is None:
            outside = jax.jit(partial(_outside, tuple(entries), dtype, not on_host))
            out.append(_Group(names, turned, outside))
        else:
            out.append(_Group(names, turned, layers, (np.int32(layer),)))
    return out


def _layer(
    entries: tuple[Entry, ...], dtype: str, turn: bool, params: Params, layer: jax.Array
) -> tuple[jax.Array, ...]:
    flat = flatten(params)
    parts = ((e, jax.lax.dynamic_index_in_dim(flat[e.path], layer, keepdims=False)) for e in entries)
    return tuple((part.T if e.transpose and turn else part).astype(dtype) for e, part in parts)


def _outside(entries: tuple[Entry, ...], dtype: str, turn: bool, params: Params) -> tuple[jax.Array, ...]:
    flat = flatten(params)
    return tuple((flat[e.path].T if e.transpose and turn else flat[e.path]).astype(dtype) for e in entries)


def _adapter_groups(config: ModelConfig, lora: LoraConfig, dtype: str) -> list[_Group]:
    names = tuple(entry.name for entry in peft_table(config, lora))

    def program(params: Params) -> tuple[jax.Array, ...]:
        tensors = to_peft_tensors(params, config, lora, dtype)
        return tuple(tensors[name] for name in names)

    return [_Group(names, (False,) * len(names), jax.jit(program))]
