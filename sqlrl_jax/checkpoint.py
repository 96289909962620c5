"""Checkpoints of a run, saved by Orbax in the background and checked when they are read.

    checkpoints/<step>/params/     the weights (sharded on disk too; restores onto any mesh)
    checkpoints/<step>/optimizer/  moments and counters
    checkpoints/<step>/record/     the step and a checksum of every array
    checkpoints/model/             config.json and tokenizer, so that a checkpoint can be exported on its own

A save that was cut short never counts as a checkpoint (Orbax renames it into place when it is whole). One that was
damaged later is found by its checksums, which are computed on the devices and do not depend on the mesh: it is moved
aside and the one before is used. What follows from the step alone (data order, sampling seeds) is not stored.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.hf_files import TOKENIZER_FILES, CheckpointError
from sqlrl_jax.model.params import Params, abstract_params
from sqlrl_jax.step import State

_MODEL = "model"


class Trained(Protocol):
    """What is saved: the learner, or anything with its state."""

    state: State
    model_config: ModelConfig

    @property
    def tokenizer_dir(self) -> Path:
        """Where the tokenizer's files are."""

    def abstract_state(self) -> State:
        """Shapes, dtypes and shardings of `state`."""


def checksums(tree: Any) -> dict[str, int]:
    """A 32-bit checksum of every array by its path: each word times an odd number that depends on its place, summed.

    Any single changed word changes it. Integer sums have no order, so sharding does not matter.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get(_sums([leaf for _, leaf in leaves]))
    return {jax.tree_util.keystr(path): int(value) for (path, _), value in zip(leaves, sums, strict=True)}


@jax.jit
def _sums(arrays: list[jax.Array]) -> list[jax.Array]:
    def one(array: jax.Array) -> jax.Array:
        unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
        words = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32).ravel()
        place = jax.lax.iota(jnp.uint32, words.size)
        return jnp.sum(words * (place * jnp.uint32(2654435761) | 1), dtype=jnp.uint32)

    return [one(array) for array in arrays]


class Checkpoints:
    """The checkpoints of one run. `save` returns when the state is copied; writing goes on in the background."""

    def __init__(self, directory: str | Path, max_to_keep: int) -> None:
        self.directory = Path(directory).absolute()
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells every phase of every save; faults are raised
        self._manager = _manager(self.directory, max_to_keep)

    def save(self, step: int, trained: Trained) -> None:
        """Saves the state after `step`. Does nothing when that step is saved already."""
        if step in self._manager.all_steps():
            return
        with self._writing():
            self._keep_model(trained)
        items = _items(trained.state)
        self._require_room(sum(array.nbytes for array in jax.tree.leaves(items)))
        record = {"step": step, "checksums": checksums(items)}
        if jax.default_backend() == "cpu":  # the host's view of an array is the array, and the next step overwrites it
            items = jax.tree.map(jnp.copy, items)
        saves = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(record=ocp.args.JsonSave(record), **saves))

    def latest(self) -> int | None:
        """The newest step that was saved whole."""
        return self._manager.latest_step()

    def restore_latest(self, trained: Trained, warn: Callable[[str], None]) -> int:
        """Puts the newest readable state into `trained` and returns its step; 0 when there is no checkpoint.

        Unreadable ones are told through `warn` and moved aside. Raises CheckpointError when there are some and none can
        be read: then the model or the optimizer is likely another one than the run's.
        """
        faults: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                items = _restore(self._manager, step, _items(trained.abstract_state()))
            except Exception as error:  # damage shows as whatever the reader trips over
                faults[step] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                continue
            trained.state = State(items["params"], **items["optimizer"])
            for bad, fault in faults.items():
                aside = self._set_aside(bad)
                warn(f"checkpoint {bad} cannot be read ({fault}); it is now {aside.name}. Going on from {step}")
            return step
        if faults:
            told = "; ".join(f"{step}: {fault}" for step, fault in faults.items())
            raise CheckpointError(
                f"{self.directory}: none of the checkpoints fits this run ({told}). Was the model or the optimizer "
                f"changed? Otherwise start again in another trainer.run_dir"
            )
        return 0

    def wait(self) -> None:
        """Returns when everything saved is on disk. Raises what went wrong while writing."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of the folder."""
        with self._writing():
            self._manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Says in one sentence what the writer, or an earlier save in the background, has tripped over."""
        try:
            yield
        except Exception as error:
            told = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"{self.directory}: a checkpoint could not be written ({type(error).__name__}: {told}). Make room or mend "
                f"the folder, then go on with trainer.resume_mode=latest"
            ) from error

    def _require_room(self, needed: int) -> None:
        """Raises CheckpointError when the disk cannot hold `needed` more bytes, before a writer fails half-way."""
        with self._writing():
            free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise CheckpointError(
                f"{self.directory}: a checkpoint needs {needed / 1e6:,.0f} MB and the disk has {free / 1e6:,.0f} MB left. "
                f"Make room, then go on with trainer.resume_mode=latest"
            )

    def _keep_model(self, trained: Trained) -> None:
        folder = self.directory / _MODEL
        if (folder / "config.json").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            if (trained.tokenizer_dir / name).is_file():
                shutil.copyfile(trained.tokenizer_dir / name, folder / name)
        text = json.dumps(trained.model_config.to_hf(), indent=2)
        (folder / "config.json").write_text(text, encoding="utf-8")

    def _set_aside(self, step: int) -> Path:
        aside = self.directory / f"damaged-{step}"
        shutil.rmtree(aside, ignore_errors=True)
        (self.directory / str(step)).rename(aside)
        self._manager.reload()
        return aside


def load_params(path: str | Path, dtype: str = "float32") -> tuple[Params, ModelConfig, Path]:
    """The weights of a checkpoint: (parameters, model configuration, tokenizer folder).

    `path` is a run folder, its checkpoints folder, or one step's folder. Raises CheckpointError.
    """
    root, step = _locate(Path(path).absolute())
    config = ModelConfig.from_dir(root / _MODEL)
    with _manager(root, None) as manager:
        steps = manager.all_steps()
        if not steps or (step is not None and step not in steps):
            raise CheckpointError(f"{path}: no finished checkpoint{'' if step is None else f' of step {step}'} here")
        chosen = max(steps) if step is None else step
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), abstract_params(config, dtype)
        )
        try:
            items = _restore(manager, chosen, {"params": abstract})
        except Exception as error:  # damage shows as whatever the reader trips over
            raise CheckpointError(f"{root / str(chosen)} cannot be read: {error}") from error
    return items["params"], config, root / _MODEL


def _locate(path: Path) -> tuple[Path, int | None]:
    """The checkpoints folder and the step that `path` names, if it names one."""
    for root, step in ((path / "checkpoints", None), (path, None), (path.parent, path.name)):
        if (root / _MODEL / "config.json").is_file() and (step is None or step.isdigit()):
            return root, None if step is None else int(step)
    raise CheckpointError(
        f"{path}: expected a run folder, its checkpoints folder or a step in that; found none of them"
    )


def _items(state: State) -> dict[str, Any]:
    """The state as the items of a checkpoint."""
    return {"params": state.params, "optimizer": {k: v for k, v in state._asdict().items() if k != "params"}}


def _restore(manager: ocp.CheckpointManager, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    """The items named in `abstract`, with its shapes and shardings. Raises what Orbax raises, and ValueError for an array
    that is not what was saved."""
    restores = {name: ocp.args.StandardRestore(item) for name, item in abstract.items()}
    got = manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore(), **restores))
    items = {name: got[name] for name in abstract}
    for name, value in checksums(items).items():
        if got["record"]["checksums"].get(name) != value:
            raise ValueError(f"{name} is not what was saved")
    return items


def _manager(directory: Path, max_to_keep: int | None) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, create=max_to_keep is not None)
    handlers: dict[str, ocp.CheckpointHandler] = {
        "params": ocp.StandardCheckpointHandler(),
        "optimizer": ocp.StandardCheckpointHandler(),
        "record": ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)
