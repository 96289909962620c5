"""Our PEFT folders in the peft library, over transformers in PyTorch: the same logits, before and after a merge."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from torch_models import MODELS, write_random  # noqa: E402 (needs torch)
from transformers import AutoModelForCausalLM  # noqa: E402

from sqlrl_jax.config import LoraConfig  # noqa: E402
from sqlrl_jax.model.config import ModelConfig  # noqa: E402
from sqlrl_jax.model.decoder import forward, unembedding  # noqa: E402
from sqlrl_jax.model.hf import load_hf, save_hf  # noqa: E402
from sqlrl_jax.model.lora import join, merge, trained_specs  # noqa: E402
from sqlrl_jax.model.params import Params, nest  # noqa: E402
from sqlrl_jax.model.peft import load_peft, save_peft  # noqa: E402

TOKENS = np.random.default_rng(0).integers(0, 101, (2, 24))


def logits(config: ModelConfig, params: Params) -> np.ndarray:
    positions = np.tile(np.arange(24), (2, 1))
    hidden = jax.jit(lambda p: forward(config, p, TOKENS, positions, np.full_like(TOKENS, TOKENS.shape[1])))(params)
    return np.array(hidden @ unembedding(params))


def theirs(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS)).logits.numpy()


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("qwen2-tied", LoraConfig(rank=4, alpha=8)),
        ("qwen3", LoraConfig(rank=3, alpha=10.5, target_modules=("q_proj", "down_proj"))),
        ("llama3", LoraConfig(rank=1, alpha=1)),
    ],
)
def test_peft_loads_our_adapters_and_we_theirs(tmp_path: Path, name: str, lora: LoraConfig) -> None:
    base = write_random(MODELS[name], tmp_path / "base")
    config = ModelConfig.from_dir(base)
    rng = np.random.default_rng(1)
    specs = trained_specs(config, lora)
    adapters = nest({p: jnp.asarray(rng.normal(size=s.shape) * 0.2, jnp.float32) for p, s in specs.items()})
    frozen = load_hf(base, config)
    save_peft(tmp_path / "adapter", adapters, config, lora, base)
    want = logits(config, join(frozen, adapters, lora))

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain = theirs(model)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    np.testing.assert_allclose(theirs(adapted), want, atol=1e-4)
    assert np.abs(plain - want).max() > 0.1

    adapted.save_pretrained(tmp_path / "again")  # and back, through peft's own writer
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["r"] == lora.rank
    for a, b in zip(
        jax.tree.leaves(load_peft(tmp_path / "again", config, lora)), jax.tree.leaves(adapters), strict=True
    ):
        np.testing.assert_array_equal(a, b)

    save_hf(tmp_path / "merged", merge(frozen, adapters, lora), config)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    np.testing.assert_allclose(theirs(merged), want, atol=1e-4)
