"""Adapters as PEFT folders and under PEFT's names: what SGLang and the peft library load, and what a push sends.

    adapter_config.json         rank, alpha, target modules, the base model's folder
    adapter_model.safetensors   base_model.model.model.layers.N.self_attn.q_proj.lora_A.weight [rank, in], lora_B [out, rank]

A folder is checked whole when it is read. Left out: several adapters in one folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rollout.types import TensorSpec
from sqlrl_jax.config_lora import LoraConfig, targets
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.hf import Entry, hf_table
from sqlrl_jax.model.hf_files import CheckpointError
from sqlrl_jax.model.params import Params, flatten, nest
from sqlrl_jax.model.peft_config import CONFIG, WEIGHTS, adapter_config, require_adapter


def peft_table(config: ModelConfig, lora: LoraConfig) -> list[Entry]:
    """Every tensor of an adapter, layer by layer. All are stored the other way round than ours."""
    matrices = {f"layers.{name}" for name in targets(lora)}
    table = []
    for entry in (e for e in hf_table(config) if e.path in matrices):
        stem, (outer, inner) = f"base_model.model.{entry.name.removesuffix('.weight')}", entry.shape
        for letter, shape in (("A", (lora.rank, inner)), ("B", (outer, lora.rank))):
            path = f"{entry.path}_{letter.lower()}"
            table.append(Entry(f"{stem}.lora_{letter}.weight", path, entry.layer, True, shape))
    return table


def peft_manifest(config: ModelConfig, lora: LoraConfig, dtype: str) -> list[TensorSpec]:
    """Name, shape and dtype of every tensor that a push of adapters holds."""
    return [TensorSpec(entry.name, entry.shape, dtype) for entry in peft_table(config, lora)]


def to_peft_tensors(adapters: Params, config: ModelConfig, lora: LoraConfig, dtype: str) -> dict[str, jax.Array]:
    """All adapters under PEFT's names, without the scale. Meant to be jitted."""
    flat = flatten(adapters)
    return {e.name: flat[e.path][e.layer].T.astype(dtype) for e in peft_table(config, lora)}


def from_peft_tensors(tensors: Mapping[str, Any], config: ModelConfig, lora: LoraConfig, dtype: str) -> Params:
    """The inverse of `to_peft_tensors`, on the host. Raises CheckpointError naming what does not fit."""
    table = peft_table(config, lora)
    wanted, got = {e.name: e.shape for e in table}, {name: tuple(value.shape) for name, value in tensors.items()}
    problems = [f"{name} is missing" for name in wanted if name not in got]
    problems += [f"{name} is not a tensor of this adapter" for name in got if name not in wanted]
    problems += [
        f"{name} has shape {got[name]} instead of {shape}"
        for name, shape in wanted.items()
        if got.get(name, shape) != shape
    ]
    if problems:
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise CheckpointError(f"the adapter does not fit: {'; '.join(problems[:4])}{more}")
    parts: dict[str, list[np.ndarray]] = {}
    for e in table:
        parts.setdefault(e.path, []).append(np.asarray(tensors[e.name]).T)
    return nest({path: np.stack(part).astype(jnp.dtype(dtype)) for path, part in parts.items()})


def save_peft(
    directory: str | Path,
    adapters: Params,
    config: ModelConfig,
    lora: LoraConfig,
    base: str | Path,
    dtype: str = "float32",
) -> None:
    """Writes a PEFT folder; it appears whole or not at all, and one that is there is replaced. Every process of the
    adapters' mesh must call this; process 0 writes."""
    sharding = jax.tree.leaves(adapters)[0].sharding
    everywhere = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    convert = partial(to_peft_tensors, config=config, lora=lora, dtype=dtype)
    tensors = jax.jit(convert, out_shardings=everywhere)(adapters)
    if jax.process_index() != 0:
        return
    directory = Path(directory)
    if directory.exists() and not (directory / CONFIG).is_file() and any(directory.iterdir()):
        raise CheckpointError(f"{directory} exists and is not an adapter folder: name an empty or a new one")
    partial_folder = directory.parent / f".{directory.name}.partial-{os.getpid()}"
    try:
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir(parents=True)
        held = {name: np.ascontiguousarray(value) for name, value in jax.device_get(tensors).items()}
        save_file(held, partial_folder / WEIGHTS, metadata={"format": "pt"})
        (partial_folder / WEIGHTS).chmod(0o644)  # safetensors makes its files private
        text = json.dumps(adapter_config(lora, base), indent=2)
        (partial_folder / CONFIG).write_text(text + "\n", encoding="utf-8")
        shutil.rmtree(directory, ignore_errors=True)
        partial_folder.rename(directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory} could not be written: {error}") from error
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def load_peft(directory: str | Path, config: ModelConfig, lora: LoraConfig, dtype: str = "float32") -> Params:
    """The adapters of a PEFT folder, on the host. Raises CheckpointError unless they are what `lora` asks for."""
    require_adapter(directory, lora)
    file = Path(directory) / WEIGHTS
    try:
        with safe_open(file, framework="np") as opened:
            names = opened.keys()
            tensors = {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is missing, damaged or incomplete ({error}): copy it again") from error
    try:
        return from_peft_tensors(tensors, config, lora, dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
