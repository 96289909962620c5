"""The weights an engine of ours serves: the whole model, or a base that stays and adapters that are given anew.

With adapters, pushes and the manifest hold these alone. In float32 they are merged into the base, which costs decoding
nothing; in bfloat16, where a merge would round small ones away, the decoder applies them beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rollout.types import TensorSpec
from sqlrl_jax.config import ModelPathConfig
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.hf import from_hf_tensors, hf_manifest, load_hf
from sqlrl_jax.model.lora import join, merge
from sqlrl_jax.model.params import Params
from sqlrl_jax.model.peft import from_peft_tensors, load_peft, peft_manifest


class Served:
    """Weights of `model` in `dtype`, for one engine."""

    def __init__(self, model: ModelPathConfig, config: ModelConfig, dtype: str) -> None:
        self._model, self._config, self._dtype, self._lora = model, config, dtype, model.lora
        self._base: Params = load_hf(model.path, config, dtype=dtype) if self._lora.rank else {}

    def start(self) -> Params:
        """The parameters before any were given."""
        if not self._lora.rank:
            return load_hf(self._model.path, self._config, dtype=self._dtype)
        if not self._lora.path:
            return self._base
        return self._adapted(load_peft(self._lora.path, self._config, self._lora, self._dtype))

    def manifest(self) -> list[TensorSpec]:
        """The tensors that `params` takes."""
        if self._lora.rank:
            return peft_manifest(self._config, self._lora, self._dtype)
        return hf_manifest(self._config, self._dtype)

    def params(self, tensors: Mapping[str, Any]) -> Params:
        """The parameters to compute with, from the tensors of the manifest. Raises CheckpointError."""
        if self._lora.rank:
            return self._adapted(from_peft_tensors(tensors, self._config, self._lora, self._dtype))
        return from_hf_tensors(tensors, self._config, self._dtype)

    def _adapted(self, adapters: Params) -> Params:
        combine = merge if self._dtype == "float32" else join
        return combine(self._base, adapters, self._lora)
