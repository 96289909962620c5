"""The settings of an optimizer, and those of the critic, which has one of its own."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sqlrl_jax.config_base import Section


class OptimizerConfig(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon (orthogonalised momentum on matrices, AdamW on the rest) which suits training from nothing."""
    lr: float = Field(1e-6, gt=0, le=1)
    """Learning rate."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    weight_decay: float = Field(0.01, ge=0, le=1)
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: float = Field(0.5, gt=0)
    """Gradients are scaled down to this global norm."""
    num_warmup_steps: int = Field(0, ge=0)
    """Optimizer steps over which the learning rate rises from 0."""
    scheduler: Literal["constant", "cosine"] = "constant"
    """What follows the warm-up. cosine falls to zero over the run."""


class CriticOptimizerConfig(OptimizerConfig):
    lr: float = Field(5e-6, gt=0, le=1)
    """Learning rate. A critic learns faster than a policy may."""


class CriticModelConfig(Section):
    path: str = ""
    """A Hugging Face checkpoint folder whose layers the critic starts from; empty is the policy's own."""


class CriticConfig(Section):
    """The critic of advantage_estimator gae: a model of its own with one number for each token in place of the vocabulary.
    Rows, dtypes and where its moments lie are trainer.policy's; all its weights are trained."""

    model: CriticModelConfig = CriticModelConfig()
    optimizer_config: CriticOptimizerConfig = CriticOptimizerConfig()
