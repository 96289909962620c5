"""The settings of the supervised cold start, under `sft`: a fresh model's sizes, and what it imitates. sft.py runs it."""

from __future__ import annotations

from pydantic import Field

from sqlrl_jax.config_base import Section


class SFTModelConfig(Section):
    """Sizes of the fresh Qwen2-type model."""

    hidden_size: int = Field(128, ge=8)
    """Width of the residual stream."""
    intermediate_size: int = Field(384, ge=8)
    """Width of the MLP."""
    num_hidden_layers: int = Field(4, ge=1)
    """Layers."""
    num_attention_heads: int = Field(4, ge=1)
    """Query heads; must divide hidden_size."""
    num_key_value_heads: int = Field(2, ge=1)
    """Key/value heads; must divide the query heads."""
    vocab_size: int = Field(1024, ge=300)
    """Tokens; the tokenizer is trained on the demonstrations."""


class SFTConfig(Section):
    """The supervised cold start: a fresh model imitates demonstrations. Its optimizer and rows are trainer.policy's."""

    demonstrations: str = "data/coldstart"
    """Folder of the demonstrations and their databases, generated if it is not there."""
    databases: int = Field(4000, ge=1)
    """Databases to generate demonstrations on; questions and seed are data.demo's."""
    look: float = Field(0.4, ge=0, le=1)
    """Share of the demonstrations' decisions that are careful: look first, mend an error, keep ties."""
    output: str = "models/quickstart"
    """Hugging Face folder to write: what trainer.policy.model.path of a run names."""
    epochs: int = Field(2, ge=1)
    """Passes over the demonstrations; a batch is trainer.policy.rows_per_micro_batch rows."""
    prompt_loss_weight: float = Field(0.3, ge=0, le=1)
    """Weight of prompt and observation tokens in the loss; the model's own tokens have 1."""
    heldout: int = Field(512, ge=0)
    """Demonstrations, the last ones, that are measured and not trained on."""
    model: SFTModelConfig = SFTModelConfig()
