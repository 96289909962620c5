"""`launch.py import` and `launch.py export`: Hugging Face checkpoints in, Hugging Face checkpoints out.

An imported folder is again a Hugging Face folder, checked name by name and in one normal form; the trainer takes it as
`trainer.policy.model.path`. Left out: downloading, and formats other than safetensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rollout.types import TensorSpec
from sqlrl_jax.config import MeshConfig
from sqlrl_jax.mesh import make_mesh
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.hf import Reader, hf_manifest, hf_table, save_hf
from sqlrl_jax.model.hf_files import CheckpointError, write_checkpoint
from sqlrl_jax.model.lora import trained_specs
from sqlrl_jax.model.params import parameter_count
from sqlrl_jax.model.peft import save_peft


@dataclass(frozen=True)
class Report:
    """What was written: for the line that the person sees."""

    path: Path
    model_type: str
    parameters: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.path}: {self.model_type}, {self.parameters:,} parameters, {self.dtype}"


def _require_new(out: str | Path) -> None:
    if Path(out).exists():
        raise CheckpointError(f"{out} exists already: remove it or name another folder for --out")


def import_model(hf_dir: str | Path, out: str | Path, dtype: str | None = None) -> Report:
    """Check a Hugging Face checkpoint and write it to `out`, tensor by tensor, with its tokenizer and chat template.

    `dtype` None keeps the checkpoint's own. Raises ModelConfigError or CheckpointError naming what does not fit."""
    config = ModelConfig.from_dir(hf_dir)
    if Path(hf_dir).resolve() == Path(out).resolve():
        raise CheckpointError(f"{out} is the checkpoint itself: name another folder for --out")
    _require_new(out)
    with Reader(hf_dir, config) as reader:
        kept = dtype or reader.dtype()

        entries = {entry.name: entry for entry in hf_table(config)}

        def produce(spec: TensorSpec) -> np.ndarray:
            value = reader.read(entries[spec.name], dtype=kept)
            return value.T if entries[spec.name].transpose else value

        write_checkpoint(Path(out), hf_manifest(config, kept), produce, config.to_hf(kept), hf_dir)
    return Report(Path(out), config.model_type, parameter_count(config), kept)


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    dtype: str | None = None,
    best: bool = False,
    base: str | Path | None = None,
) -> Report:
    """Write the weights of a training checkpoint as a Hugging Face folder: the one named, or of a run's the latest or the
    `best`. `dtype` None takes that of the model it was trained from. Adapters are merged into their model, whose folder is
    `base` where it is no longer where it was."""
    _require_new(out)
    # Orbax takes seconds to import; an import does not need it
    from sqlrl_jax.checkpoint_model import best_in, load_params

    mesh = make_mesh(MeshConfig())
    params, config, tokenizer = load_params(best_in(checkpoint) if best else checkpoint, mesh, base)
    save_hf(out, params, config, dtype, tokenizer)
    return Report(Path(out), config.model_type, parameter_count(config), dtype or config.dtype)


def export_adapter(
    checkpoint: str | Path, out: str | Path, best: bool = False, base: str | Path | None = None
) -> Report:
    """Write the adapters of a training checkpoint as a PEFT folder. See `export_checkpoint`."""
    _require_new(out)
    from sqlrl_jax.checkpoint_model import best_in, load_saved

    saved = load_saved(best_in(checkpoint) if best else checkpoint)
    if not saved.lora.rank:
        raise CheckpointError(f"{checkpoint} holds no adapters: all weights were trained; export it without --adapter")
    save_peft(out, saved.params, saved.config, saved.lora, base or saved.base)
    size = sum(math.prod(spec.shape) for spec in trained_specs(saved.config, saved.lora).values())
    return Report(Path(out), f"PEFT adapter for {saved.config.model_type}", size, "float32")
