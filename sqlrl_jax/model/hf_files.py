"""The files of a Hugging Face checkpoint folder: which ones hold weights, and writing a folder all at once.

A folder is written beside its place and moved there when it is complete, so a run that dies never leaves half a model.
Several processes write one folder together, each whole files of its own: a safetensors file holds whole tensors, and one
that several processes write into would need a file system that orders their writes.
Nothing here knows the decoder, and nothing needs jax.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from rollout.errors import UserError
from rollout.types import TensorSpec

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 4_000_000_000
# A dtype's name here and in safetensors.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
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


def _size(spec: TensorSpec) -> int:
    """Bytes of a tensor."""
    return math.prod(spec.shape) * (4 if spec.dtype == "float32" else 2)


def plan_shards(manifest: Iterable[TensorSpec], limit: int = SHARD_BYTES) -> list[list[TensorSpec]]:
    """Tensors in order, as many to a file as fit in `limit` bytes (at least one)."""
    shards: list[list[TensorSpec]] = []
    used = 0
    for spec in manifest:
        size = _size(spec)
        if not shards or used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(spec)
        used += size
    return shards


@dataclass(frozen=True)
class Crew:
    """The processes that write one folder together. `exchange` gives every process's text to all."""

    index: int = 0
    count: int = 1
    exchange: Callable[[str], list[str]] = lambda text: [text]


def write_checkpoint(
    directory: Path,
    manifest: list[TensorSpec],
    produce: Callable[[TensorSpec], Any],
    config: dict[str, Any],
    tokenizer_source: str | Path | None,
    shard_bytes: int = SHARD_BYTES,
    crew: Crew | None = None,
) -> None:
    """Write a checkpoint folder, whole or not at all; a checkpoint that is there already is replaced.

    Every process of the crew calls `produce` for every tensor in one order, so that it may run on all devices, and only
    the process that writes the tensor's file fetches what it returns. No process holds more than a tensor, each writes
    files of its own at the same time as the others, and the bytes do not depend on how many they are. Raises
    CheckpointError, on all processes when one of them fails.
    """
    crew = crew or Crew()
    partial = directory.parent / f".{directory.name}.partial-{crew.exchange(str(os.getpid()))[0]}"
    chief = crew.index == 0

    def finish() -> None:
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_tokenizer(tokenizer_source, partial)
        _move(partial, directory)

    try:
        _together(crew, directory, lambda: _begin(directory, partial) if chief else None)
        _write_weights(directory, partial, plan_shards(manifest, shard_bytes), produce, crew)
        _together(crew, directory, lambda: finish() if chief else None)
    finally:
        if chief:
            shutil.rmtree(partial, ignore_errors=True)


def _together(crew: Crew, directory: Path, work: Callable[[], None]) -> None:
    """Do a part of the writing; raise CheckpointError on every process when it failed on one."""
    fault = ""
    try:
        work()
    except CheckpointError as error:
        fault = str(error)
    except OSError as error:
        fault = f"{directory} could not be written: {error}"
    faults = [told for told in crew.exchange(fault) if told]
    if faults:
        raise CheckpointError(fault or faults[0])


def _begin(directory: Path, partial: Path) -> None:
    if directory.exists() and not (directory / "config.json").is_file() and any(directory.iterdir()):
        raise CheckpointError(f"{directory} exists and is not a checkpoint folder: name an empty or a new one")
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()


def _write_weights(
    directory: Path, folder: Path, shards: list[list[TensorSpec]], produce: Callable[[TensorSpec], Any], crew: Crew
) -> None:
    """The files of weights, as many side by side as there are processes, and their index."""
    total = len(shards)
    names = [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)] if total > 1 else [SINGLE]
    file: _File | None = None
    fault: Exception | None = None
    for number, spec in _in_turns(shards, crew.count):
        value = produce(spec)  # on every process, even after a fault: it may be a computation of all devices
        if number % crew.count != crew.index or fault is not None:
            continue
        try:
            if file is None:
                file = _File(folder / names[number], shards[number])
            if file.add(value):
                file = None
        except (OSError, CheckpointError) as error:
            fault = error

    def index() -> None:
        if fault is not None:
            raise fault
        if crew.index == 0 and total > 1:
            weight_map = {spec.name: name for name, specs in zip(names, shards, strict=True) for spec in specs}
            size = sum(_size(spec) for specs in shards for spec in specs)
            text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2)
            (folder / INDEX).write_text(text + "\n", encoding="utf-8")

    _together(crew, directory, index)


def _in_turns(shards: list[list[TensorSpec]], count: int) -> Iterator[tuple[int, TensorSpec]]:
    """(number of the file, tensor) in the one order in which all processes produce them: `count` files side by side."""
    for first in range(0, len(shards), count):
        for turn in zip_longest(*shards[first : first + count]):
            yield from ((first + i, spec) for i, spec in enumerate(turn) if spec is not None)


class _File:
    """A safetensors file, written tensor by tensor: the library's own writer wants them all in memory."""

    def __init__(self, path: Path, specs: list[TensorSpec]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for spec in specs:
            start, end = end, end + _size(spec)
            header[spec.name] = {"dtype": DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
        raw = json.dumps(header, separators=(",", ":")).encode("utf-8")
        raw += b" " * (-len(raw) % 8)
        self._left = list(reversed(specs))
        self._file = path.open("wb")
        self._file.write(len(raw).to_bytes(8, "little") + raw)

    def add(self, value: Any) -> bool:
        """Write the next tensor. True when it was the last one and the file is on the disk."""
        spec, array = self._left.pop(), np.ascontiguousarray(value)
        if (tuple(array.shape), str(array.dtype)) != (spec.shape, spec.dtype):
            raise CheckpointError(f"{spec.name} {array.dtype}{array.shape} was produced where {spec} is expected")
        self._file.write(array.reshape(-1).view(np.uint8).data)
        if self._left:
            return False
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return True


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
