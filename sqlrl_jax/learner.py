"""The policy that is being trained: episodes and advantages in, one or more optimizer steps, metrics out.

Splits a batch into minibatches of whole questions, packs them, and steps with the clipped PPO objective. The old
log-probabilities are always the rollout's own: they are what the tokens were drawn with, and they stay right over several
minibatches and epochs. How a step is compiled is step.py's business; what an episode is worth, rl/advantages.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from rollout.types import Trajectory
from sqlrl_jax import compile_cache
from sqlrl_jax.allocator import keep_freed_memory
from sqlrl_jax.config import AlgorithmConfig, Config
from sqlrl_jax.data.packing import PackedBatch, Sample, pack, samples_of
from sqlrl_jax.mesh import make_mesh
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.hf import load_hf
from sqlrl_jax.model.params import Params, parameter_count
from sqlrl_jax.rl.logprobs import TokenLogprobs
from sqlrl_jax.rl.losses import Sums, add_sums, ppo
from sqlrl_jax.step import State, Stepper


def policy_objective(
    algorithm: AlgorithmConfig, out: TokenLogprobs, batch: dict[str, Array]
) -> tuple[Float[Array, ""], Sums]:
    """The summed policy loss of a micro-batch's trained tokens and the sums behind its metrics."""
    loss, sums = ppo(
        out.logprobs,
        batch["old_logprobs"],
        batch["advantages"],
        batch["weights"],
        batch["mask"],
        eps_low=algorithm.eps_clip_low,
        eps_high=algorithm.eps_clip_high,
        dual_clip=algorithm.clip_ratio_c if algorithm.policy_loss_type == "dual_clip" else None,
    )
    entropy = jax.numpy.where(batch["mask"], out.entropy, 0.0)
    return loss, sums | {"entropy": jax.lax.stop_gradient(entropy.sum())}


class Learner:
    """Parameters, optimizer and the update. `optimizer_steps` is the run's total, which only a cosine schedule needs."""

    def __init__(
        self, config: Config, mesh: Mesh, model_config: ModelConfig, params: Params, optimizer_steps: int = 0
    ) -> None:
        self.config, self.mesh, self.model_config = config, mesh, model_config
        trainer = config.trainer
        self._stepper = Stepper(
            trainer.policy,
            model_config,
            mesh,
            params,
            partial(policy_objective, trainer.algorithm),
            temperature=config.generator.sampling_params.temperature or 1.0,
            total_steps=optimizer_steps,
        )

    @property
    def state(self) -> State:
        """Everything a checkpoint must hold; assign to restore."""
        return self._stepper.state

    @state.setter
    def state(self, state: State) -> None:
        self._stepper.state = state

    @property
    def tokenizer_dir(self) -> Path:
        """Where the model's tokenizer is."""
        return Path(self.config.trainer.policy.model.path)

    @property
    def parameter_count(self) -> int:
        """Trained numbers in the model."""
        return parameter_count(self.model_config)

    @property
    def params(self) -> Params:
        """The present weights. The next update donates them: do not keep them over it."""
        return self._stepper.state.params

    def abstract_state(self) -> State:
        """Shapes, dtypes and shardings of `state`."""
        return self._stepper.abstract_state()

    def update(self, trajectories: Sequence[Trajectory], advantages: Sequence[float] | np.ndarray) -> dict[str, float]:
        """Trains on a batch of episodes, one advantage each, and returns the metrics named policy/*.

        Episodes of one task_id are one question; a minibatch is `policy_mini_batch_size` questions in order of
        appearance. With `zero_variance_filter`, questions whose advantages are all zero are left out.
        """
        batches = [p for p in self._minibatches(trajectories, advantages) if p.total_weight > 0]
        steps = []
        for _ in range(self.config.trainer.update_epochs_per_batch):
            steps += [self._stepper.minibatch(packed) for packed in batches]
        return self._metrics(batches, jax.device_get(steps), len(trajectories))

    def evaluate_logprobs(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        """The present weights' log-probabilities of each episode's sampled tokens, at the sampling temperature."""
        packed = self._pack(samples_of(trajectories, [0.0] * len(trajectories), "token_mean"))
        return packed.per_sample([np.asarray(out.logprobs) for out in self._stepper.logprobs(packed)])

    def _pack(self, samples: list[Sample]) -> PackedBatch:
        policy = self.config.trainer.policy
        return pack(
            samples,
            row_tokens=policy.row_tokens,
            rows_per_micro_batch=policy.rows_per_micro_batch,
            slot_multiple=policy.logprob_chunk,
            shards=self._stepper.shards,
        )

    def _minibatches(
        self, trajectories: Sequence[Trajectory], advantages: Sequence[float] | np.ndarray
    ) -> list[PackedBatch]:
        algorithm, size = self.config.trainer.algorithm, self.config.trainer.policy_mini_batch_size
        samples = samples_of(trajectories, advantages, algorithm.loss_reduction)
        questions: dict[str, list[int]] = {}
        for i, trajectory in enumerate(trajectories):
            questions.setdefault(trajectory.task_id, []).append(i)
        groups = list(questions.values())
        chosen = [groups[i : i + size] for i in range(0, len(groups), size)]
        if algorithm.zero_variance_filter:
            chosen = [[g for g in part if any(advantages[i] != 0 for i in g)] for part in chosen]
        return [self._pack([samples[i] for group in part for i in group]) for part in chosen]

    def _metrics(
        self, batches: list[PackedBatch], steps: list[tuple[Sums, dict[str, Array]]], episodes: int
    ) -> dict[str, float]:
        counted = {
            "policy/tokens": float(sum(b.tokens for b in batches)),
            "policy/trained_tokens": float(sum(b.trained_tokens for b in batches)),
            "policy/trained_episodes": float(sum(b.samples for b in batches)),
            "policy/episodes": float(episodes),
            "policy/padding_fraction": 1.0 - _ratio(sum(b.tokens for b in batches), sum(b.capacity for b in batches)),
            "policy/optimizer_steps": float(len(steps)),
            "policy/skipped_steps": float(sum(int(m["skipped"]) for _, m in steps)),
            "policy/compiles": float(self._stepper.compiles),
        }
        if not steps:  # every question had one reward for all its episodes: nothing to learn from
            return counted
        total: Sums = {}
        for sums, _ in steps:
            total = add_sums(total, sums) if total else sums
        tokens, on_policy = float(total["tokens"]), steps[0][0]
        weight = sum(b.total_weight for b in batches) * (len(steps) / len(batches))
        return counted | {
            "policy/loss": float(total["loss"]) / weight,
            "policy/clip_frac": float(total["clip_frac"]) / tokens,
            "policy/approx_kl": float(total["approx_kl"]) / tokens,
            "policy/ratio_mean": float(total["ratio"]) / tokens,
            "policy/entropy": float(total["entropy"]) / tokens,
            "policy/logprob_diff": float(on_policy["logprob_diff"]) / float(on_policy["tokens"]),
            "policy/logprob_diff_max": float(on_policy["logprob_diff_max"]),
            "policy/grad_norm": float(np.mean([m["grad_norm"] for _, m in steps])),
            "policy/lr": float(steps[-1][1]["lr"]),
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def build_learner(config: Config, optimizer_steps: int = 0) -> Learner:
    """A learner on all devices, with the weights of trainer.policy.model.path."""
    keep_freed_memory()
    compile_cache.enable(config.trainer.compile_cache)
    mesh = make_mesh(config.trainer.mesh)
    path = config.trainer.policy.model.path
    model_config = ModelConfig.from_dir(path)
    params = load_hf(path, model_config, mesh, config.trainer.policy.param_dtype)
    return Learner(config, mesh, model_config, params, optimizer_steps)
