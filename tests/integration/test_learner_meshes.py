"""Any mesh, however its layers are run and wherever its moments lie, gives the optimizer step of one device; on 8 emulated
devices."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from own_process import printed_by

from sqlrl_jax import config as configuration
from sqlrl_jax.critic import Critic
from sqlrl_jax.learner import Learner
from sqlrl_jax.mesh import make_mesh

PLAIN = ()
BY_EPISODE = (  # what sums over whole episodes
    "trainer.algorithm.policy_loss_type=gspo",
    "trainer.algorithm.loss_reduction=prompt_mean",
    "trainer.algorithm.off_policy_correction.sequence_mask_metric=product",
    "trainer.algorithm.off_policy_correction.tis_ratio_type=sequence",
)
# Mesh, algorithm (the single device's too), layout (the mesh's alone).
WITH_CRITIC = ("trainer.algorithm.advantage_estimator=gae",)
RUNS = [
    ("data=2,fsdp=2,tensor=2", PLAIN, ("trainer.policy.remat=attention", "trainer.policy.offload_optimizer=true")),
    ("fsdp=4,sequence=2", PLAIN, ("trainer.policy.scan_layers=false",)),
    ("data=2,fsdp=2", BY_EPISODE, ()),
    ("fsdp=2,sequence=2,tensor=2", WITH_CRITIC, ()),
]
LEARNING_RATE = 0.001


@pytest.mark.timeout(580)
def test_any_mesh_gives_the_step_of_one_device() -> None:
    assert printed_by("test_learner_meshes", "compare_meshes").count("agrees") == len(RUNS)


def compare_meshes() -> None:
    """Run in a process of its own by the test above."""
    jax.config.update("jax_num_cpu_devices", 8)
    for text, algorithm, layout in RUNS:
        got, want = one_step(text, algorithm, layout), one_step("fsdp=1", algorithm, ())
        for a, b in zip(got.moments, want.moments, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
        for a, b in zip(
            got.params, want.params, strict=True
        ):  # Adam's first step is a sign where a gradient is not tiny
            assert np.abs(a - b).mean() < 1e-3 * LEARNING_RATE
        np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)
        kind = "pinned_host" if "trainer.policy.offload_optimizer=true" in layout else "device"
        assert got.kinds == {kind}, got.kinds
        print(text, "agrees")


class Step(NamedTuple):
    """What one step left: a tenth of its gradient, the parameters, the loss, in which memories the matrices' moments are.
    With a critic, its own."""

    moments: list[np.ndarray]
    params: list[np.ndarray]
    loss: float
    kinds: set[str]


@cache
def one_step(text: str, algorithm: tuple[str, ...], layout: tuple[str, ...]) -> Step:
    """One step on this mesh."""
    from test_learner import MODEL, advantages, episodes, fresh, leaves, on_policy, settings
    from test_learner_algorithms import shifted

    config = settings("trainer.policy.rows_per_micro_batch=8", *algorithm, *layout)
    sizes = {k: int(v) for k, v in (part.split("=") for part in text.split(","))}
    mesh = make_mesh(configuration.MeshConfig(**sizes), jax.devices()[: int(np.prod(list(sizes.values())))])
    if algorithm == WITH_CRITIC:
        return critic_step(config, mesh)
    subject = Learner(config, mesh, MODEL, fresh(0))
    batch = episodes()
    if algorithm:  # near the policy, so that bounds and masks hold some episodes and not others
        batch = shifted(on_policy(subject, batch), 0.5)
    metrics = subject.update(batch, advantages(batch))
    if algorithm:
        assert 0 < metrics["policy/product_sequence_mask_masked_ratio"] < 1
    moments = subject.state.opt_state[0].mu
    kinds = {moments["layers"][name].sharding.memory_kind for name in ("q", "gate", "down")}
    return Step(leaves(moments), leaves(subject.state.params), metrics["policy/loss"], kinds)


def critic_step(config: configuration.Config, mesh: Mesh) -> Step:
    """The second step of a critic; after its first it says something."""
    from test_learner import MODEL, episodes, fresh, leaves

    subject, batch = Critic(config, mesh, MODEL, fresh(0)), episodes()
    lengths = [sum(episode.loss_mask) for episode in batch]
    returns = [np.linspace(i % 3, i, n) for i, n in enumerate(lengths)]
    for _ in range(2):
        metrics = subject.update(batch, subject.values(batch), returns)
    assert abs(metrics["critic/value_mean"]) > 1e-6
    moments = subject.state.opt_state[0].mu
    return Step(leaves(moments), leaves(subject.state.params), metrics["critic/value_loss"], {"device"})
