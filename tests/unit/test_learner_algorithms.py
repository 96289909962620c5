"""Algorithms through the learner: on policy they agree, off policy the layout changes nothing, nothing recompiles."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_learner
from shared_programs import shared_programs
from test_learner import advantages, episodes, leaves, on_policy

from rollout.types import Trajectory
from sqlrl_jax.config_algorithm import CORRECTED_BY_THEMSELVES, AlgorithmConfig
from sqlrl_jax.data.packing import pack, samples_of
from sqlrl_jax.learner import Learner, objective_of, old_policy
from sqlrl_jax.rl.logprobs import TokenLogprobs
from sqlrl_jax.rl.losses import TokenLoss, load_policy_loss

ALGORITHM = "trainer.algorithm."
CORRECTION = ALGORITHM + "off_policy_correction."


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_programs(tmp_path_factory.mktemp("xla")):
        yield


def learner(*overrides: str) -> Learner:
    """What compiles fastest: this file makes many programs."""
    return test_learner.learner("trainer.policy.remat=none", *overrides)


def shifted(batch: list[Trajectory], size: float) -> list[Trajectory]:
    """The same episodes as an engine would have them that is off by up to `size`."""
    rng = np.random.default_rng(5)
    out = []
    for t in batch:
        noise = rng.uniform(-size, size, len(t.logprobs)) * np.array(t.loss_mask)
        out.append(dataclasses.replace(t, logprobs=(np.array(t.logprobs) + noise).astype(np.float32).tolist()))
    return out


def step(batch: list[Trajectory], *overrides: str) -> tuple[list[np.ndarray], dict[str, float]]:
    """A tenth of the gradient (Adam's first moment) and the metrics of one update."""
    subject = learner(*overrides)
    metrics = subject.update(batch, advantages(batch))
    return leaves(subject.state.opt_state[0].mu), metrics


def assert_close(got: list[np.ndarray], want: list[np.ndarray]) -> None:
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


@pytest.fixture(scope="module")
def sampled() -> list[Trajectory]:
    return on_policy(learner(), episodes())


@pytest.fixture(scope="module")
def ppo_gradient(sampled: list[Trajectory]) -> list[np.ndarray]:
    return step(sampled)[0]


def test_on_policy_kl_cov_makes_the_step_of_ppo(sampled: Any, ppo_gradient: Any) -> None:
    gradient, metrics = step(sampled, f"{ALGORITHM}policy_loss_type=kl_cov")
    assert_close(gradient, ppo_gradient)
    assert metrics["policy/ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy/clip_frac"] == 0
    assert metrics["policy/approx_kl"] == pytest.approx(0, abs=1e-8)


def test_a_correction_is_between_rollout_and_learner(sampled: Any, ppo_gradient: Any) -> None:
    """On policy it weighs one. An engine that finds every token e^0.5 times rarer than it is makes it e^0.5."""
    subject = learner(CORRECTION + "tis_ratio_type=token")
    metrics = subject.update(sampled, advantages(sampled))
    assert_close(leaves(subject.state.opt_state[0].mu), ppo_gradient)
    assert metrics["policy/is_ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy/is_ratio_max"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy/tis_token_clip_high_ratio"] == metrics["policy/clip_frac"] == 0
    wrong = [
        dataclasses.replace(t, logprobs=(np.array(t.logprobs) - 0.5 * np.array(t.loss_mask)).tolist()) for t in sampled
    ]
    gradient, metrics = step(wrong, CORRECTION + "tis_ratio_type=token")
    assert metrics["policy/is_ratio_mean"] == pytest.approx(np.exp(0.5), abs=1e-5)
    assert metrics["policy/ratio_mean"] == 1  # the learner's own ratio, before its first step
    assert metrics["policy/logprob_diff_max"] == pytest.approx(0.5, abs=1e-5)
    assert_close(gradient, [g * np.exp(0.5) for g in ppo_gradient])


@pytest.mark.parametrize("loss", ["dual_clip", "gspo", "cispo", "importance_sampling"])
def test_with_one_update_a_batch_the_learner_is_on_policy(loss: str, sampled: Any) -> None:
    """Ratios are 1, corrections weigh 1, no bound holds a token."""
    corrected = loss not in CORRECTED_BY_THEMSELVES
    options = [f"{CORRECTION}tis_ratio_type=sequence"] if corrected else []
    metrics = step(sampled, f"{ALGORITHM}policy_loss_type={loss}", *options)[1]
    assert metrics["policy/optimizer_steps"] == 1
    assert metrics["policy/ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy/approx_kl"] == pytest.approx(0, abs=1e-5)
    assert metrics["policy/logprob_diff_max"] < 1e-5
    assert metrics["policy/clip_frac"] == 0
    if corrected:
        assert metrics["policy/is_ratio_mean"] == pytest.approx(1, abs=1e-5)
        assert metrics["policy/is_ratio_max"] == pytest.approx(1, abs=1e-5)
        assert metrics["policy/tis_seq_clip_high_ratio"] == 0


def test_where_the_old_policy_comes_from() -> None:
    def of(*overrides: str) -> str:
        return old_policy(test_learner.settings(*overrides).trainer)

    tis = CORRECTION + "tis_ratio_type=token"
    assert of("trainer.update_epochs_per_batch=2") == "rollout"
    assert of(tis) == "present"
    assert of(tis, "trainer.update_epochs_per_batch=2") == "scored"
    assert of(tis, "trainer.policy_mini_batch_size=2") == "scored"


def test_a_loss_of_ones_own_over_several_steps_with_a_correction(monkeypatch: Any, sampled: Any) -> None:
    """Before the first step the scored policy is the present one; nothing compiles after the first update."""

    def mine(tokens: Any, settings: Any) -> TokenLoss:
        drift = jnp.where(tokens.mask, tokens.logprobs - tokens.old_logprobs, 0.0)
        return TokenLoss(-settings.settings["scale"] * tokens.advantages * jnp.exp(drift), drift != 0)

    module = ModuleType("own_loss")
    module.mine = mine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_loss", module)
    batch = shifted(sampled, 0.3)
    subject = learner(
        f"{ALGORITHM}policy_loss_type=own_loss:mine",
        f"{ALGORITHM}settings.scale=2.0",
        CORRECTION + "sequence_mask_metric=geometric",
        CORRECTION + "geo_mask_low=0.9",
        CORRECTION + "geo_mask_high=1.1",
        "trainer.update_epochs_per_batch=2",
    )
    counts = []
    for _ in range(2):
        metrics = subject.update(batch, advantages(batch))
        assert 0.4 < metrics["policy/clip_frac"] <= 0.5 + 1e-6  # its first pass is on policy, its second is not
        assert 0 < metrics["policy/geo_sequence_mask_masked_ratio"] < 1
        counts.append(metrics["policy/compiles"])
    assert counts[0] == counts[1]


def test_clip_cov_selects_over_the_minibatch_however_it_is_packed(sampled: Any) -> None:
    found = []
    for rows in (4, 1):
        subject = learner(
            f"{ALGORITHM}policy_loss_type=clip_cov",
            f"{ALGORITHM}clip_cov.clip_ratio=0.1",
            f"{ALGORITHM}clip_cov.clip_cov_lb=-100",
            f"{ALGORITHM}clip_cov.clip_cov_ub=100",
            f"trainer.policy.rows_per_micro_batch={rows}",
        )
        packed = subject._stepper.program.pack(samples_of(sampled, advantages(sampled), "token_mean"))
        subject._select(packed)
        found.append(packed.in_order([m["selected"] for m in packed.micro_batches]))
    assert found[0].sum() == int(0.1 * packed.trained_tokens)
    np.testing.assert_array_equal(found[0], found[1])


LAYOUTS = {
    "gspo": {
        "eps_clip_high": 0.02,
        "off_policy_correction": {"sequence_mask_metric": "geometric", "geo_mask_high": 1.1},
    },
    "dual_clip": {"off_policy_correction": {"tis_ratio_type": "sequence", "outlier_token_is_threshold_high": 1.25}},
    "sapo": {"use_entropy_loss": True},
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("reduction", ["token_mean", "prompt_mean", "seq_mean_token_sum_norm"])
def test_layout_changes_nothing(name: str, reduction: str) -> None:
    """One micro-batch, a row each, and two shards: the same loss, gradient and metrics."""
    settings = AlgorithmConfig.model_validate({"policy_loss_type": name, **LAYOUTS[name]})
    batch = episodes()
    samples = samples_of(batch, advantages(batch), reduction, 20)

    def of(new: jax.Array, arrays: dict[str, Any]) -> Any:
        out = TokenLogprobs(new, jnp.ones(new.shape), jnp.ones(new.shape, bool))
        return objective_of(settings, load_policy_loss(name), "scored", out, arrays)

    objective = jax.jit(jax.value_and_grad(of, has_aux=True))
    results = []
    for rows, shards in ((16, 1), (1, 1), (4, 2)):
        packed = pack(samples, row_tokens=48, rows_per_micro_batch=rows, slot_multiple=16, shards=shards)
        old = packed.in_order([m["rollout_logprobs"] for m in packed.micro_batches])
        rng = np.random.default_rng(3)
        news, olds = (packed.in_slots((old + rng.uniform(-0.3, 0.3, old.shape)).astype(np.float32)) for _ in range(2))
        packed.put("old_logprobs", olds)
        sums: Any = {}
        gradients = []
        for new, arrays in zip(news, packed.micro_batches, strict=True):
            (loss, more), gradient = objective(jnp.asarray(new), arrays)
            more = {k: float(v) for k, v in more.items()} | {"loss": float(loss)}
            sums = (
                {k: max(sums[k], v) if k.endswith("_max") else sums[k] + v for k, v in more.items()} if sums else more
            )
            gradients.append(gradient)
        results.append((packed.total_weight, sums, packed.in_order(gradients)))
    (weight, want, gradient), *others = results
    for other_weight, got, other_gradient in others:
        assert other_weight == pytest.approx(weight)
        np.testing.assert_allclose(other_gradient, gradient, rtol=1e-4, atol=1e-6)
        assert got == pytest.approx(want, rel=1e-4, abs=1e-5)
    if name != "sapo":
        assert 0 < want["clip_frac"] < want["tokens"]
        assert any(0 < v < want["episodes"] for k, v in want.items() if k.endswith("masked_ratio"))


def slow_mean(batch: list[Trajectory], values: np.ndarray, reduction: str) -> float:
    """Minus the reduction of the advantages: the loss of ppo where the ratio is 1."""
    lengths = [sum(t.loss_mask) for t in batch]
    sums = [float(a) * n for a, n in zip(values, lengths, strict=True)]
    if reduction == "token_mean":
        return -sum(sums) / sum(lengths)
    if reduction == "sequence_mean":
        return -sum(s / n for s, n in zip(sums, lengths, strict=True)) / len(batch)
    if reduction == "seq_mean_token_sum_norm":
        return -sum(s / 20 for s in sums) / len(batch)
    questions = dict.fromkeys(t.task_id for t in batch)
    total = 0.0
    for q in questions:
        mine = [i for i, t in enumerate(batch) if t.task_id == q]
        total += sum(sums[i] for i in mine) / sum(lengths[i] for i in mine)
    return -total / len(questions)


def test_reductions_are_means_over_the_whole_minibatch(sampled: Any) -> None:
    values = advantages(sampled)
    for reduction in ("token_mean", "sequence_mean", "seq_mean_token_sum_norm", "prompt_mean"):
        samples = samples_of(sampled, values, reduction, 20)
        packed = learner()._stepper.program.pack(samples)
        total = sum((m["weights"] * m["advantages"]).sum(dtype=np.float64) for m in packed.micro_batches)
        assert -total / packed.total_weight == pytest.approx(slow_mean(sampled, values, reduction), rel=1e-5)
    with pytest.raises(ValueError, match="no loss reduction 'seq_mean_token_sum_norm' with max_seq_len None"):
        samples_of(sampled, values, "seq_mean_token_sum_norm")


def test_overlong_episodes_are_left_out(sampled: Any) -> None:
    cut = [dataclasses.replace(t, stop_reason="length") if i % 3 == 0 else t for i, t in enumerate(sampled)]
    subject, same = learner("generator.apply_overlong_filtering=true"), learner()
    metrics = subject.update(cut, advantages(cut))
    assert metrics["policy/overlong_filtered"] == 4
    assert metrics["policy/trained_episodes"] == 8
    kept, values = [t for i, t in enumerate(sampled) if i % 3], advantages(cut)
    same.update(kept, values[[i for i in range(len(cut)) if i % 3]])
    assert_close(leaves(subject.state.opt_state[0].mu), leaves(same.state.opt_state[0].mu))


def test_an_advantage_a_token_reaches_its_token(sampled: Any, ppo_gradient: Any) -> None:
    values = advantages(sampled)
    spread = [np.full(sum(t.loss_mask), v, np.float32) for t, v in zip(sampled, values, strict=True)]
    spread[0] = np.arange(len(spread[0]), dtype=np.float32)
    packed = learner()._stepper.program.pack(samples_of(sampled, spread, "token_mean"))
    back = packed.per_sample([m["advantages"] for m in packed.micro_batches])
    for got, want in zip(back, spread, strict=True):
        np.testing.assert_array_equal(got, want)
    subject = learner()
    subject.update(sampled, [np.full(len(part), v, np.float32) for part, v in zip(spread, values, strict=True)])
    assert_close(leaves(subject.state.opt_state[0].mu), ppo_gradient)
