"""The critic of gae, through the learner: what it says, that it learns, that a resumed run goes on exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_learner
from shared_programs import shared_programs
from test_learner import MODEL, assert_same, episodes, fresh, leaves, on_policy

from rollout.errors import UserError
from rollout.types import Trajectory
from sqlrl_jax.checkpoint import CheckpointError, Checkpoints
from sqlrl_jax.credit import learn
from sqlrl_jax.critic import HEAD, Critic
from sqlrl_jax.learner import Learner, build_learner
from sqlrl_jax.mesh import make_mesh
from sqlrl_jax.model.decoder import forward, init_params
from sqlrl_jax.model.hf import save_hf
from sqlrl_jax.rl.advantages import load_estimator

GAE = (
    "trainer.policy.remat=none",
    "trainer.algorithm.advantage_estimator=gae",
    "trainer.critic.optimizer_config.lr=0.01",
    "trainer.critic.optimizer_config.max_grad_norm=1000",
)
ESTIMATOR = load_estimator("gae")


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_programs(tmp_path_factory.mktemp("xla")):
        yield


def learner(*overrides: str, seed: int = 0) -> Learner:
    config = test_learner.settings(*GAE, *overrides)
    mesh = make_mesh(config.trainer.mesh)
    reference = fresh(3) if config.trainer.algorithm.needs_reference else None
    return Learner(
        config, mesh, MODEL, fresh(seed), reference=reference, critic=Critic(config, mesh, MODEL, fresh(seed + 7))
    )


def rewarded(seed: int = 0) -> list[Trajectory]:
    rng = np.random.default_rng(seed + 100)
    return [dataclasses.replace(e, reward=float(rng.integers(2))) for e in episodes(seed=seed)]


def test_a_value_is_the_heads_product_with_the_state_before_the_token() -> None:
    subject = learner()
    batch, critic = rewarded(), subject.critic
    assert all((part == 0).all() for part in critic.values(batch))
    head = np.random.default_rng(0).normal(size=MODEL.hidden_size).astype(np.float32)
    critic.state = critic.state._replace(params={**critic.state.params, HEAD: jnp.asarray(head)})
    ids = np.zeros((len(batch), 48), np.int32)
    for row, episode in zip(ids, batch, strict=True):
        whole = [*episode.prompt_ids, *episode.response_ids]
        row[: len(whole)] = whole
    places = np.broadcast_to(np.arange(48), ids.shape)
    hidden = np.asarray(jax.jit(partial(forward, MODEL))(fresh(7), ids, places, np.full_like(ids, 48)))
    for states, episode, got in zip(hidden, batch, critic.values(batch), strict=True):
        at = len(episode.prompt_ids) + np.flatnonzero(episode.loss_mask) - 1
        np.testing.assert_allclose(got, states[at] @ head, rtol=1e-3, atol=1e-4)


def test_it_learns_what_episodes_earn_and_leaves_the_policys_step_alone() -> None:
    """The same episodes again and again: its loss falls and it explains them. Its first step comes from values of 0, so the
    policy's first step is that of whitened returns."""
    subject, plain = learner(), test_learner.learner("trainer.policy.remat=none")
    batch = on_policy(subject, rewarded())
    first = learn(subject, ESTIMATOR, batch)
    learn(plain, load_estimator("reinforce++"), batch)
    assert_close(leaves(subject.state.opt_state[0].mu), leaves(plain.state.opt_state[0].mu))
    assert first["critic/value_mean"] == first["critic/explained_variance"] == first["critic/clip_frac"] == 0
    assert first["critic/value_loss"] == pytest.approx(
        0.5 * first["critic/return_mean"], rel=1e-5
    )  # squares of 0 and 1
    second = learn(subject, ESTIMATOR, batch)
    for _ in range(25):
        last = learn(subject, ESTIMATOR, batch)
    assert last["critic/value_loss"] < 0.3 * first["critic/value_loss"]
    assert last["critic/explained_variance"] > 0.5
    assert last["critic/skipped_steps"] == 0
    assert last["policy/compiles"] == second["policy/compiles"]


def test_layout_and_minibatches_of_its_own() -> None:
    """A row each makes the step of four rows a micro-batch; two questions a minibatch make two steps an epoch."""
    moments = []
    for rows in (4, 1):
        subject = learner(f"trainer.policy.rows_per_micro_batch={rows}")
        learn(subject, ESTIMATOR, rewarded())
        moments.append(leaves(subject.critic.state.opt_state[0].mu))
    assert_close(*moments)
    subject = learner("trainer.critic_mini_batch_size=2", "trainer.update_epochs_per_batch=2")
    metrics = learn(subject, ESTIMATOR, rewarded())
    assert metrics["critic/optimizer_steps"] == int(subject.critic.state.step) == 4
    assert metrics["policy/optimizer_steps"] == 2


def test_values_that_would_move_too_far_are_clipped() -> None:
    bold = "trainer.critic.optimizer_config.lr=0.1"
    clipped = learner(bold, "trainer.update_epochs_per_batch=3", "trainer.algorithm.value_clip=0.01")
    assert learn(clipped, ESTIMATOR, rewarded())["critic/clip_frac"] > 0
    free = learner(bold, "trainer.update_epochs_per_batch=3", "trainer.algorithm.value_clip=null")
    assert learn(free, ESTIMATOR, rewarded())["critic/clip_frac"] == 0


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """Critic, its optimizer and the weight of the KL are in the checkpoint."""
    model = tmp_path / "model"
    model.mkdir()
    options = (
        f"trainer.policy.model.path={model}",
        "trainer.algorithm.use_kl_in_reward=true",
        "trainer.algorithm.kl_ctrl={type: adaptive, horizon: 50}",
    )

    def go_on(subject: Learner, steps: range) -> list[dict[str, float]]:
        done = [learn(subject, ESTIMATOR, rewarded(step)) for step in steps]
        return [{k: v for k, v in metrics.items() if k != "policy/compiles"} for metrics in done]

    whole = learner(*options)
    go_on(whole, range(2))
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    checkpoints.save(2, whole)
    later = go_on(whole, range(2, 4))
    checkpoints.wait()
    resumed = learner(*options, seed=9)
    assert checkpoints.restore_latest(resumed, warn=pytest.fail) == 2
    assert resumed.kl_coef not in (0.001, whole.kl_coef)
    assert go_on(resumed, range(2, 4)) == later
    assert_same(resumed.critic.state, whole.critic.state)
    assert_same(resumed.state, whole.state)
    without = test_learner.learner(*options[:1])
    assert (
        checkpoints.restore_latest(without, warn=pytest.fail) == 2
    )  # another estimator may go on from the same weights
    checkpoints.save(3, without)
    checkpoints.wait()
    checkpoints.close()
    (tmp_path / "checkpoints" / "2" / "critic").rename(tmp_path / "gone")
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    with pytest.raises(CheckpointError, match="none of the checkpoints fits this run"):
        checkpoints.restore_latest(learner(*options), warn=pytest.fail)
    checkpoints.close()


def test_it_starts_from_the_policys_layers_or_from_anothers(tmp_path: Path) -> None:
    for name, seed in (("policy", 0), ("other", 5)):
        save_hf(tmp_path / name, fresh(seed), MODEL)
    options = [*GAE, f"trainer.policy.model.path={tmp_path / 'policy'}", "trainer.compile_cache="]
    own = build_learner(test_learner.settings(*options)).critic
    assert own is not None
    np.testing.assert_array_equal(own.state.params["layers"]["q"], fresh(0)["layers"]["q"])
    other = build_learner(test_learner.settings(*options, f"trainer.critic.model.path={tmp_path / 'other'}")).critic
    assert other is not None
    np.testing.assert_array_equal(other.state.params["layers"]["q"], fresh(5)["layers"]["q"])
    assert "lm_head" not in other.state.params
    small = dataclasses.replace(MODEL, vocab_size=32)
    save_hf(tmp_path / "small", jax.jit(lambda: init_params(small, 0))(), small)
    with pytest.raises(UserError, match=r"trainer.critic.model.path .* knows 32 tokens, .* uses 64"):
        build_learner(test_learner.settings(*options, f"trainer.critic.model.path={tmp_path / 'small'}"))


def assert_close(got: list[np.ndarray], want: list[np.ndarray]) -> None:
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
