"""The files of a Hugging Face checkpoint folder: which ones hold weights, and writing a folder all at once.

A folder is written beside its place and moved there when it is complete, so a run that dies never leaves half a model.
Nothing here knows the decoder, and nothing needs jax.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from rollout.errors import UserError
from rollout.types import TensorSpec

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 4_000_000_000
# What a tokenizer, its chat template and generation need; everything else in a source folder stays there.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)


class CheckpointError(UserError):
    """A checkpoint folder that cannot be read or written; the message names file or tensor and what was expected."""


def read_index(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, in order."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a folder: a Hugging Face checkpoint folder is needed")
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    index = directory / INDEX
    if not index.is_file():
        pickled = sorted(directory.glob("*.bin"))
        hint = f"; {pickled[0].name} is a pickle and is not read: save as safetensors" if pickled else ""
        raise CheckpointError(f"{directory} holds neither {SINGLE} nor {INDEX}{hint}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors files: {error!r}") from error
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}: a file in the same folder is needed")
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory / name} is missing, but {INDEX} names it")
    return [directory / name for name in names]


def plan_shards(manifest: Iterable[TensorSpec], limit: int = SHARD_BYTES) -> list[list[TensorSpec]]:
    """Tensors in order, as many to a file as fit in `limit` bytes (at least one)."""
    shards: list[list[TensorSpec]] = []
    used = 0
    for spec in manifest:
        size = int(np.prod(spec.shape)) * (4 if spec.dtype == "float32" else 2)
        if not shards or used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(spec)
        used += size
    return shards


def write_checkpoint(
    directory: Path,
    manifest: list[TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
    config: dict[str, Any],
    tokenizer_source: str | Path | None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `tensors` (in the manifest's order), config.json and the tokenizer of `tokenizer_source` as one folder."""
    if directory.exists() and not (directory / "config.json").is_file() and any(directory.iterdir()):
        raise CheckpointError(f"{directory} exists and is not a checkpoint folder: name an empty or a new one")
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.parent / f".{directory.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _write_weights(partial, plan_shards(manifest, shard_bytes), iter(tensors))
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_tokenizer(tokenizer_source, partial)
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors makes its files private
        _move(partial, directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory} could not be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_weights(folder: Path, shards: list[list[TensorSpec]], tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    for number, specs in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        held: dict[str, np.ndarray] = {}
        for spec in specs:
            name, value = next(tensors)
            if (name, tuple(value.shape), str(value.dtype)) != (spec.name, spec.shape, spec.dtype):
                raise CheckpointError(f"{name} {value.dtype}{value.shape} was produced where {spec} is expected")
            held[name] = np.ascontiguousarray(value)  # save_file writes the buffer, whatever the strides say
            total += value.nbytes
            weight_map[name] = file
        save_file(held, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: str | Path | None, target: Path) -> None:
    """Copy tokenizer, chat template and generation settings from one folder to another."""
    if source is None:
        return
    found = [Path(source) / name for name in TOKENIZER_FILES if (Path(source) / name).is_file()]
    if not any(file.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for file in found):
        raise CheckpointError(f"{source} holds no tokenizer: tokenizer.json, tokenizer.model or vocab.json is needed")
    for file in found:
        shutil.copyfile(file, target / file.name)


def _move(partial: Path, directory: Path) -> None:
    """Put the finished folder in its place; what was there goes away only after that."""
    old = directory.parent / f".{directory.name}.old-{os.getpid()}"
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
