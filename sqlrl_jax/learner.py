"""The policy that is being trained: episodes and advantages in, one or more optimizer steps, metrics out.

Splits a batch into minibatches of whole questions, packs them, and steps with the policy loss of the configuration. The old
log-probabilities are the rollout's own: they are what the tokens were drawn with, and they stay right over several
minibatches and epochs. Only with trainer.algorithm.off_policy_correction are they the learner's, from before the update,
and the correction is between the two. How a step is compiled is step.py's business; what an episode is worth,
rl/advantages.py's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from rollout.types import Trajectory
from sqlrl_jax import compile_cache
from sqlrl_jax.allocator import keep_freed_frames, keep_freed_memory
from sqlrl_jax.config import Config, ConfigError, TrainerConfig
from sqlrl_jax.config_algorithm import AlgorithmConfig
from sqlrl_jax.config_lora import LoraConfig
from sqlrl_jax.critic import Critic
from sqlrl_jax.data.packing import PackedBatch, by_question, pack, samples_of
from sqlrl_jax.mesh import make_mesh
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.hf import load_hf
from sqlrl_jax.model.lora import init_adapters, merge
from sqlrl_jax.model.params import Params, parameter_count
from sqlrl_jax.model.peft import load_peft
from sqlrl_jax.rl.advantages import Advantages
from sqlrl_jax.rl.covariance import select_clip_cov, select_kl_cov
from sqlrl_jax.rl.kl import approximate_kl
from sqlrl_jax.rl.logprobs import TokenLogprobs
from sqlrl_jax.rl.losses import PolicyLoss, Sums, add_sums, load_policy_loss
from sqlrl_jax.rl.objective import means, policy_objective
from sqlrl_jax.rl.rewards import truncated
from sqlrl_jax.rl.tokens import make_tokens
from sqlrl_jax.step import Program, State, Stepper, put

# What two models of one program may differ in.
_FREE = ("dtype", "extra", "eos_token_ids", "bos_token_id", "pad_token_id", "max_position_embeddings")

OldPolicy = Literal["rollout", "present", "scored"]


def old_policy(trainer: TrainerConfig) -> OldPolicy:
    """Where the old log-probabilities come from. Without a correction: the rollout. With one they are the learner's before
    the update: where a batch is one optimizer step those are the present ones, which cost nothing, otherwise those of a
    forward pass over the batch."""
    if not trainer.algorithm.off_policy_correction.enabled:
        return "rollout"
    one_step = trainer.policy_mini_batch_size == trainer.train_batch_size and trainer.update_epochs_per_batch == 1
    return "present" if one_step else "scored"


def objective_of(
    algorithm: AlgorithmConfig, policy_loss: PolicyLoss, old: OldPolicy, out: TokenLogprobs, batch: dict[str, Array]
) -> tuple[Float[Array, ""], Sums]:
    """The summed policy loss of a micro-batch's trained tokens and the sums behind its metrics."""
    tokens = make_tokens(
        out.logprobs,
        batch["rollout_logprobs"],
        batch["advantages"],
        batch["weights"],
        batch["mask"],
        batch["episodes"],
        old_logprobs=out.logprobs if old == "present" else batch.get("old_logprobs"),
        selected=batch.get("selected"),
        reference_logprobs=batch.get("reference_logprobs"),
    )
    return policy_objective(tokens, out.entropy, policy_loss, algorithm, batch.get("kl_coef"))


def make_program(config: Config, mesh: Mesh, model_config: ModelConfig, optimizer_steps: int = 0) -> Program:
    """The compiled step of a run, made without weights. `optimizer_steps` is the run's total, for a cosine schedule."""
    algorithm = config.trainer.algorithm
    objective = partial(
        objective_of, algorithm, load_policy_loss(algorithm.policy_loss_type), old_policy(config.trainer)
    )
    return Program(
        config.trainer.policy,
        model_config,
        mesh,
        objective,
        temperature=config.generator.sampling_params.temperature or 1.0,
        total_steps=optimizer_steps,
    )


class Learner:
    """Parameters, optimizer and the update. `params` are the model's weights: trained, or frozen under adapters. The
    `reference` of a KL term is another model's, or `params` as they are now. With a `critic`, its state is part of what a
    checkpoint holds; so is `kl_coef`, the present weight of the KL. What an episode is worth, and the critic's own steps,
    are credit.py's business."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        model_config: ModelConfig,
        params: Params,
        optimizer_steps: int = 0,
        reference: Params | None = None,
        critic: Critic | None = None,
    ) -> None:
        self.config, self.mesh, self.model_config = config, mesh, model_config
        self.critic, self.kl_coef = critic, config.trainer.algorithm.kl_loss_coef
        policy = config.trainer.policy
        self._reference = reference
        self._old, self._compiled = old_policy(config.trainer), compile_cache.counter()
        program = make_program(config, mesh, model_config, optimizer_steps)
        if self.lora.path:
            read = load_peft(self.lora.path, model_config, self.lora, policy.param_dtype)
            self._stepper = Stepper(program, jax.tree.map(put, read, program.shardings.params), params)
        elif self.lora.rank:
            adapters = init_adapters(program.trained, mesh, config.trainer.seed, policy.param_dtype)
            self._stepper = Stepper(program, adapters, params)
        else:
            self._stepper = Stepper(program, params)
        if config.trainer.algorithm.needs_reference and reference is None:
            copy = partial(jnp.array, dtype=policy.compute_dtype, copy=True)
            start = self.params if self.lora.path else params  # fresh adapters change nothing
            self._reference = start if self.lora.rank else jax.tree.map(copy, start)

    @property
    def state(self) -> State:
        """Everything a checkpoint must hold; assign to restore."""
        return self._stepper.state

    @state.setter
    def state(self, state: State) -> None:
        self._stepper.state = state

    @property
    def lora(self) -> LoraConfig:
        """The adapters; of rank 0 where all weights are trained."""
        return self.config.trainer.policy.model.lora

    @property
    def tokenizer_dir(self) -> Path:
        """Where the model and its tokenizer are."""
        return Path(self.config.trainer.policy.model.path)

    @property
    def parameter_count(self) -> int:
        """Numbers in the model, trained or not; adapters apart."""
        return parameter_count(self.model_config)

    @property
    def trained_count(self) -> int:
        """Numbers that are trained."""
        return sum(math.prod(spec.shape) for spec in self._stepper.program.trained.values())

    @property
    def params(self) -> Params:
        """The present weights, under adapters merged with them. The next update donates them: do not keep them over it."""
        return merge(self._stepper.frozen, self._stepper.state.params, self.lora)

    def abstract_state(self) -> State:
        """Shapes, dtypes and shardings of `state`."""
        return self._stepper.program.abstract_state()

    def update(
        self, trajectories: Sequence[Trajectory], advantages: Advantages, owners: Sequence[int] | None = None
    ) -> dict[str, float]:
        """Trains on a batch of episodes, one advantage each or one a sampled token; returns the metrics named policy/*.
        Where they are parts of episodes, `owners` says of which, for those metrics that count episodes.

        Episodes of one task_id are one question; a minibatch is `policy_mini_batch_size` questions in order of
        appearance. With `zero_variance_filter`, questions whose advantages are all zero are left out, with
        `apply_overlong_filtering` episodes that ran out of tokens.
        """
        owners = range(len(trajectories)) if owners is None else owners
        made = [(chosen, p) for chosen, p in self._minibatches(trajectories, advantages) if p.total_weight > 0]
        batches = [packed for _, packed in made]
        if self._old == "scored":
            for packed in batches:
                packed.put("old_logprobs", [out.logprobs for out in self._stepper.scored(packed)])
        if self.config.trainer.algorithm.use_kl_loss:
            for packed in batches:
                scored = self._stepper.scored(packed, self._reference)
                packed.put("reference_logprobs", [out.logprobs for out in scored])
                if self.config.trainer.algorithm.adapts_kl:
                    packed.put("kl_coef", [np.asarray(self.kl_coef, np.float32)] * len(packed.micro_batches))
        steps = []
        for _ in range(self.config.trainer.update_epochs_per_batch):
            for packed in batches:
                self._select(packed)
                steps.append(self._stepper.minibatch(packed))
        counts = {
            "policy/episodes": len(set(owners)),
            "policy/trained_episodes": sum(len({owners[i] for i in chosen}) for chosen, _ in made),
            "policy/trained_samples": sum(packed.samples for packed in batches),
            "policy/overlong_filtered": len(
                {o for o, t in zip(owners, trajectories, strict=True) if self._left_out(t)}
            ),
        }
        return {name: float(count) for name, count in counts.items()} | self._metrics(batches, jax.device_get(steps))

    def evaluate_logprobs(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        """The present weights' log-probabilities of each episode's sampled tokens, at the sampling temperature."""
        return self._evaluate(trajectories, None)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """The present weights' log-probability, at temperature 1, of every id but the first of each sequence."""
        whole = [
            Trajectory(
                str(i), "", 0, [ids[0]], list(ids[1:]), [1] * (len(ids) - 1), [0.0] * (len(ids) - 1), [], 0.0, "", ""
            )
            for i, ids in enumerate(sequences)
        ]
        policy, shards = self.config.trainer.policy, self._stepper.program.shards
        packed = pack(  # few short rows: this is done after every push
            samples_of(whole, [0.0] * len(whole), "token_mean"),
            row_tokens=min((policy.row_tokens, *policy.buckets)),
            rows_per_micro_batch=shards,
            slot_multiple=policy.logprob_chunk,
            shards=shards,
        )
        scored = packed.per_sample([np.asarray(out.logprobs) for out in self._stepper.plain_logprobs(packed)])
        return [logprobs.tolist() for logprobs in scored]

    def reference_kls(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        """The KL of each episode's sampled tokens, as they were drawn, from the reference."""
        kind, out = self.config.trainer.algorithm.kl_estimator_type, []
        for trajectory, reference in zip(trajectories, self._evaluate(trajectories, self._reference), strict=True):
            drawn = np.array(trajectory.logprobs)[np.array(trajectory.loss_mask, bool)]
            out.append(approximate_kl(drawn, reference, kind))
        return out

    def _evaluate(self, trajectories: Sequence[Trajectory], model: Params | None) -> list[np.ndarray]:
        packed = self._stepper.program.pack(samples_of(trajectories, [0.0] * len(trajectories), "token_mean"))
        return packed.per_sample([np.asarray(out.logprobs) for out in self._stepper.scored(packed, model)])

    def _minibatches(
        self, trajectories: Sequence[Trajectory], advantages: Advantages
    ) -> list[tuple[list[int], PackedBatch]]:
        """Which trajectories a minibatch trains on, and they packed."""
        algorithm = self.config.trainer.algorithm
        if len(trajectories) != len(advantages):
            raise ValueError(f"{len(advantages)} advantages for {len(trajectories)} trajectories: expected one each")
        out = []
        for part in by_question(trajectories, self.config.trainer.policy_mini_batch_size):
            if algorithm.zero_variance_filter:
                part = [group for group in part if any(np.any(advantages[i] != 0) for i in group)]
            chosen = [i for group in part for i in group if not self._left_out(trajectories[i])]
            samples = samples_of(
                [trajectories[i] for i in chosen],
                [advantages[i] for i in chosen],
                algorithm.loss_reduction,
                algorithm.max_seq_len,
            )
            out.append((chosen, self._stepper.program.pack(samples)))
        return out

    def _left_out(self, trajectory: Trajectory) -> bool:
        return self.config.generator.apply_overlong_filtering and truncated(trajectory)

    def _select(self, packed: PackedBatch) -> None:
        """Marks the tokens that clip_cov or kl_cov treat apart, by the weights of this step: one more forward pass."""
        algorithm = self.config.trainer.algorithm
        if algorithm.policy_loss_type not in ("clip_cov", "kl_cov"):
            return
        new = packed.in_order([np.asarray(out.logprobs) for out in self._stepper.scored(packed)])
        advantages = packed.in_order([arrays["advantages"] for arrays in packed.micro_batches])
        if algorithm.policy_loss_type == "kl_cov":
            selected = select_kl_cov(new, advantages, algorithm)
        else:
            names = {"rollout": "rollout_logprobs", "scored": "old_logprobs"}
            old = (
                new if self._old == "present" else packed.in_order([m[names[self._old]] for m in packed.micro_batches])
            )
            rng = np.random.default_rng([self.config.trainer.seed, int(self.state.step), int(self.state.skipped)])
            selected = select_clip_cov(new, old, advantages, algorithm, rng)
        packed.put("selected", packed.in_slots(selected))

    def _metrics(self, batches: list[PackedBatch], steps: list[tuple[Sums, dict[str, Array]]]) -> dict[str, float]:
        counted = {
            "policy/tokens": float(sum(b.tokens for b in batches)),
            "policy/trained_tokens": float(sum(b.trained_tokens for b in batches)),
            "policy/shared_fraction": 1.0 - _ratio(sum(b.stored for b in batches), sum(b.tokens for b in batches)),
            "policy/padding_fraction": 1.0 - _ratio(sum(b.stored for b in batches), sum(b.capacity for b in batches)),
            "policy/optimizer_steps": float(len(steps)),
            "policy/skipped_steps": float(sum(int(m["skipped"]) for _, m in steps)),
            "policy/compiles": float(self._compiled.programs),
        }
        if not steps:  # every question had one reward for all its episodes: nothing to learn from
            return counted
        total: Sums = {}
        for sums, _ in steps:
            total = add_sums(total, sums, np.maximum) if total else sums
        first = means({name: float(value) for name, value in steps[0][0].items()})
        weight = sum(b.total_weight for b in batches) * (len(steps) / len(batches))
        out = {f"policy/{name}": value for name, value in means({k: float(v) for k, v in total.items()}).items()}
        return (
            counted
            | out
            | {
                "policy/loss": float(total["loss"]) / weight,
                "policy/logprob_diff": first["logprob_diff"],  # before the first step: rollout against learner alone
                "policy/logprob_diff_max": first["logprob_diff_max"],
                "policy/grad_norm": float(np.mean([m["grad_norm"] for _, m in steps])),
                "policy/lr": float(steps[-1][1]["lr"]),
            }
        )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def build_learner(config: Config, steps: int = 0) -> Learner:
    """A learner on all devices, with the weights of trainer.policy.model.path. `steps` is the run's number of batches, for
    schedules."""
    trainer, algorithm = config.trainer, config.trainer.algorithm
    optimizer_steps, critic_steps = (
        steps * trainer.update_epochs_per_batch * (trainer.train_batch_size // size)
        for size in (trainer.policy_mini_batch_size, trainer.critic_questions)
    )
    if not keep_freed_memory():
        keep_freed_frames()
    compile_cache.enable(config.trainer.compile_cache)
    mesh = make_mesh(config.trainer.mesh)
    policy = config.trainer.policy
    model_config = ModelConfig.from_dir(policy.model.path)
    dtype = policy.compute_dtype if policy.model.lora.rank else policy.param_dtype
    params = load_hf(policy.model.path, model_config, mesh, dtype)
    other = config.trainer.ref.model.path
    reference = None
    if algorithm.needs_reference and other:
        reference = load_hf(other, _same_kind(model_config, other), mesh, policy.compute_dtype)
    critic = _build_critic(config, mesh, model_config, params, critic_steps) if algorithm.needs_critic else None
    return Learner(config, mesh, model_config, params, optimizer_steps, reference, critic)


def _build_critic(config: Config, mesh: Mesh, model_config: ModelConfig, params: Params, steps: int) -> Critic:
    """A critic with the layers of trainer.critic.model.path, or of the policy as it is before training."""
    path = config.trainer.critic.model.path
    if path:
        known, model_config = model_config.vocab_size, ModelConfig.from_dir(path)
        if model_config.vocab_size < known:
            raise ConfigError(
                f"trainer.critic.model.path {path} knows {model_config.vocab_size} tokens, but the policy uses {known}: the "
                f"critic must be a model of the same tokenizer"
            )
        params = load_hf(path, model_config, mesh, config.trainer.policy.param_dtype)
    return Critic(config, mesh, model_config, params, steps)


def _same_kind(config: ModelConfig, path: str) -> ModelConfig:
    """The reference runs in the policy's program, so only its weights may differ."""
    other = ModelConfig.from_dir(path)
    names = [
        f.name for f in fields(config) if f.name not in _FREE and getattr(other, f.name) != getattr(config, f.name)
    ]
    if names:
        raise ConfigError(
            f"trainer.ref.model.path {path}: {', '.join(names)} differ from trainer.policy.model.path's; the reference "
            f"must be a model of the same sizes"
        )
    return other
