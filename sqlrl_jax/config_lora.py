"""The settings of low-rank adapters, under `trainer.policy.model.lora`. What they mean is in model/lora.py."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from sqlrl_jax.config_base import Section

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
"""The seven matrices of a layer, by our names; Hugging Face's are q_proj and so on."""

LoraTarget = Literal["all-linear", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoraConfig(Section):
    rank: int = Field(0, ge=0, le=4096)
    """Width of the adapters (arXiv:2106.09685); 0 trains all weights."""
    alpha: float = Field(16.0, gt=0)
    """The adapters' output is scaled by alpha / rank."""
    target_modules: tuple[LoraTarget, ...] = Field(("all-linear",), min_length=1)
    """Matrices that get an adapter; all-linear: all seven of a layer."""
    init_method: Literal["kaiming"] = "kaiming"
    """How A starts: uniform within 1/sqrt(inputs). B starts at zero, so the first step begins at the model itself."""
    path: str = ""
    """A PEFT adapter folder to start from, of this rank, alpha and target_modules; empty: fresh adapters."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _one_name(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _path_has_a_rank(self) -> LoraConfig:
        if self.path and not self.rank:
            raise ValueError(f"path {self.path} is an adapter: give its rank too")
        return self


def targets(lora: LoraConfig) -> tuple[str, ...]:
    """The matrices of a layer that have an adapter."""
    named = {name.removesuffix("_proj") for name in lora.target_modules}
    return tuple(name for name in MATRICES if name in named or "all-linear" in named) if lora.rank else ()


def describe(lora: LoraConfig) -> str:
    """What is trained, for people; equal for settings with which a run can go on."""
    if not lora.rank:
        return "all weights"
    names = ", ".join(f"{name}_proj" for name in targets(lora))
    return f"adapters of rank {lora.rank} and alpha {lora.alpha:g} on {names}"
