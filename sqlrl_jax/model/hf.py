"""Weights to and from Hugging Face safetensors: one table of names, checked exhaustively both ways.

`hf_table` pairs every Hugging Face name with a parameter path, a layer and whether the matrix is transposed; reading,
writing, pushing and the manifest all follow it. Reading goes piece by piece and, with a mesh, only the slices that a
process's own devices hold. Saving goes tensor by tensor: where a process does not see every shard, the tensor is gathered
on all devices for a moment, and one process fetches and writes it. So no host ever holds the model whole.
Left out: pickled .bin files (loading one runs code) and quantised weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open

from rollout.types import TensorSpec
from sqlrl_jax.exchange import Exchange, exchange
from sqlrl_jax.mesh import param_sharding
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.hf_files import DTYPES, SHARD_BYTES, CheckpointError, Crew, read_index, write_checkpoint
from sqlrl_jax.model.params import Params, ParamSpec, flatten, nest, param_specs
from sqlrl_jax.model.transpose import transposed

_DTYPES = {theirs: ours for ours, theirs in DTYPES.items()}
_PIECE_BYTES = 256_000_000
"""Stacked layers are read in pieces of this many bytes, but at least one layer."""
# Written by old releases of transformers; computed from config.json here.
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

# Parameter path below "layers." → (name below "model.layers.N.", transposed)
_LAYER_NAMES = {
    "attention_norm": ("input_layernorm.weight", False),
    "q": ("self_attn.q_proj.weight", True),
    "k": ("self_attn.k_proj.weight", True),
    "v": ("self_attn.v_proj.weight", True),
    "o": ("self_attn.o_proj.weight", True),
    "q_bias": ("self_attn.q_proj.bias", False),
    "k_bias": ("self_attn.k_proj.bias", False),
    "v_bias": ("self_attn.v_proj.bias", False),
    "q_norm": ("self_attn.q_norm.weight", False),
    "k_norm": ("self_attn.k_norm.weight", False),
    "mlp_norm": ("post_attention_layernorm.weight", False),
    "gate": ("mlp.gate_proj.weight", True),
    "up": ("mlp.up_proj.weight", True),
    "down": ("mlp.down_proj.weight", True),
}
_NAMES = {"embedding": (_EMBEDDING, False), "final_norm": ("model.norm.weight", False), "lm_head": (_HEAD, True)}


@dataclass(frozen=True)
class Entry:
    """One Hugging Face tensor: where it lies among the parameters (`layer` indexes the leading axis)."""

    name: str
    path: str
    layer: int | None
    transpose: bool
    shape: tuple[int, ...]
    """Shape of the Hugging Face tensor."""


def hf_table(config: ModelConfig) -> list[Entry]:
    """Every tensor of a checkpoint of this model, layer by layer."""
    specs = param_specs(config)
    layers = [p.removeprefix("layers.") for p in specs if p.startswith("layers.")]
    places = [("embedding", None), *((p, i) for i in range(config.num_hidden_layers) for p in layers)]
    places += [(p, None) for p in ("final_norm", "lm_head") if p in specs]
    table = []
    for path, layer in places:
        if layer is None:
            (name, transpose), full, shape = _NAMES[path], path, specs[path].shape
        else:
            suffix, transpose = _LAYER_NAMES[path]
            name, full = f"model.layers.{layer}.{suffix}", f"layers.{path}"
            shape = specs[full].shape[1:]
        table.append(Entry(name, full, layer, transpose, shape[::-1] if transpose else shape))
    return table


def hf_manifest(config: ModelConfig, dtype: str) -> list[TensorSpec]:
    """Name, shape and dtype of every tensor that a push or an export of this model holds."""
    return [TensorSpec(e.name, e.shape, dtype) for e in hf_table(config)]


def _entry_tensor(flat: Mapping[str, Any], entry: Entry, dtype: Any) -> Any:
    value = flat[entry.path] if entry.layer is None else flat[entry.path][entry.layer]
    return (value.T if entry.transpose else value).astype(dtype)


def to_hf_tensors(params: Params, config: ModelConfig, dtype: str) -> dict[str, jax.Array]:
    """All tensors under their Hugging Face names. Meant to be jitted: conversion and cast are then one program."""
    flat = flatten(params)
    return {e.name: _entry_tensor(flat, e, jnp.dtype(dtype)) for e in hf_table(config)}


def from_hf_tensors(tensors: Mapping[str, Any], config: ModelConfig, dtype: str) -> Params:
    """The inverse of `to_hf_tensors`, for numpy or jax arrays. Raises CheckpointError naming what does not fit."""
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    check_names(shapes, config, "the tensors given")
    parts: dict[str, list[Any]] = {}
    for e in hf_table(config):
        value = tensors[e.name]
        if e.transpose:
            value = transposed(value) if isinstance(value, np.ndarray) else value.T
        parts.setdefault(e.path, []).append(jnp.asarray(value, jnp.dtype(dtype)))
    return nest({path: jnp.stack(p) if path.startswith("layers.") else p[0] for path, p in parts.items()})


def check_names(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, where: str) -> None:
    """Raise CheckpointError unless `shapes` holds exactly the tensors of `config`, each with its shape."""
    wanted = {e.name: e.shape for e in hf_table(config)}
    known = {n for n in shapes if n in wanted or _IGNORED.fullmatch(n)}
    if config.tie_word_embeddings and _HEAD in shapes:
        known.add(_HEAD)
    problems = [f"{n} is missing" for n in wanted if n not in shapes]
    problems += [f"{n} is not a tensor of this model" for n in shapes if n not in known]
    for name in known:
        want = wanted.get(name, wanted[_EMBEDDING] if name == _HEAD else None)
        if want is not None and shapes[name] != want:
            problems.append(f"{name} has shape {shapes[name]}, config.json asks for {want}")
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise CheckpointError(f"{where}: {'; '.join(sorted(problems)[:8])}{more}")


class Reader:
    """The tensors of a checkpoint folder, opened and checked; reads any slice. Use as a context manager."""

    def __init__(self, directory: str | Path, config: ModelConfig) -> None:
        self.directory, self.config = Path(directory), config
        self._stack = ExitStack()
        self._slices: dict[str, Any] = {}
        self._files: dict[str, Path] = {}
        self.dtypes: dict[str, str] = {}

    def __enter__(self) -> Reader:
        try:
            for file in read_index(self.directory):
                self._open(file)
            shapes = {n: tuple(s.get_shape()) for n, s in self._slices.items()}
            check_names(shapes, self.config, str(self.directory))
            self._check_tied_head()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._slices.clear()
        self._stack.close()

    def _open(self, file: Path) -> None:
        try:
            opened = self._stack.enter_context(safe_open(file, framework="np"))
            names = opened.keys()
            slices = {name: opened.get_slice(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged or incomplete ({error}): copy it again") from error
        for name, part in slices.items():
            if name in self._slices:
                raise CheckpointError(f"{name} is in {self._files[name].name} and again in {file.name}")
            if part.get_dtype() not in _DTYPES:
                raise CheckpointError(f"{file}: {name} has type {part.get_dtype()}; {', '.join(_DTYPES)} can be read")
            self.dtypes[name] = _DTYPES[part.get_dtype()]
            self._files[name] = file
        self._slices |= slices

    def _check_tied_head(self) -> None:
        """transformers ties the output matrix to the embedding whatever the file holds; both are the same, or refused."""
        if self.config.tie_word_embeddings and _HEAD in self._slices:
            for start in range(0, self.config.vocab_size, 8192):
                rows = slice(start, min(start + 8192, self.config.vocab_size))
                if not np.array_equal(self._slices[_HEAD][rows], self._slices[_EMBEDDING][rows]):
                    raise CheckpointError(
                        f"{self._files[_HEAD]}: {_HEAD} differs from {_EMBEDDING} although config.json says"
                        " tie_word_embeddings true: set it to false to use both"
                    )

    def dtype(self) -> str:
        """The one type all tensors have, or float32 when they differ."""
        types = {self.dtypes[e.name] for e in hf_table(self.config)}
        return types.pop() if len(types) == 1 else "float32"

    def read(self, entry: Entry, index: tuple[slice, ...] = (), dtype: str = "float32") -> np.ndarray:
        """One tensor in our orientation, or the part of it that `index` selects."""
        index = index or (slice(None),) * len(entry.shape)
        try:
            value = self._slices[entry.name][index[::-1] if entry.transpose else index]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._files[entry.name]}: {entry.name} cannot be read ({error})") from error
        return (value.T if entry.transpose else value).astype(_numpy_dtype(dtype))


def _numpy_dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def load_hf(
    directory: str | Path,
    config: ModelConfig | None = None,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    piece_bytes: int = _PIECE_BYTES,
) -> Params:
    """The parameters of a checkpoint folder, split over `mesh` (or on the first device).

    A host holds `piece_bytes` of them at a time, or one tensor where that is more. Every process of the mesh must call
    this. Raises CheckpointError for a missing, unexpected, wrongly shaped or damaged tensor, ModelConfigError for
    config.json.
    """
    config = config or ModelConfig.from_dir(directory)
    entries: dict[str, list[Entry]] = {}
    for entry in hf_table(config):
        entries.setdefault(entry.path, []).append(entry)
    with Reader(directory, config) as reader:
        specs = param_specs(config)
        return nest({p: _place(reader, specs[p], entries[p], mesh, dtype, piece_bytes) for p in specs})


def _place(
    reader: Reader, spec: ParamSpec, entries: list[Entry], mesh: Mesh | None, dtype: str, piece_bytes: int
) -> jax.Array:
    sharding: Sharding = SingleDeviceSharding(jax.local_devices()[0])
    if mesh is not None:
        sharding = param_sharding(mesh, spec.axes, spec.units)

    def read(first: int, count: int) -> jax.Array:
        """Some of the layers; all of the parameter where it has none."""
        shape = spec.shape if entries[0].layer is None else (count, *spec.shape[1:])

        parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}  # devices that hold the same are asked for one by one

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            index = index or (slice(None),) * len(shape)
            bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
            if bounds not in parts:
                parts[bounds] = values(tuple(slice(*b) for b in bounds))  # safetensors wants plain bounds
            return parts[bounds]

        def values(index: tuple[slice, ...]) -> np.ndarray:
            if entries[0].layer is None:
                return reader.read(entries[0], index, dtype)
            out = np.empty([s.stop - s.start for s in index], _numpy_dtype(dtype))
            for row, entry in enumerate(entries[first : first + count][index[0]]):
                out[row] = reader.read(entry, index[1:], dtype)
            return out

        return jax.make_array_from_callback(shape, sharding, shard)

    # The whole mesh's bytes, not this process's: every process must go through the same pieces.
    at_once = max(1, piece_bytes // (math.prod(entries[0].shape) * _numpy_dtype(dtype).itemsize))
    if at_once >= len(entries):
        return read(0, len(entries))
    whole = jax.jit(lambda: jnp.zeros(spec.shape, dtype), out_shardings=sharding)()
    for first in range(0, len(entries), at_once):
        piece = read(first, min(at_once, len(entries) - first))
        whole = _insert(whole, piece, first).block_until_ready()  # or the host would run ahead with reading
    return whole


@partial(jax.jit, donate_argnums=0)
def _insert(whole: jax.Array, piece: jax.Array, first: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, piece, first, axis=0)


def save_hf(
    directory: str | Path,
    params: Params,
    config: ModelConfig,
    dtype: str | None = None,
    tokenizer_source: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    exchange: Exchange = exchange,
) -> None:
    """Write a Hugging Face checkpoint folder that transformers loads: weights in `dtype` (default: the model's own),
    config.json, and the tokenizer and chat template of `tokenizer_source`. The folder appears whole or not at all; a
    checkpoint that is there is replaced. Every process that holds a part of `params` must call this."""
    flat, entries, kept = flatten(params), {e.name: e for e in hf_table(config)}, dtype or config.dtype

    def produce(spec: TensorSpec) -> jax.Array:
        entry = entries[spec.name]
        value = jnp.asarray(flat[entry.path])
        layer = None if entry.layer is None else np.int32(entry.layer)
        split, everywhere = value.sharding, None
        if isinstance(split, NamedSharding) and not value.is_fully_addressable:
            everywhere = NamedSharding(split.mesh, PartitionSpec())
        return _converter(everywhere)(value, layer, entry.transpose, kept)

    write_checkpoint(
        Path(directory),
        hf_manifest(config, kept),
        produce,
        config.to_hf(kept),
        tokenizer_source,
        shard_bytes,
        Crew(jax.process_index(), jax.process_count(), exchange),
    )


@cache
def _converter(sharding: Sharding | None) -> Callable[..., jax.Array]:
    """One tensor of a parameter in Hugging Face's orientation. Compiled once for each kind, however often one saves."""

    def convert(value: jax.Array, layer: jax.Array | None, transpose: bool, dtype: str) -> jax.Array:
        part = value if layer is None else jax.lax.dynamic_index_in_dim(value, layer, keepdims=False)
        return (part.T if transpose else part).astype(jnp.dtype(dtype))

    return jax.jit(convert, static_argnums=(2, 3), out_shardings=sharding)
