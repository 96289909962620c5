"""A checkpoint folder small enough to be made for every test session: random weights and a byte-level tokenizer."""

from pathlib import Path

from sqlrl_jax.config import Config, load
from sqlrl_jax.data.demo_tokenizer import train_tokenizer
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.decoder import init_params
from sqlrl_jax.model.hf import save_hf
from sqlrl_jax.model.params import Params

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
        "tie_word_embeddings": True,
        "attention_bias": True,
        "max_position_embeddings": 512,
    }
    return ModelConfig(**{**values, **changes})  # type: ignore[arg-type]


def sharp_params(config: ModelConfig, seed: int) -> Params:
    """Weights large enough that the distributions differ visibly from token to token."""
    params = init_params(config, seed)
    params["embedding"] = params["embedding"] * 20
    params["layers"] = {
        k: v * 4 if k in "qkvo" or k in ("gate", "up", "down") else v for k, v in params["layers"].items()
    }
    return params


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
            "generator.max_input_length=400",
            "generator.sampling_params.max_generate_length=64",
            "generator.inference_engine.max_sequences=16",
            "generator.inference_engine.decode_chunk=4",
            *overrides,
        ],
    )
