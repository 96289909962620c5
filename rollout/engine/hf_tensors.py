"""The tensors that an engine holds, read from the headers of its checkpoint folder: no jax, no torch, no weights loaded.

For engines that load the folder themselves and take pushes under the same names. What the learner will push is written
down on its side in sqlrl_jax/model/hf.py; a test compares the two lists for every family. Left out: quantised checkpoints,
whose tensors are not the ones that are pushed.
"""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from rollout.engine.base import EngineError
from rollout.types import TensorSpec
from sqlrl_jax.config_lora import LoraConfig, targets
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.hf_files import read_index

# Written by old releases of transformers; every engine computes it.
_COMPUTED = re.compile(r".*\.rotary_emb\.inv_freq")
_HEAD = "lm_head.weight"


def full_manifest(folder: str | Path, dtype: str) -> list[TensorSpec]:
    """Names and shapes of the model's tensors, as they are pushed in `dtype`. Raises EngineError, CheckpointError."""
    tied = ModelConfig.from_dir(folder).tie_word_embeddings
    shapes: dict[str, tuple[int, ...]] = {}
    for file in read_index(Path(folder)):
        try:
            with safe_open(file, framework="np") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise EngineError(f"{file} is damaged or incomplete ({error}): copy it again") from error
    kept = {n: s for n, s in shapes.items() if not _COMPUTED.fullmatch(n) and not (tied and n == _HEAD)}
    return [TensorSpec(name, shape, dtype) for name, shape in kept.items()]


def adapter_manifest(folder: str | Path, lora: LoraConfig, dtype: str) -> list[TensorSpec]:
    """The same of the adapters of that model, by PEFT's names. Raises EngineError, CheckpointError."""
    adapted = tuple(f".{name}_proj.weight" for name in targets(lora))
    out = []
    for spec in full_manifest(folder, dtype):
        if spec.name.endswith(adapted):
            stem, (outer, inner) = f"base_model.model.{spec.name.removesuffix('.weight')}", spec.shape
            out.append(TensorSpec(f"{stem}.lora_A.weight", (lora.rank, inner), dtype))
            out.append(TensorSpec(f"{stem}.lora_B.weight", (outer, lora.rank), dtype))
    return out
