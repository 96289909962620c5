"""The update on a GPU: cuDNN's attention, the same step as on the CPU, moments in the host's memory, adapters."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollout.types import Trajectory
from sqlrl_jax import config_file
from sqlrl_jax.learner import Learner
from sqlrl_jax.mesh import make_mesh
from sqlrl_jax.model.attention import row_attention
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.decoder import init_params
from sqlrl_jax.model.kernels import cudnn_attention

pytestmark = pytest.mark.gpu

MODEL = ModelConfig("qwen2", 512, 256, 512, 2, 4, 2, 64, tie_word_embeddings=True, attention_bias=True)
ADVANTAGES = np.linspace(-1, 1, 12).astype(np.float32)


def episodes() -> list[Trajectory]:
    rng = np.random.default_rng(0)
    out = []
    for i in range(len(ADVANTAGES)):
        prompt, length = rng.integers(1, 512, 20).tolist(), int(rng.integers(40, 200))
        mask = (rng.random(length) < 0.6).astype(int)
        logprobs = np.where(mask, -np.log(512), 0.0).tolist()
        response = rng.integers(1, 512, length).tolist()
        spans = [(0, 0, length)]
        out.append(
            Trajectory(
                str(i // 4), "s", i % 4, prompt, response, mask.tolist(), logprobs, spans, 0.0, "wrong", "solution"
            )
        )
    return out


def learner(platform: str, *overrides: str) -> Learner:
    """A learner on one device, whichever that is with the same weights."""
    given = [
        "generator.max_input_length=224",
        "generator.sampling_params.max_generate_length=16",
        "trainer.policy.row_tokens=256",
        "trainer.policy.rows_per_micro_batch=2",
        "trainer.policy.logprob_chunk=64",
        "trainer.policy.optimizer_config.lr=0.001",
        "trainer.policy.optimizer_config.max_grad_norm=1000",
        "trainer.compile_cache=",
    ]
    config = config_file.load(None, [*given, *overrides])
    with jax.default_device(jax.devices("cpu")[0]):
        params = jax.device_get(init_params(MODEL, 0))
    mesh = make_mesh(config.trainer.mesh, jax.devices(platform)[:1])
    return Learner(config, mesh, MODEL, params)


def step(learner: Learner) -> tuple[float, float, np.ndarray]:
    """Loss and gradient norm of one update, and the log-probabilities after it."""
    metrics = learner.update(episodes(), ADVANTAGES)
    return metrics["policy/loss"], metrics["policy/grad_norm"], np.concatenate(learner.evaluate_logprobs(episodes()))


@pytest.mark.parametrize("length", [256, 1000, 4096])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (8, 8, 128), (12, 2, 128)])
def test_cudnn_attention_is_that_of_the_plain_blocks(length: int, heads: int, kv_heads: int, dim: int) -> None:
    """In bfloat16, values and gradients, branching sequences and padding in a row; and the program holds cuDNN's kernel."""
    rng = np.random.default_rng(0)
    q, to = (jnp.asarray(rng.normal(size=(2, length, heads, dim)), jnp.bfloat16) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(2, length, kv_heads, dim)), jnp.bfloat16) for _ in range(2))
    end = length - 20
    reach = np.full((2, length), length)
    for row, (stem, second, third) in zip(reach, np.sort(rng.integers(1, end, (2, 3)), axis=1), strict=True):
        row[:stem], row[stem:second], row[second:third], row[third:end] = third, second, third, end

    def program(attention: Callable[..., jax.Array], *inputs: jax.Array) -> tuple[list[np.ndarray], str]:
        def total(q: jax.Array, k: jax.Array, v: jax.Array, to: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = jnp.where((np.arange(length) < end)[:, None, None], attention(q, k, v, jnp.asarray(reach)), 0)
            return (out * to).sum(dtype=jnp.float32), out

        compiled = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True)).lower(*inputs).compile()
        gradients, out = compiled(*inputs)
        return [np.asarray(x, np.float32) for x in (out, *gradients)], compiled.as_text()

    got, text = program(cudnn_attention, q, k, v, to)
    assert "cudnn$fmha" in text
    with jax.default_matmul_precision("highest"):
        want, _ = program(row_attention, *(x.astype(jnp.float32) for x in (q, k, v, to)))
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert np.linalg.norm(a - b) <= 1.5e-2 * np.linalg.norm(b), name


def test_a_step_in_float32_is_that_of_the_cpu() -> None:
    with jax.default_matmul_precision("highest"):
        here, there = step(learner("gpu")), step(learner("cpu"))
    np.testing.assert_allclose(here[:2], there[:2], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(here[2], there[2], rtol=1e-3, atol=1e-3)


def test_a_step_in_bfloat16_is_close_to_that_of_float32() -> None:
    here, there = step(learner("gpu", "trainer.policy.compute_dtype=bfloat16")), step(learner("cpu"))
    np.testing.assert_allclose(here[:2], there[:2], rtol=2e-2, atol=1e-3)
    assert np.abs(here[2] - there[2]).mean() < 2e-2


@pytest.mark.parametrize("remat", ["none", "attention"])
def test_remat_does_not_change_a_step(remat: str) -> None:
    one, other = (step(learner("gpu", f"trainer.policy.remat={r}")) for r in ("full", remat))
    np.testing.assert_allclose(one[:2], other[:2], rtol=1e-3, atol=1e-5)


def test_moments_in_the_hosts_memory_do_not_change_a_step() -> None:
    near, far = learner("gpu"), learner("gpu", "trainer.policy.offload_optimizer=true")
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(far.state.opt_state) if leaf.ndim}
    assert kinds == {"pinned_host"}
    one, other = step(near), step(far)
    np.testing.assert_allclose(one[:2], other[:2], rtol=1e-5)
    np.testing.assert_allclose(one[2], other[2], atol=1e-4)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(far.state.opt_state) if leaf.ndim} == {"pinned_host"}


def test_adapters_alone_are_trained() -> None:
    lora = learner("gpu", "trainer.policy.compute_dtype=bfloat16", "trainer.policy.model.lora.rank=8")
    before = np.concatenate(lora.evaluate_logprobs(episodes()))
    _, norm, after = step(lora)
    assert norm > 0
    assert np.abs(after - before).max() > 0
