"""Adapters on any mesh give the optimizer step of one device, on 8 emulated devices, and are split as their matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from own_process import printed_by

from sqlrl_jax import config as configuration
from sqlrl_jax.learner import Learner
from sqlrl_jax.mesh import make_mesh

MESHES = ["data=2,fsdp=2,tensor=2", "fsdp=2,sequence=4"]


@pytest.mark.timeout(580)
def test_any_mesh_gives_the_step_of_one_device() -> None:
    assert printed_by("test_lora_meshes", "compare_meshes").count("agrees") == len(MESHES)


def compare_meshes() -> None:
    """Run in a process of its own by the test above."""
    jax.config.update("jax_num_cpu_devices", 8)
    want, loss, merged = one_step("fsdp=1")
    for text in MESHES:
        got, got_loss, got_merged = one_step(text)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
        np.testing.assert_allclose(got_loss, loss, rtol=1e-5)
        for a, b in zip(got_merged, merged, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
        print(text, "agrees")


def one_step(text: str) -> tuple[list[np.ndarray], float, list[np.ndarray]]:
    """A tenth of the adapters' gradients, the loss, and the merged weights before one step on this mesh."""
    from test_learner import MODEL, advantages, episodes, fresh, leaves, settings

    lora = ["trainer.policy.model.lora.rank=4", "trainer.policy.model.lora.alpha=8"]
    config = settings("trainer.policy.rows_per_micro_batch=8", *lora)
    sizes = {k: int(v) for k, v in (part.split("=") for part in text.split(","))}
    mesh = make_mesh(configuration.MeshConfig(**sizes), jax.devices()[: int(np.prod(list(sizes.values())))])
    base = fresh(0)
    subject = Learner(config, mesh, MODEL, base)
    rng = np.random.default_rng(0)  # fresh adapters' A has no gradient, because B is zero
    values = {n: rng.normal(size=a.shape) * 0.2 for n, a in sorted(subject.state.params["layers"].items())}
    params = {n: jax.device_put(jnp.float32(v), subject.state.params["layers"][n].sharding) for n, v in values.items()}
    subject.state = subject.state._replace(params={"layers": params})
    if mesh.shape["tensor"] == 2:
        split = {n: a.sharding.shard_shape(a.shape) for n, a in params.items()}
        assert split["q_a"] == (2, 16, 4)  # embed over fsdp, heads over tensor, the rank never
        assert split["q_b"] == (2, 4, 16)
        assert split["down_a"] == (2, 24, 4)
        assert split["down_b"] == (2, 4, 16)
    merged = leaves(subject.params)
    batch = episodes()
    metrics = subject.update(batch, advantages(batch))
    for a, b in zip(leaves(subject._stepper.frozen), leaves(base), strict=True):
        np.testing.assert_array_equal(a, b)
    return leaves(subject.state.opt_state[0].mu), metrics["policy/loss"], merged
