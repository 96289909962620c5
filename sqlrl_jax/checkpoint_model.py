"""What a run's checkpoints are checkpoints of, and reading one's weights without the run: for `launch.py export`.

    checkpoints/model/   config.json, tokenizer and chat template; with adapters also adapters.json

With adapters a checkpoint holds them alone: adapters.json names the model that they belong to.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from sqlrl_jax.checkpoint_record import best_of, quiet_writers, read_scores, restore_items
from sqlrl_jax.config_lora import LoraConfig, describe
from sqlrl_jax.exchange import exchange
from sqlrl_jax.mesh import param_sharding
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.hf import load_hf
from sqlrl_jax.model.hf_files import TOKENIZER_FILES, CheckpointError
from sqlrl_jax.model.lora import merge, trained_specs
from sqlrl_jax.model.params import Params, ParamSpec, flatten, nest

MODEL = "model"
_ADAPTERS = "adapters.json"


def describe_model(folder: Path, config: ModelConfig, source: Path, lora: LoraConfig) -> None:
    """Writes checkpoints/model/, unless it is there. `source` is the model's own folder."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if lora.rank:
        text = json.dumps({"base": str(source.absolute()), "lora": lora.model_dump(mode="json")}, indent=2)
        (folder / _ADAPTERS).write_text(text, encoding="utf-8")
    # Last: whoever finds it finds the others.
    (folder / "config.json").write_text(json.dumps(config.to_hf(), indent=2), encoding="utf-8")


class Saved(NamedTuple):
    """What a checkpoint holds: the weights, or adapters of the model in folder `base`."""

    params: Params
    config: ModelConfig
    tokenizer: Path
    lora: LoraConfig
    base: str


def load_saved(path: str | Path, mesh: Mesh | None = None) -> Saved:
    """The trained parameters of a checkpoint, split over `mesh` or on the first device.

    `path` is a run folder, its checkpoints folder, or in that one step's folder or `best`. Raises CheckpointError.
    """
    root, step = locate(path)
    config = ModelConfig.from_dir(root / MODEL)
    base, lora = _adapters(root / MODEL)
    quiet_writers()
    folder = root / str(step)
    try:
        found = flatten(ocp.StandardCheckpointHandler().metadata(folder / "params"))
        abstract = {
            name: jax.ShapeDtypeStruct(spec.shape, found[name].dtype, sharding=_sharding(mesh, spec))
            for name, spec in trained_specs(config, lora).items()
        }
    except Exception as error:  # damage shows as whatever the reader trips over
        raise CheckpointError(f"{folder} cannot be read ({type(error).__name__}: {error})") from error
    items, fault = restore_items(folder, {"params": nest(dict(abstract))}, exchange)
    if fault:
        raise CheckpointError(f"{folder} cannot be read ({fault})")
    return Saved(items["params"], config, root / MODEL, lora, base)


def load_params(
    path: str | Path, mesh: Mesh | None = None, base: str | Path | None = None
) -> tuple[Params, ModelConfig, Path]:
    """The weights of a checkpoint, with adapters merged into their model: (parameters, model configuration, tokenizer
    folder). `base` is that model's folder where it is no longer where it was. See `load_saved`."""
    saved = load_saved(path, mesh)
    if not saved.lora.rank:
        return saved.params, saved.config, saved.tokenizer
    folder = Path(base or saved.base)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}, the model that the adapters belong to, is not there: say where with --base")
    return merge(load_hf(folder, saved.config, mesh), saved.params, saved.lora), saved.config, saved.tokenizer


def require_same_adapters(folder: Path, lora: LoraConfig) -> None:
    """Raises CheckpointError where a run that is to go on has trained other adapters than `lora`, or all weights."""
    if not (folder / "config.json").exists():
        return
    saved = _adapters(folder)[1]
    if describe(saved) != describe(lora):
        raise CheckpointError(
            f"{folder.parent}: the run has trained {describe(saved)}, but trainer.policy.model.lora now asks for "
            f"{describe(lora)}. Put it back, or start again in another trainer.run_dir"
        )


def locate(path: str | Path) -> tuple[Path, int]:
    """The checkpoints folder and the step that `path` names. Raises CheckpointError when there is no such one."""
    given = Path(path).absolute()
    for root, name in ((given / "checkpoints", ""), (given, ""), (given.parent, given.name)):
        if not (root / MODEL / "config.json").is_file() or not (name in ("", "best") or name.isdecimal()):
            continue
        steps = [int(folder.name) for folder in root.glob("*") if folder.name.isdecimal()]
        if name == "best":
            best = best_of(steps, read_scores(root, exchange))
            if best is None:
                raise CheckpointError(f"{path}: none of the checkpoints here is of a step that was evaluated")
            return root, best[0]
        step = int(name) if name else max(steps, default=-1)
        if step not in steps:
            raise CheckpointError(f"{path}: no finished checkpoint{f' of step {name}' if name else ''} here")
        return root, step
    raise CheckpointError(
        f"{path}: expected a run folder, its checkpoints folder, or a step or best in that; found none"
    )


def best_in(path: str | Path) -> Path:
    """The best checkpoint of a run or checkpoints folder."""
    return locate(path)[0] / "best"


def _adapters(folder: Path) -> tuple[str, LoraConfig]:
    """The model that the checkpoints' adapters belong to, and their settings, of rank 0 where there are none."""
    file = folder / _ADAPTERS
    if not file.exists():
        return "", LoraConfig()
    try:
        told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return str(told["base"]), LoraConfig.model_validate({**told["lora"], "path": ""})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read ({type(error).__name__}: {error})") from error


def _sharding(mesh: Mesh | None, spec: ParamSpec) -> Sharding:
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return param_sharding(mesh, spec.axes, spec.units)
