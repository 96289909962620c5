"""The decoder against transformers in PyTorch: same logits, same names, and our exports load there."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch_models import MODELS, TIED, write_random  # noqa: E402 (needs torch)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402

from sqlrl_jax.model.config import ModelConfig  # noqa: E402
from sqlrl_jax.model.decoder import forward, rope_frequencies, unembedding  # noqa: E402
from sqlrl_jax.model.hf import load_hf, save_hf  # noqa: E402

# Two stretches of positions, the second as far out as the longest episodes reach.
FAR = np.concatenate([np.arange(60), np.arange(31_900, 31_990)])


@pytest.fixture(scope="module", params=list(MODELS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint written by transformers, biases and norms random too."""
    return write_random(MODELS[request.param], tmp_path_factory.mktemp(request.param))


def theirs(folder: Path, tokens: np.ndarray, positions: np.ndarray | None = None) -> tuple[np.ndarray, torch.nn.Module]:
    """Logits [rows, tokens, vocabulary] of transformers, and the model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    places = np.broadcast_to(np.arange(tokens.shape[1]) if positions is None else positions, tokens.shape)
    mask = torch.ones(tokens.shape)  # without it, a jump in the positions would begin another sequence
    with torch.no_grad():
        return model(torch.tensor(tokens), attention_mask=mask, position_ids=torch.tensor(places)).logits.numpy(), model


def ours(folder: Path, tokens: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
    """Our logits of the same checkpoint."""
    config = ModelConfig.from_dir(folder)
    places = jnp.broadcast_to(np.arange(tokens.shape[1]) if positions is None else positions, tokens.shape)

    @jax.jit
    def logits(params: dict) -> jax.Array:
        whole = jnp.full_like(places, tokens.shape[1])
        return forward(config, params, jnp.asarray(tokens), places, whole) @ unembedding(params)

    return np.asarray(logits(load_hf(folder, config)))


def difference(folder: Path, tokens: np.ndarray, positions: np.ndarray | None = None) -> float:
    """The largest of any two logits."""
    largest = float(np.abs(ours(folder, tokens, positions) - theirs(folder, tokens, positions)[0]).max())
    print(f"{folder.name}: largest difference of two logits {largest:.1e}")
    return largest


def test_logits_equal_transformers(checkpoint: Path) -> None:
    assert difference(checkpoint, np.random.default_rng(0).integers(0, 101, (2, 150))) <= 1e-4


def test_logits_equal_transformers_at_far_positions(checkpoint: Path) -> None:
    assert difference(checkpoint, np.random.default_rng(2).integers(0, 101, (1, len(FAR))), FAR) <= 1e-4


def test_every_family_is_there_tied_and_untied() -> None:
    assert {(config.model_type, config.tie_word_embeddings) for config in MODELS.values()} == TIED


@pytest.mark.parametrize("theta", [1e4, 1e5, 5e5, 1e6, 1e7])
@pytest.mark.parametrize("scaled", [False, True])
def test_rope_frequencies_are_those_of_transformers(theta: float, scaled: bool) -> None:
    """To the last bit but for one: at position 30,000 the rounding of a frequency is a turn of a thousandth."""
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": theta}
    if scaled:
        scaling = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"rope_type": "llama3", "original_max_position_embeddings": 8192, **scaling}
    for head_dim in (32, 64, 80, 96, 128):
        config = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, rope_parameters=rope)
        want = LlamaRotaryEmbedding(config).inv_freq.numpy()
        got = rope_frequencies(ModelConfig.from_hf(config.to_dict()))
        assert np.count_nonzero(got != want) <= 1
        np.testing.assert_allclose(got, want, rtol=2e-7)


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
@pytest.mark.parametrize("first", [0, 7800])
def test_a_real_checkpoint_gives_the_logits_of_transformers(first: int) -> None:
    folder = Path(os.environ["SQLRL_REAL_MODEL"])
    text = "List every customer who ordered more than three times last year, with the total they paid. " * 20
    tokens = np.array([AutoTokenizer.from_pretrained(folder)(text).input_ids[:200]])
    assert tokens.shape == (1, 200)
    assert difference(folder, tokens, first + np.arange(200)) <= 1e-3
