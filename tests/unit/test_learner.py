"""The learner's update: layout never changes the result, bad steps are skipped, the old policy is the rollout's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from shared_programs import shared_programs

from rollout.types import Trajectory
from sqlrl_jax import config as configuration
from sqlrl_jax import config_file
from sqlrl_jax.data.packing import samples_of
from sqlrl_jax.learner import Learner
from sqlrl_jax.mesh import make_mesh
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.decoder import init_params

MODEL = ModelConfig("qwen2", 64, 32, 48, 2, 4, 2, 8, tie_word_embeddings=True, attention_bias=True)


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Learners of one configuration share compiled programs: every test makes its own learner."""
    with shared_programs(tmp_path_factory.mktemp("xla")):
        yield


fresh = jax.jit(partial(init_params, MODEL))


def settings(*overrides: str) -> configuration.Config:
    return config_file.load(
        None,
        [
            "generator.max_input_length=32",
            "generator.sampling_params.max_generate_length=8",
            "trainer.policy.row_tokens=48",
            "trainer.policy.rows_per_micro_batch=4",
            "trainer.policy.logprob_chunk=16",
            "trainer.policy.optimizer_config.lr=0.001",
            "trainer.policy.optimizer_config.max_grad_norm=1000",
            "trainer.train_batch_size=4",
            "trainer.policy_mini_batch_size=4",
            *overrides,
        ],
    )


def learner(*overrides: str, seed: int = 0) -> Learner:
    config = settings(*overrides)
    return Learner(config, make_mesh(config.trainer.mesh), MODEL, fresh(seed))


def episodes(questions: int = 4, samples: int = 3, seed: int = 0) -> list[Trajectory]:
    rng = np.random.default_rng(seed)
    out = []
    for q in range(questions):
        prompt = rng.integers(1, 64, rng.integers(2, 12))
        for s in range(samples):
            length = int(rng.integers(3, 30))
            mask = (rng.random(length) < 0.6).astype(int)
            mask[0] = 1
            logprobs = np.where(mask, -rng.random(length) * 4, 0.0).astype(np.float32).tolist()
            response = rng.integers(1, 64, length).tolist()
            spans = [(0, 0, length)]
            out.append(
                Trajectory(
                    f"q{q}", "s", s, prompt.tolist(), response, mask.tolist(), logprobs, spans, 0.0, "wrong", "solution"
                )
            )
    return out


def on_policy(learner: Learner, batch: list[Trajectory]) -> list[Trajectory]:
    """The same episodes with the learner's own log-probabilities."""
    out = []
    for trajectory, values in zip(batch, learner.evaluate_logprobs(batch), strict=True):
        logprobs = np.zeros(len(trajectory.response_ids), np.float32)
        logprobs[np.flatnonzero(trajectory.loss_mask)] = values
        out.append(dataclasses.replace(trajectory, logprobs=logprobs.tolist()))
    return out


def advantages(batch: list[Trajectory]) -> np.ndarray:
    return np.random.default_rng(1).normal(size=len(batch)).astype(np.float32)


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same(left: Any, right: Any) -> None:
    for a, b in zip(leaves(left), leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def gradient_like(*overrides: str, batch: list[Trajectory] | None = None) -> tuple[list[np.ndarray], dict[str, float]]:
    """Adam's first moment after one step is a tenth of the mean clipped gradient: comparable where parameters (sign-like
    in the first step) are not."""
    subject = learner(*overrides)
    batch = batch or on_policy(subject, episodes())
    metrics = subject.update(batch, advantages(batch))
    return leaves(subject.state.opt_state[0].mu), metrics


@pytest.fixture(scope="module")
def reference() -> tuple[list[Trajectory], list[np.ndarray], dict[str, float]]:
    batch = on_policy(learner(), episodes())
    return batch, *gradient_like(batch=batch)


LAYOUTS = {
    "whole batch and head in one piece": ["trainer.policy.rows_per_micro_batch=16", "trainer.policy.logprob_chunk=768"],
    "row by row, unrolled, no remat": [
        "trainer.policy.rows_per_micro_batch=1",
        "trainer.policy.scan_layers=false",
        "trainer.policy.remat=none",
    ],
    "nothing stored once": ["trainer.policy.share_prefixes=false"],
    "an episode a row": ["trainer.policy.row_tokens=42", "trainer.policy.rows_per_micro_batch=12"],
    "rows of two lengths": [
        "trainer.policy.row_tokens=64",
        "trainer.policy.rows_per_micro_batch=2",
        "trainer.policy.row_buckets=[32]",
    ],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_does_not_change_the_step(reference: Any, name: str) -> None:
    batch, gradients, metrics = reference
    got, got_metrics = gradient_like(*LAYOUTS[name], batch=batch)
    for a, b in zip(got, gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())
    for key in ("policy/loss", "policy/grad_norm", "policy/entropy", "policy/tokens"):
        assert got_metrics[key] == pytest.approx(metrics[key], rel=1e-4, abs=1e-6)


def test_packed_equals_each_episode_alone() -> None:
    subject, batch = learner(), episodes()
    together = subject.evaluate_logprobs(batch)
    for trajectory, values in zip(batch, together, strict=True):
        assert len(values) == sum(trajectory.loss_mask)
        np.testing.assert_allclose(subject.evaluate_logprobs([trajectory])[0], values, atol=1e-5)


def test_on_policy_the_ratio_is_one(reference: Any) -> None:
    metrics = reference[2]
    assert metrics["policy/ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy/clip_frac"] == 0
    assert metrics["policy/logprob_diff_max"] < 1e-5
    assert metrics["policy/trained_tokens"] == sum(sum(t.loss_mask) for t in reference[0])


def test_given_tokens_are_scored_at_temperature_1_whatever_is_sampled_with() -> None:
    batch = episodes()
    expected = learner().evaluate_logprobs(batch)
    sequences = [e.prompt_ids + e.response_ids for e in batch]
    found = learner("generator.sampling_params.temperature=0.5").score(sequences)
    assert [len(logprobs) for logprobs in found] == [len(ids) - 1 for ids in sequences]
    for episode, theirs, ours in zip(batch, expected, found, strict=True):
        sampled = np.array(episode.loss_mask, bool)
        np.testing.assert_allclose(np.array(ours)[len(episode.prompt_ids) - 1 :][sampled], theirs, atol=1e-5)


def test_the_update_makes_good_episodes_likelier() -> None:
    subject = learner()
    batch = on_policy(subject, episodes())
    signs = np.where(np.arange(len(batch)) % 2 == 0, 1.0, -1.0)
    before = np.array([v.mean() for v in subject.evaluate_logprobs(batch)])
    for _ in range(3):
        subject.update(batch, signs)
    after = np.array([v.mean() for v in subject.evaluate_logprobs(batch)])
    assert ((after - before) * signs).sum() > 0.1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_with_a_non_finite_gradient_changes_nothing_and_is_counted(value: float) -> None:
    subject, batch = learner(), episodes()
    subject.update(batch, advantages(batch))
    params, moments = leaves(subject.state.params), leaves(subject.state.opt_state)
    bad = advantages(batch)
    bad[3] = value
    metrics = subject.update(batch, bad)
    assert metrics["policy/skipped_steps"] == 1
    assert int(subject.state.step) == 1
    assert_same(subject.state.params, params)
    assert_same(subject.state.opt_state, moments)
    assert subject.update(batch, advantages(batch))["policy/skipped_steps"] == 0
    assert int(subject.state.skipped) == 1
    assert int(subject.state.step) == 2


def test_nothing_compiles_after_the_first_step() -> None:
    subject = learner()
    counts = []
    for i in range(4):
        batch = episodes(questions=2 + i, samples=1 + i % 2 * 4, seed=i)
        counts.append(subject.update(batch, advantages(batch))["policy/compiles"])
    assert len(set(counts)) == 1
    jax.jit(lambda x: x + len(counts))(np.float32(0))  # the counter hears of every program
    batch = episodes()
    assert subject.update(batch, advantages(batch))["policy/compiles"] > counts[-1]


def test_rows_of_two_lengths_make_the_same_step_and_compile_once_each() -> None:
    subject, batch = learner("trainer.policy.row_buckets=[24]"), episodes(samples=8, seed=5)
    packed = subject._stepper.program.pack(samples_of(batch, advantages(batch), "token_mean"))
    assert {arrays["tokens"].shape[1] for arrays in packed.micro_batches} == {24, 48}
    want = learner().update(batch, advantages(batch))
    first = subject.update(batch, advantages(batch))
    for key in ("policy/loss", "policy/grad_norm", "policy/entropy"):
        assert first[key] == pytest.approx(want[key], rel=1e-4, abs=1e-6)
    counts = [subject.update(part, advantages(part))["policy/compiles"] for part in (batch[:12], batch)]
    assert counts == [first["policy/compiles"]] * 2


def test_minibatches_are_whole_questions_and_epochs_repeat_them() -> None:
    subject = learner("trainer.policy_mini_batch_size=2", "trainer.update_epochs_per_batch=3")
    batch = on_policy(subject, episodes(questions=4))
    metrics = subject.update(batch, advantages(batch))
    assert metrics["policy/optimizer_steps"] == 6
    assert int(subject.state.step) == 6
    assert metrics["policy/logprob_diff_max"] < 1e-5  # before the first of the steps
    assert abs(metrics["policy/ratio_mean"] - 1) > 1e-5  # the later ones are off policy


def test_questions_without_spread_are_left_out() -> None:
    batch, subject = episodes(), learner()
    values = advantages(batch)
    values[3:6] = 0.0
    metrics = subject.update(batch, values)
    kept = [t for i, t in enumerate(batch) if not 3 <= i < 6]
    assert metrics["policy/trained_episodes"] == 9
    assert metrics["policy/trained_tokens"] == sum(sum(t.loss_mask) for t in kept)
    before = leaves(subject.state.params)
    metrics = subject.update(batch, np.zeros(len(batch)))
    assert metrics["policy/optimizer_steps"] == 0
    assert_same(subject.state.params, before)


def test_sequence_mean_gives_each_episode_the_same_weight() -> None:
    subject = learner("trainer.algorithm.loss_reduction=sequence_mean")
    batch = on_policy(subject, episodes())
    values = advantages(batch)
    assert subject.update(batch, values)["policy/loss"] == pytest.approx(-values.mean(), abs=1e-5)
    subject = learner()
    lengths = np.array([sum(t.loss_mask) for t in batch])
    assert subject.update(batch, values)["policy/loss"] == pytest.approx(
        -(values * lengths).sum() / lengths.sum(), abs=1e-5
    )


def test_the_same_state_and_batch_give_the_same_bits() -> None:
    states = []
    for _ in range(2):
        subject = learner("trainer.policy.optimizer_config.name=muon")
        for seed in range(2):
            batch = episodes(seed=seed)
            subject.update(batch, advantages(batch))
        states.append(leaves(subject.state))
    assert_same(states[0], states[1])


def test_clipping_bounds_the_gradient() -> None:
    plain, metrics = gradient_like()
    clipped, clipped_metrics = gradient_like("trainer.policy.optimizer_config.max_grad_norm=0.01")
    assert metrics["policy/grad_norm"] == pytest.approx(clipped_metrics["policy/grad_norm"], rel=1e-5)
    ratio = 0.01 / metrics["policy/grad_norm"]
    for a, b in zip(clipped, plain, strict=True):
        np.testing.assert_allclose(a, b * ratio, rtol=1e-3, atol=1e-9)
