"""A checkpoint folder small enough to be made for every test session: random weights and a byte-level tokenizer."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from sqlrl_jax.config import Config
from sqlrl_jax.config_file import load
from sqlrl_jax.data.demo.tokenizer import train_tokenizer
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.hf import save_hf
from sqlrl_jax.model.params import Params, nest, param_specs

TEXTS = ["SELECT name FROM city WHERE id = 1", "the largest city in the country", "<sql>SELECT 1</sql>"] * 20


def model_config(vocab_size: int, **changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": False,  # an untrained tied model only repeats its last token
        "attention_bias": True,
        "max_position_embeddings": 512,
    }
    return ModelConfig(**{**values, **changes})  # type: ignore[arg-type]


def sharp_params(config: ModelConfig, seed: int) -> Params:
    """Random weights, large enough that the distributions differ visibly from token to token; no compiling."""
    rng = np.random.default_rng(seed)
    out = {}
    for path, spec in param_specs(config).items():
        scale = {"embedding": 0.4, "lm_head": 0.4}.get(path, 0.15)
        value = rng.normal(size=spec.shape) * scale + (1.0 if spec.stddev is None else 0.0)
        out[path] = jnp.asarray(value, jnp.float32)
    return nest(out)


def write_model(folder: Path, seed: int = 0) -> ModelConfig:
    """A folder as `trainer.policy.model.path` expects it."""
    tokenizer_dir = folder.with_name(folder.name + "-tokenizer")
    tokenizer = train_tokenizer(TEXTS, tokenizer_dir, 320)
    config = model_config(len(tokenizer), eos_token_ids=(tokenizer.eos_token_id,))
    save_hf(folder, sharp_params(config, seed), config, tokenizer_source=tokenizer_dir)
    return config


def engine_config(folder: Path, *overrides: str) -> Config:
    """The settings of an engine on that folder."""
    return load(
        None,
        [
            f"trainer.policy.model.path={folder}",
            "trainer.compile_cache=",
            "generator.max_input_length=400",
            "generator.sampling_params.max_generate_length=64",
            "generator.inference_engine.max_sequences=16",
            "generator.inference_engine.decode_chunk=4",
            *overrides,
        ],
    )
