"""The critic of gae: a model that says of each sampled token, before it is sampled, what the episode will still earn.

A model of the policy's kind with layers of its own, a vector in place of the output matrix, its own optimizer, and the
policy's rows, meshes and step (step.py). The vector starts at zero: before its first step the critic says 0 of everything,
and gae is the whitened return. Left out: adapters (a critic that cannot move its layers learns little), and layers shared
with the policy, whose loss they would disturb.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from rollout.types import Trajectory
from sqlrl_jax.config import Config, LoraConfig, PolicyConfig
from sqlrl_jax.data.packing import PackedBatch, by_question, samples_of
from sqlrl_jax.mesh import constrain
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.params import Params, ParamSpec, param_specs
from sqlrl_jax.rl.losses import Sums, add_sums
from sqlrl_jax.rl.values import explained_variance, value_loss
from sqlrl_jax.step import Program, State, Stepper, put

HEAD = "value_head"


def critic_policy(config: Config) -> PolicyConfig:
    """How the critic is trained: trainer.policy with the critic's optimizer, without adapters."""
    policy = config.trainer.policy
    model = policy.model.model_copy(update={"lora": LoraConfig()})
    return policy.model_copy(update={"model": model, "optimizer_config": config.trainer.critic.optimizer_config})


def value_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    """The critic's parameters: the decoder's, with a vector in place of an output matrix of its own."""
    specs = {path: spec for path, spec in param_specs(config).items() if path != "lm_head"}
    width = config.hidden_size
    return specs | {HEAD: ParamSpec((width,), (None,), (width,), 0.0)}


class CriticProgram(Program):
    """The step of a critic: its outputs are values [shards, slots], float32."""

    def _declared(self) -> tuple[dict[str, ParamSpec], dict[str, ParamSpec]]:
        return value_specs(self.model_config), {}

    def _outputs(  # type: ignore[override]
        self, params: Params, batch: dict[str, Array], temperature: float | None = None
    ) -> Float[Array, "shards slots"]:
        values = self._hidden(params, batch).astype(jnp.float32) @ params[HEAD].astype(jnp.float32)
        values = constrain(values, self.mesh, ("batch", None)).reshape(self.shards, -1)  # a shard is some of the rows
        return jnp.take_along_axis(values, batch["index"], axis=1, mode="clip")


def critic_objective(clip: float | None, values: Array, batch: dict[str, Array]) -> tuple[Float[Array, ""], Sums]:
    """The summed loss of a micro-batch's trained tokens and the sums behind its metrics."""
    return value_loss(values, batch["old_values"], batch["returns"], batch["mask"], clip)


def make_critic_program(
    config: Config, mesh: Mesh, model_config: ModelConfig, optimizer_steps: int = 0
) -> CriticProgram:
    """The compiled step of the critic, made without weights."""
    objective = partial(critic_objective, config.trainer.algorithm.value_clip)
    return CriticProgram(
        critic_policy(config), model_config, mesh, objective, temperature=1.0, total_steps=optimizer_steps
    )


class Critic:
    """A critic and its training. `params` are those of a whole model, whose layers it starts from."""

    def __init__(
        self, config: Config, mesh: Mesh, model_config: ModelConfig, params: Params, optimizer_steps: int = 0
    ) -> None:
        self.config = config
        program = make_critic_program(config, mesh, model_config, optimizer_steps)
        dtype = config.trainer.policy.param_dtype
        copies = {
            name: jax.tree.map(partial(jnp.array, dtype=dtype, copy=True), value)
            for name, value in params.items()
            if name != "lm_head"
        }
        head = put(np.zeros(model_config.hidden_size, dtype), program.shardings.params[HEAD])
        self._stepper = Stepper(program, copies | {HEAD: head})

    @property
    def state(self) -> State:
        """Everything a checkpoint must hold; assign to restore."""
        return self._stepper.state

    @state.setter
    def state(self, state: State) -> None:
        self._stepper.state = state

    def abstract_state(self) -> State:
        """Shapes, dtypes and shardings of `state`."""
        return self._stepper.program.abstract_state()

    def values(self, trajectories: Sequence[Trajectory]) -> list[Float[np.ndarray, " tokens"]]:
        """The value before each episode's sampled tokens, under the present weights."""
        packed = self._packed(trajectories)
        return packed.per_sample([np.asarray(values) for values in self._stepper.scored(packed)])

    def update(
        self, trajectories: Sequence[Trajectory], values: Sequence[np.ndarray], returns: Sequence[np.ndarray]
    ) -> dict[str, float]:
        """Trains towards `returns` from `values`, what it said of the same tokens; returns the metrics named critic/*.

        A minibatch is `critic_mini_batch_size` questions in order of appearance; the loss is a mean over its tokens.
        """
        trainer = self.config.trainer
        batches = []
        for groups in by_question(trajectories, trainer.critic_questions):
            chosen = [i for group in groups for i in group]
            packed = self._packed([trajectories[i] for i in chosen])
            for name, parts in (("old_values", values), ("returns", returns)):
                flat = np.concatenate([np.asarray(parts[i], np.float32) for i in chosen])
                packed.put(name, packed.in_slots(flat))
            if packed.trained_tokens:
                batches.append(packed)
        steps = [self._stepper.minibatch(packed) for _ in range(trainer.update_epochs_per_batch) for packed in batches]
        metrics = {
            "critic/explained_variance": explained_variance(values, returns),
            "critic/value_mean": _mean(values),
            "critic/return_mean": _mean(returns),
        }
        if not steps:
            return metrics
        done = jax.device_get(steps)
        total: Sums = dict(done[0][0])
        for sums, _ in done[1:]:
            total = add_sums(total, sums, np.maximum)
        tokens = float(total["tokens"])
        return metrics | {
            "critic/value_loss": float(total["loss"]) / tokens,
            "critic/clip_frac": float(total["clip_frac"]) / tokens,
            "critic/grad_norm": float(np.mean([m["grad_norm"] for _, m in done])),
            "critic/lr": float(done[-1][1]["lr"]),
            "critic/optimizer_steps": float(len(done)),
            "critic/skipped_steps": float(sum(int(m["skipped"]) for _, m in done)),
        }

    def _packed(self, trajectories: Sequence[Trajectory]) -> PackedBatch:
        return self._stepper.program.pack(samples_of(trajectories, [0.0] * len(trajectories), "token_mean"))


def _mean(parts: Sequence[np.ndarray]) -> float:
    tokens = np.concatenate(parts) if len(parts) else np.zeros(0)
    return float(np.mean(tokens)) if len(tokens) else 0.0
