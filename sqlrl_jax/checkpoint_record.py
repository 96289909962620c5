"""One checkpoint as it is read: its arrays, and beside them the step's evaluation accuracy and a checksum of every array.

Checksums are computed on the devices from the values alone: the mesh, the number of processes and the files do not
matter, so a checkpoint that was restored onto other hosts is checked as strictly as on the ones that wrote it.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from sqlrl_jax.exchange import Exchange, first_fault

Score = float | None


def quiet_writers() -> None:
    """Lets Orbax's threads raise what is wrong instead of printing it first: every phase and fault of a save goes to the
    log of absl, and the writes still under way when one has failed report to an event loop that is closed by then."""
    logging.getLogger("absl").setLevel(logging.CRITICAL + 1)
    earlier = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            earlier(unraisable)

    if getattr(earlier, "__module__", "") != __name__:
        sys.unraisablehook = hook


def checksums(tree: Any) -> dict[str, int]:
    """A 32-bit checksum of every array by its path: each word times an odd number that depends on its place, summed.

    Any single changed word changes it. Integer sums have no order, so sharding does not matter.
    """
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    memory = jax.local_devices()[0].default_memory().kind
    near = [name for name, leaf in leaves.items() if leaf.sharding.memory_kind in (memory, None)]
    sums = dict(zip(near, jax.device_get(_sums([leaves[name] for name in near])), strict=True))
    for name, leaf in leaves.items():
        if name not in sums:  # in the host's memory, perhaps because the devices' cannot hold all of it
            there = leaf.sharding.with_memory_kind(memory)
            sums[name] = jax.device_get(_sums([jax.device_put(leaf, there)]))[0]
    return {name: int(sums[name]) for name in leaves}


@jax.jit
def _sums(arrays: list[jax.Array]) -> list[jax.Array]:
    def one(array: jax.Array) -> jax.Array:
        unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
        words = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
        place = jnp.zeros(array.shape, jnp.uint32)  # in rows; written so that no device needs another's part
        for axis in range(array.ndim):
            stride = math.prod(array.shape[axis + 1 :]) % 2**32
            place += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride)
        return jnp.sum(words * (place * jnp.uint32(2654435761) | 1), dtype=jnp.uint32)

    return [one(array) for array in arrays]


def differing(found: Mapping[str, int], recorded: Mapping[str, int]) -> str:
    """Which array is not what was saved; empty when all are."""
    return next((f"{name} is not what was saved" for name, value in found.items() if recorded.get(name) != value), "")


def read_record(folder: Path) -> dict[str, Any]:
    """The record of one checkpoint. Raises OSError, ValueError or TypeError where it is damaged."""
    record = json.loads((folder / "record" / "metadata").read_text(encoding="utf-8"))
    if not isinstance(record, dict) or not isinstance(record.get("checksums"), dict):
        raise ValueError("the record holds no checksums")
    return record


def restore_items(folder: Path, abstract: dict[str, Any], exchange: Exchange) -> tuple[dict[str, Any], str]:
    """The items of one checkpoint with the shapes and shardings of `abstract`; or, the same in all processes, why not.

    Each process reads its own shards by itself: Orbax's manager would wait for all, and one that fails does not come.
    """
    items: dict[str, Any] = {}
    recorded: dict[str, int] = {}
    fault = ""
    try:
        recorded = read_record(folder)["checksums"]
        for name, item in abstract.items():
            handler = ocp.StandardCheckpointHandler()
            items[name] = handler.restore(folder / name, args=ocp.args.StandardRestore(item))
    except Exception as error:  # damage shows as whatever the reader trips over
        fault = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    fault = first_fault(fault, exchange)
    if not fault:  # now all processes hold all arrays, and compute their checksums together
        fault = first_fault(differing(checksums(items), recorded), exchange)
    return items, fault


def read_scores(directory: Path, exchange: Exchange) -> dict[int, Score]:
    """Accuracy by step of the checkpoints in a folder, as process 0 reads it. A damaged record has none."""
    found: dict[str, Score] = {}
    if jax.process_index() == 0:
        for folder in (path for path in directory.glob("*") if path.name.isdecimal()):
            try:
                score = read_record(folder).get("score")
            except (OSError, ValueError):
                continue  # restoring tells what is wrong with it
            found[folder.name] = float(score) if isinstance(score, int | float) else None
    return {int(step): score for step, score in json.loads(exchange(json.dumps(found))[0]).items()}


def best_of(steps: Iterable[int], scores: Mapping[int, Score]) -> tuple[int, float] | None:
    """The step of the highest score and that, the newest of equals; None when no step was evaluated."""
    scored = [(score, step) for step in steps if (score := scores.get(step)) is not None and not math.isnan(score)]
    if not scored:
        return None
    score, step = max(scored)
    return step, score
