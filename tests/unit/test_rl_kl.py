"""The KL from the reference model: each estimator's value, and what the learner makes of it in loss and reward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_learner
from hypothesis import given
from hypothesis import strategies as st
from shared_programs import shared_programs
from test_learner import MODEL, advantages, episodes, fresh, leaves, on_policy

from rollout.errors import UserError
from sqlrl_jax import config_file
from sqlrl_jax.config import MeshConfig
from sqlrl_jax.config_algorithm import KLControlConfig
from sqlrl_jax.credit import learn
from sqlrl_jax.learner import Learner, build_learner
from sqlrl_jax.mesh import make_mesh
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.hf import save_hf
from sqlrl_jax.rl.advantages import load_estimator
from sqlrl_jax.rl.kl import approximate_kl
from sqlrl_jax.rl.kl_control import next_coefficient

KL = ("trainer.policy.remat=none", "trainer.algorithm.use_kl_loss=true", "trainer.algorithm.kl_loss_coef=0.5")


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_programs(tmp_path_factory.mktemp("xla")):
        yield


def slow(logprob: float, reference: float, kind: str) -> float:
    d = min(max(logprob - reference, -20.0), 20.0)
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d, "abs": abs(d)}[kind]


@given(st.floats(-60, 0), st.floats(-60, 0), st.sampled_from(["k1", "k2", "k3", "abs"]))
def test_estimators(logprob: float, reference: float, kind: str) -> None:
    want = slow(logprob, reference, kind)
    got = approximate_kl(np.float64(logprob), np.float64(reference), kind)
    assert got == pytest.approx(want, rel=1e-9, abs=1e-9)
    traced = approximate_kl(jnp.float32(logprob), jnp.float32(reference), kind, jnp)
    assert float(traced) == pytest.approx(want, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs"])
def test_estimates_the_kl_of_two_distributions(kind: str) -> None:
    """k1 and k3 are unbiased; k2 and |d| only vanish and grow with it."""
    rng = np.random.default_rng(0)
    p, q = (x / x.sum() for x in rng.random((2, 5)) + 0.5)
    exact = float(np.sum(p * np.log(p / q)))
    mean = float(np.sum(p * approximate_kl(np.log(p), np.log(q), kind)))
    if kind in ("k1", "k3"):
        assert mean == pytest.approx(exact, rel=1e-9)
    assert mean > 0
    assert approximate_kl(np.log(p), np.log(p), kind).max() == 0


def other_weights(*overrides: str) -> Learner:
    """A learner whose reference is another model."""
    config = test_learner.settings(*KL, *overrides)
    return Learner(config, make_mesh(config.trainer.mesh), MODEL, fresh(0), reference=fresh(3))


def test_before_any_step_the_policy_is_its_own_reference() -> None:
    subject = test_learner.learner(*KL)
    batch = on_policy(subject, episodes())
    plain = test_learner.learner("trainer.policy.remat=none")
    want = plain.update(batch, advantages(batch))
    got = subject.update(batch, advantages(batch))
    assert got["policy/policy_kl"] == pytest.approx(0, abs=1e-7)
    assert got["policy/grad_norm"] == pytest.approx(want["policy/grad_norm"], rel=1e-4)  # k3 is flat there
    later = subject.update(batch, advantages(batch))
    assert later["policy/policy_kl"] > 1e-6  # the reference has stayed


def test_the_loss_adds_the_mean_kl_of_the_trained_tokens() -> None:
    subject = other_weights()
    batch = on_policy(subject, episodes())
    present = np.concatenate(subject.evaluate_logprobs(batch))
    config = subject.config
    reference = Learner(config, make_mesh(config.trainer.mesh), MODEL, fresh(3)).evaluate_logprobs(batch)
    want = np.mean(approximate_kl(present, np.concatenate(reference), "k3"))
    zero = np.zeros(len(batch), np.float32)
    zero[0] = 1e-12  # questions whose advantages are all zero are left out
    metrics = subject.update(batch, zero + 1e-12)
    assert metrics["policy/policy_kl"] == pytest.approx(want, rel=1e-4)
    assert metrics["policy/loss"] == pytest.approx(0.5 * want, rel=1e-4)


def test_the_kl_pulls_towards_the_reference() -> None:
    subject = other_weights("trainer.policy.optimizer_config.lr=0.01")
    batch = on_policy(subject, episodes())
    kls = [subject.update(batch, np.full(len(batch), 1e-12))["policy/policy_kl"] for _ in range(5)]
    assert kls[-1] < 0.8 * kls[0]


def test_in_the_reward_it_lies_on_each_token_as_it_was_drawn() -> None:
    config = test_learner.settings("trainer.algorithm.use_kl_in_reward=true", "trainer.algorithm.kl_loss_coef=0.25")
    subject = Learner(config, make_mesh(MeshConfig()), MODEL, fresh(0), reference=fresh(3))
    batch = episodes()
    reference = Learner(config, make_mesh(MeshConfig()), MODEL, fresh(3)).evaluate_logprobs(batch)
    want = []
    for episode, logprobs in zip(batch, reference, strict=True):
        drawn = [p for p, m in zip(episode.logprobs, episode.loss_mask, strict=True) if m]
        want.append([slow(a, b, "k3") for a, b in zip(drawn, logprobs, strict=True)])
    for got, expected in zip(subject.reference_kls(batch), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4)
    metrics = learn(subject, load_estimator("grpo"), batch)
    assert metrics["loss/avg_final_rewards"] == pytest.approx(-0.25 * np.mean([sum(k) for k in want]), rel=1e-4)
    assert metrics["loss/avg_kl"] == pytest.approx(np.mean([np.mean(k) for k in want]), rel=1e-4)


@given(st.floats(0, 5), st.floats(0.01, 2), st.integers(1, 2000), st.integers(1, 5000), st.floats(1e-4, 1))
def test_the_weight_follows_the_published_controller(
    kl: float, target: float, episodes: int, horizon: int, weight: float
) -> None:
    """Ziegler et al. 2019, equation 2."""
    error = kl / target - 1.0
    error = 0.2 if error > 0.2 else -0.2 if error < -0.2 else error
    settings = KLControlConfig(type="adaptive", kl_target=target, horizon=horizon)
    want = weight * (1.0 + error * episodes / horizon)
    assert next_coefficient(weight, kl, episodes, settings) == pytest.approx(max(want, 0.0), rel=1e-9, abs=1e-12)
    assert next_coefficient(weight, kl, episodes, KLControlConfig()) == weight


@pytest.mark.parametrize("where", ["use_kl_loss", "use_kl_in_reward"])
def test_a_kl_above_its_target_makes_the_next_step_pull_harder(where: str) -> None:
    config = test_learner.settings(
        "trainer.policy.remat=none",
        f"trainer.algorithm.{where}=true",
        "trainer.algorithm.kl_loss_coef=0.5",
        "trainer.algorithm.kl_ctrl={type: adaptive, kl_target: 1e-4, horizon: 24}",
        "trainer.algorithm.zero_variance_filter=false",
    )
    subject = Learner(config, make_mesh(config.trainer.mesh), MODEL, fresh(0), reference=fresh(3))
    batch = on_policy(subject, episodes())
    estimator = load_estimator("grpo")
    first, second = (learn(subject, estimator, batch) for _ in range(2))
    assert first["loss/kl_loss_coef"] == 0.5
    assert second["loss/kl_loss_coef"] == pytest.approx(0.5 * (1 + 0.2 * 12 / 24))
    if where == "use_kl_loss":  # every reward is equal: the loss is the KL alone, at its present weight
        assert second["policy/loss"] == pytest.approx(
            second["loss/kl_loss_coef"] * second["policy/policy_kl"], rel=1e-4
        )
        assert first["policy/compiles"] == second["policy/compiles"]


def test_under_adapters_the_frozen_model_is_the_reference() -> None:
    subject = test_learner.learner(*KL, "trainer.policy.model.lora.rank=2")
    batch = on_policy(subject, episodes())
    before = leaves(subject._reference)
    assert subject.update(batch, advantages(batch))["policy/policy_kl"] == pytest.approx(0, abs=1e-7)
    assert subject.update(batch, advantages(batch))["policy/policy_kl"] > 0
    for a, b in zip(before, leaves(subject._reference), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_reference_of_other_sizes_is_refused(tmp_path: Path) -> None:
    save_hf(tmp_path / "policy", fresh(0), MODEL)
    wider = ModelConfig("qwen2", 64, 32, 64, 2, 4, 2, 8, tie_word_embeddings=True, attention_bias=True)
    save_hf(tmp_path / "other", jax.jit(lambda: test_learner.init_params(wider, 0))(), wider)
    config = config_file.override(
        test_learner.settings(*KL, "trainer.compile_cache="),
        [("trainer.policy.model.path", str(tmp_path / "policy")), ("trainer.ref.model.path", str(tmp_path / "other"))],
    )
    with pytest.raises(UserError, match=r"trainer.ref.model.path .*: intermediate_size differ"):
        build_learner(config)
