"""A Qwen2 checkpoint folder of random weights, and what transformers says with it: the measure of the SGLang tests."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollout.types import Generation, TensorSpec
from sqlrl_jax.config import Config
from sqlrl_jax.config_file import load
from sqlrl_jax.data.demo.tokenizer import train_tokenizer

TEXTS = ["SELECT name FROM city WHERE id = 1", "the largest city in the country", "<sql>SELECT 1</sql>"] * 20
START_TIMEOUT = 400.0
CONTEXT = 2048


def installed(package: str) -> bool:
    """By its metadata: a folder of that name on the path, such as this one, would be found as a module."""
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


MARKS = [
    pytest.mark.sglang,
    pytest.mark.skipif(not installed("sglang"), reason="SGLang is not installed here"),
    pytest.mark.timeout(900),
]


def write_model(folder: Path, seed: int) -> None:
    """Weights large enough that the distributions differ visibly from token to token."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = train_tokenizer(TEXTS, folder, 320)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
    config = Qwen2Config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **sizes)
    model = Qwen2ForCausalLM(config).float()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.4 if "embed" in name or "lm_head" in name else 0.15
            parameter.copy_(torch.randn(parameter.shape, generator=noise) * scale + (1.0 if "norm" in name else 0.0))
    model.save_pretrained(folder)


def weights(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return {name: np.array(value) for name, value in load_file(folder / "model.safetensors").items()}


def random_adapters(specs: list[TensorSpec], seed: int) -> dict[str, np.ndarray]:
    """Adapters whose A and B both move the model."""
    noise = np.random.default_rng(seed)
    return {spec.name: (noise.standard_normal(spec.shape) * 0.2).astype(np.float32) for spec in specs}


def write_merged(base: Path, folder: Path, adapters: dict[str, np.ndarray], scale: float) -> None:
    """The model of `base` with scale * B A added to each matrix that has adapters."""
    from safetensors.numpy import save_file

    shutil.copytree(base, folder)
    merged = weights(base)
    for name, a in adapters.items():
        if ".lora_A." in name:
            matrix = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
            merged[matrix] = merged[matrix] + np.float32(scale) * adapters[name.replace(".lora_A.", ".lora_B.")] @ a
    save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})


class Reference:
    """transformers, in float32 on the CPU."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()

    def logprobs(self, ids: list[int], temperature: float = 1.0) -> np.ndarray:
        """[len(ids), vocabulary]: row i is the distribution after i + 1 tokens."""
        import torch

        with torch.no_grad():
            logits = self._model(torch.tensor([ids])).logits[0]
        return torch.log_softmax(logits / temperature, -1).numpy()

    def check(self, ids: list[int], generation: Generation, temperature: float = 0.0) -> None:
        """The turn's log-probabilities are transformers' within 1e-4; a greedy turn's tokens are the likeliest."""
        out = generation.output_ids
        rows = self.logprobs(ids + out, temperature or 1.0)[len(ids) - 1 : -1]
        assert out
        np.testing.assert_allclose(generation.logprobs, rows[np.arange(len(out)), out], atol=1e-4)
        if temperature == 0:
            assert out == rows.argmax(-1).tolist()


def engine_config(folder: Path, *overrides: str) -> Config:
    return load(None, settings(folder) + list(overrides))


def settings(folder: Path) -> list[str]:
    """SGLang on that folder: on a GPU where there is one, or else on the CPU, where Triton and CUDA graphs are not."""
    import torch

    on_cpu = {"device": "cpu", "attention_backend": "torch_native", "sampling_backend": "pytorch"}
    on_cpu |= {
        "lora_backend": "torch_native",
        "disable_cuda_graph": True,
        "mem_fraction_static": 0.5,  # others on the machine take memory meanwhile
        "max_total_tokens": 16384,
    }
    extra = {} if torch.cuda.is_available() else on_cpu
    return [
        f"trainer.policy.model.path={folder}",
        "generator.backend=sglang",
        "generator.max_input_length=400",
        "generator.sampling_params.max_generate_length=300",
        "generator.inference_engine.max_sequences=16",
        f"generator.inference_engine.engine_init_kwargs={json.dumps(extra)}",
        f"bridge.start_timeout={START_TIMEOUT}",
    ]
