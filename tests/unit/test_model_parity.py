"""The decoder against transformers in PyTorch: same logits, same names, and our exports load there."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config  # noqa: E402 (needs torch)

from sqlrl_jax.model.config import ModelConfig  # noqa: E402
from sqlrl_jax.model.decoder import Compute, forward, unembedding  # noqa: E402
from sqlrl_jax.model.hf import load_hf, save_hf  # noqa: E402

SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
THETA = {"rope_type": "default", "rope_theta": 1e6}
MODELS = {
    "qwen2-tied": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True, rope_parameters=THETA, rms_norm_eps=1e-5),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=False, rope_parameters=THETA),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=32, rope_parameters=THETA),
    "llama": lambda: LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "llama3-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3),
}


@pytest.fixture(scope="module", params=list(MODELS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint written by transformers, biases and norms random too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[request.param]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder


def theirs(folder: Path, tokens: np.ndarray) -> tuple[np.ndarray, torch.nn.Module]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy(), model


def test_logits_equal_transformers(checkpoint: Path) -> None:
    config = ModelConfig.from_dir(checkpoint)
    params = load_hf(checkpoint, config)
    tokens = np.random.default_rng(0).integers(0, 101, (2, 150))
    positions = jnp.broadcast_to(jnp.arange(150), tokens.shape)
    hidden = jax.jit(lambda p: forward(config, p, tokens, positions, jnp.ones_like(tokens), Compute()))(params)
    logits, _ = theirs(checkpoint, tokens)
    assert np.abs(np.asarray(hidden @ unembedding(params)) - logits).max() <= 1e-4


def test_our_export_is_their_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    config = ModelConfig.from_dir(checkpoint)
    save_hf(tmp_path / "out", load_hf(checkpoint, config), config)
    tokens = np.random.default_rng(1).integers(0, 101, (1, 60))
    before, original = theirs(checkpoint, tokens)
    after, exported = theirs(tmp_path / "out", tokens)
    np.testing.assert_array_equal(before, after)
    assert {n: p.shape for n, p in original.named_parameters()} == {n: p.shape for n, p in exported.named_parameters()}
    same = {"dtype", "architectures", "_name_or_path", "head_dim", "transformers_version"}
    left, right = original.config.to_dict(), exported.config.to_dict()
    assert {k for k in left if left[k] != right.get(k)} <= same


@pytest.mark.skipif("SQLRL_REAL_MODEL" not in os.environ, reason="SQLRL_REAL_MODEL does not name a checkpoint folder")
def test_a_real_checkpoint_gives_the_logits_of_transformers() -> None:
    from transformers import AutoTokenizer

    folder = Path(os.environ["SQLRL_REAL_MODEL"])
    config = ModelConfig.from_dir(folder)
    params = load_hf(folder, config)
    text = "List every customer who ordered more than three times last year, with the total they paid. " * 20
    tokens = np.array([AutoTokenizer.from_pretrained(folder)(text).input_ids[:200]])
    assert tokens.shape == (1, 200)
    hidden = jax.jit(lambda p: forward(config, p, tokens, jnp.arange(200)[None], jnp.ones_like(tokens)))(params)
    difference = np.abs(np.asarray(hidden @ unembedding(params)) - theirs(folder, tokens)[0]).max()
    print(f"max |logit difference| over 200 tokens: {difference:.2e}")
    assert difference <= 1e-3
