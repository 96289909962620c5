"""Checkpoints of a run, saved by Orbax in the background and checked when they are read.

    checkpoints/<step>/params/     the trained weights (sharded on disk too; restores onto any mesh)
    checkpoints/<step>/optimizer/  moments and counters
    checkpoints/<step>/critic/     the critic's weights, moments and counters, where there is one
    checkpoints/<step>/record/     the step, its evaluation accuracy if it was measured, a checksum of every array, the
                                   present weight of the KL
    checkpoints/model/             config.json, tokenizer and adapters' settings, so that a checkpoint can be exported

A save that was cut short never counts as a checkpoint (Orbax renames it into place when it is whole). One that was
damaged later is found by its checksums, which are computed on the devices and do not depend on the mesh: it is moved
aside and the one before is used. Several processes write and read their own shards and go by what all of them found, so
they always restore the same step. What follows from the step alone (sampling seeds) is not stored.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from sqlrl_jax.checkpoint_model import MODEL, describe_model, require_same_adapters
from sqlrl_jax.checkpoint_record import (
    Score,
    best_of,
    checksums,
    quiet_writers,
    read_record,
    read_scores,
    restore_items,
)
from sqlrl_jax.config_lora import LoraConfig
from sqlrl_jax.exchange import Exchange, exchange, first_fault
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.hf_files import CheckpointError
from sqlrl_jax.step import State

_ITEMS = ("params", "optimizer", "critic")
WRITE_SECONDS = 600
"""How long one process's part of a save may take while the others wait for it."""


class Stateful(Protocol):
    """What is restored where there are shapes for it."""

    state: State

    def abstract_state(self) -> State:
        """Shapes, dtypes and shardings of `state`."""


class Trained(Stateful, Protocol):
    """What is saved: the learner, or anything with its state."""

    model_config: ModelConfig
    kl_coef: float

    @property
    def critic(self) -> Stateful | None:
        """The critic, where there is one."""

    @property
    def lora(self) -> LoraConfig:
        """The adapters that `state` holds, of rank 0 where it holds the whole model."""

    @property
    def tokenizer_dir(self) -> Path:
        """Where the model's files are, its tokenizer among them."""


class Checkpoints:
    """The checkpoints of one run: the newest `max_to_keep`, and with `keep_best` also the most accurate one.

    `save` returns when the state is copied; writing goes on in the background. Every process of the learner makes one and
    calls the same methods; `exchange` is how they agree.
    """

    def __init__(
        self, directory: str | Path, max_to_keep: int, keep_best: bool = True, exchange: Exchange = exchange
    ) -> None:
        self.directory = Path(directory).absolute()
        self._exchange, self._keep_best = exchange, keep_best
        self._chief = jax.process_index() == 0
        quiet_writers()
        self._agree(self._make_folder)
        self._scores = read_scores(self.directory, exchange)
        with self._writing():
            self._manager = self._open(max_to_keep)

    def save(self, step: int, trained: Trained, score: Score = None, data: dict[str, Any] | None = None) -> None:
        """Saves the state after `step`, whose evaluation gave `score`; `data` is JSON that says which questions come next.
        Does nothing when that step is saved already."""
        if step in self._manager.all_steps():
            return
        items = _items(trained.state, trained.critic.state if trained.critic else None)
        self._agree(self._manager.check_for_errors)
        self._agree(lambda: self._prepare(trained, sum(array.nbytes for array in jax.tree.leaves(items))))
        record = {"step": step, "score": score, "kl_coef": trained.kl_coef, "checksums": checksums(items), "data": data}
        if jax.default_backend() == "cpu":  # the host's view of an array is the array, and the next step overwrites it
            items = jax.tree.map(jnp.copy, items)
        saves = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        self._scores[step] = score
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(record=ocp.args.JsonSave(record), **saves))

    def data(self, step: int) -> dict[str, Any] | None:
        """What `save` was given as `data` with the state of `step`, which was restored."""
        found: dict[str, Any] | None = read_record(self.directory / str(step)).get("data")
        return found

    def latest(self) -> int | None:
        """The newest step that was saved whole."""
        return self._manager.latest_step()

    def best(self) -> tuple[int, float] | None:
        """The saved step of the highest accuracy, and that; None when no saved step was evaluated."""
        return best_of(self._manager.all_steps(), self._scores)

    def restore_latest(self, trained: Trained, warn: Callable[[str], None]) -> int:
        """Puts the newest readable state into `trained` and returns its step; 0 when there is no checkpoint.

        Unreadable ones are told through `warn` and moved aside. Raises CheckpointError when there are some and none can
        be read: then the model or the optimizer is likely another one than the run's.
        """
        self.wait()
        require_same_adapters(self.directory / MODEL, trained.lora)
        critic, faults = trained.critic, dict[int, str]()
        abstract = _items(trained.abstract_state(), critic.abstract_state() if critic else None)
        for step in sorted(self._manager.all_steps(), reverse=True):
            folder = self.directory / str(step)
            items, fault = restore_items(folder, abstract, self._exchange)
            if fault:
                faults[step] = fault
                continue
            trained.state = State(items["params"], **items["optimizer"])
            if critic:
                critic.state = State(**items["critic"])
            trained.kl_coef = read_record(folder).get("kl_coef", trained.kl_coef)
            for bad, told in faults.items():
                aside = self._set_aside(bad)
                warn(f"checkpoint {bad} cannot be read ({told}); it is now {aside.name}. Going on from {step}")
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

    def _open(self, max_to_keep: int) -> ocp.CheckpointManager:
        newest = managers.LatestN(max_to_keep)
        keep = managers.AnyPreservationPolicy([newest, _Best(self._scores)]) if self._keep_best else newest
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            create=False,
            async_options=ocp.AsyncOptions(timeout_secs=WRITE_SECONDS),
        )
        handlers: dict[str, ocp.CheckpointHandler] = {
            **{name: ocp.StandardCheckpointHandler() for name in _ITEMS},
            "record": ocp.JsonCheckpointHandler(),
        }
        return ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Says in one sentence what the writer, or an earlier save in the background, has tripped over."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            told = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"{self.directory}: a checkpoint could not be written ({type(error).__name__}: {told}). Make room or mend "
                f"the folder, then go on with trainer.resume_mode=latest"
            ) from error

    def _agree(self, work: Callable[[], None]) -> None:
        """Does a part of saving in every process; raises CheckpointError in all of them when it failed in one."""
        fault = ""
        try:
            with self._writing():
                work()
        except CheckpointError as error:
            fault = str(error)
        fault = first_fault(fault, self._exchange)
        if fault:
            raise CheckpointError(fault)

    def _make_folder(self) -> None:
        if self._chief:
            self.directory.mkdir(parents=True, exist_ok=True)

    def _prepare(self, trained: Trained, needed: int) -> None:
        """What process 0 does before a save: the model's description, and a look whether the folder takes `needed` bytes."""
        if not self._chief:
            return
        describe_model(self.directory / MODEL, trained.model_config, trained.tokenizer_dir, trained.lora)
        probe = self.directory / ".probe"
        probe.touch()
        probe.unlink()
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise CheckpointError(
                f"{self.directory}: a checkpoint needs {needed / 1e6:,.0f} MB and the disk has {free / 1e6:,.0f} MB left. "
                f"Make room, then go on with trainer.resume_mode=latest"
            )

    def _set_aside(self, step: int) -> Path:
        aside = self.directory / f"damaged-{step}"

        def move() -> None:
            if self._chief:
                shutil.rmtree(aside, ignore_errors=True)
                (self.directory / str(step)).rename(aside)

        self._agree(move)
        self._scores.pop(step, None)
        self._manager.reload()
        return aside


class _Best(managers.PreservationPolicy):
    """Keeps the step of the highest score, the newest of equals."""

    def __init__(self, scores: dict[int, Score]) -> None:
        self._scores = scores

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = best_of(steps, self._scores)
        return [best is not None and step == best[0] for step in steps]


def _items(state: State, critic: State | None) -> dict[str, Any]:
    """The states as the items of a checkpoint."""
    optimizer = {k: v for k, v in state._asdict().items() if k != "params"}
    others = {"critic": critic._asdict()} if critic else {}
    return {"params": state.params, "optimizer": optimizer, **others}
