"""Small models of every family as transformers builds them, with random weights: what parity is measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
QWEN = {"rope_type": "default", "rope_theta": 1e6}
LLAMA2 = {"rope_type": "default", "rope_theta": 1e4}
TIED = {(name, tied) for name in ("qwen2", "qwen3", "llama") for tied in (True, False)}


def _config(kind: type[PreTrainedConfig], tied: bool, rope: dict[str, Any], **sizes: Any) -> PreTrainedConfig:
    return kind(**{**SIZES, **sizes}, tie_word_embeddings=tied, rope_parameters=rope)


# Each family tied and untied; between them one, two and all key/value heads, and heads wider than hidden / heads.
MODELS: dict[str, PreTrainedConfig] = {
    "qwen2-tied": _config(Qwen2Config, True, QWEN, rms_norm_eps=1e-5),
    "qwen2": _config(Qwen2Config, False, QWEN, num_key_value_heads=1),
    "qwen3-tied": _config(Qwen3Config, True, QWEN, head_dim=96),
    "qwen3": _config(Qwen3Config, False, QWEN, head_dim=128, num_key_value_heads=4),
    "llama2": _config(LlamaConfig, False, LLAMA2, num_key_value_heads=4),
    "llama3": _config(LlamaConfig, False, LLAMA3, head_dim=64),
    "llama3-tied": _config(LlamaConfig, True, LLAMA3),
}


def write_random(config: PreTrainedConfig, folder: Path, noise: float = 0.1) -> Path:
    """A checkpoint of that configuration in `folder`; nothing in it, bias or norm, is left at zero or one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    model.save_pretrained(folder)
    return folder
