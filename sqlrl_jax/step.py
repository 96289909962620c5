"""The compiled optimizer step: gradients of one micro-batch after another are summed, then applied once.

`Stepper` owns the sharded state (parameters, optimizer, counters) and the jitted functions over it. It knows nothing of
rewards or episodes: an objective turns the log-probabilities of the trained tokens into a summed loss, so reinforcement
learning and the supervised cold start run the same code. Nothing here waits for the device; the metrics it returns are
still being computed. Left out: loss scaling, because masters and statistics are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from sqlrl_jax.config import PolicyConfig
from sqlrl_jax.data.packing import Arrays, PackedBatch
from sqlrl_jax.mesh import RULES, batch_sharding, replicated
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.decoder import Compute, forward, unembedding
from sqlrl_jax.model.params import Params, param_shardings
from sqlrl_jax.optimizer import make_optimizer, schedule
from sqlrl_jax.rl.logprobs import TokenLogprobs, token_logprobs
from sqlrl_jax.rl.losses import Sums, add_sums

# (log-probabilities of the trained tokens, the micro-batch) → (summed loss, sums of metrics)
Objective = Callable[[TokenLogprobs, dict[str, Array]], tuple[Float[Array, ""], Sums]]


class State(NamedTuple):
    """All that a step changes. `step` counts applied optimizer steps, `skipped` those with a non-finite gradient.

    The leaves are arrays, or in the same places their shapes or shardings; the counters are scalars, int32.
    """

    params: Params
    opt_state: Any
    step: Any
    skipped: Any


class Stepper:
    """Sharded state and the jitted functions over it. The first step overwrites `params`: do not use them again."""

    def __init__(
        self,
        policy: PolicyConfig,
        model_config: ModelConfig,
        mesh: Mesh,
        params: Params,
        objective: Objective,
        *,
        temperature: float,
        total_steps: int,
    ) -> None:
        self.policy, self.model_config, self.mesh = policy, model_config, mesh
        self.shards = int(np.prod([mesh.shape[axis] for axis in RULES["batch"]]))
        self.compiles = 0
        self._objective, self._temperature = objective, temperature
        self._compute = Compute(policy.compute_dtype, policy.scan_layers, policy.remat, mesh)
        self._optimizer = make_optimizer(policy.optimizer_config, model_config, total_steps)
        self._schedule = schedule(policy.optimizer_config, total_steps)
        self._shardings = self._state_shardings(params)
        self._build()
        params = jax.device_put(params, self._shardings.params)
        step, skipped = (jax.device_put(np.int32(0), replicated(mesh)) for _ in range(2))
        self.state = State(params, self._init(params), step, skipped)

    def _state_shardings(self, params: Params) -> State:
        """Optimizer moments lie as their parameters do; counters are everywhere."""
        by_parameter, everywhere = param_shardings(self.model_config, self.mesh), replicated(self.mesh)
        by_path = {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(by_parameter)}

        def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
            names = _names(path)
            return next((by_path[names[i:]] for i in range(len(names)) if names[i:] in by_path), everywhere)

        abstract = jax.eval_shape(self._optimizer.init, params)
        return State(by_parameter, jax.tree_util.tree_map_with_path(of, abstract), everywhere, everywhere)

    def _build(self) -> None:
        where, everywhere = self._shardings, replicated(self.mesh)
        slots = NamedSharding(self.mesh, PartitionSpec(RULES["batch"]))
        self._batch_shardings = {
            **dict.fromkeys(("tokens", "positions", "segment_ids"), batch_sharding(self.mesh)),
            **dict.fromkeys(("index", "targets", "mask", "episodes", "selected"), slots),
            **dict.fromkeys(("old_logprobs", "rollout_logprobs", "advantages", "weights"), slots),
            "count": everywhere,
        }
        self._init = jax.jit(self._optimizer.init, out_shardings=where.opt_state)
        self._zeros = jax.jit(self._nothing, out_shardings=(where.params, everywhere))
        self._add = jax.jit(self._accumulate, out_shardings=(where.params, everywhere), donate_argnums=(0, 1))
        self._apply = jax.jit(self._applied, out_shardings=(where, everywhere), donate_argnums=0)
        self._score = jax.jit(self._scored, out_shardings=slots)

    # The next functions are traced by jit; each trace of a large one is counted as a compilation.

    def _scored(self, params: Params, batch: dict[str, Array]) -> TokenLogprobs:
        self.compiles += 1
        return self._logprobs(params, batch)

    def _logprobs(self, params: Params, batch: dict[str, Array]) -> TokenLogprobs:
        hidden = forward(
            self.model_config, params, batch["tokens"], batch["positions"], batch["segment_ids"], self._compute
        )
        hidden = hidden.reshape(self.shards, -1, hidden.shape[-1])
        unembed = unembedding(params).astype(hidden.dtype)
        return token_logprobs(
            hidden,
            unembed,
            batch["index"],
            batch["targets"],
            batch["count"],
            temperature=self._temperature,
            chunk=self.policy.logprob_chunk,
        )

    def _gradients(self, params: Params, batch: dict[str, Array]) -> tuple[Params, Sums]:
        def loss(params: Params) -> tuple[Array, Sums]:
            total, sums = self._objective(self._logprobs(params, batch), batch)
            return total, {"loss": total, **sums}

        gradients, sums = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda g: g.astype(jnp.float32), gradients), sums

    def _nothing(self, params: Params, batch: dict[str, Array]) -> tuple[Params, Sums]:
        """Zeros to add the first micro-batch to: one compiled program then serves the first and all others."""
        shapes = jax.eval_shape(self._gradients, params, batch)
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

    def _accumulate(
        self, gradients: Params, sums: Sums, params: Params, batch: dict[str, Array]
    ) -> tuple[Params, Sums]:
        self.compiles += 1
        more, more_sums = self._gradients(params, batch)
        return jax.tree.map(jnp.add, gradients, more), add_sums(sums, more_sums)

    def _applied(self, state: State, gradients: Params, total_weight: Array) -> tuple[State, dict[str, Array]]:
        """The state after one step with the mean gradient, clipped; the same state where that is not finite."""
        self.compiles += 1
        gradients = jax.tree.map(lambda g: g / total_weight, gradients)
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(norm)
        scale = jnp.where(finite, jnp.minimum(1.0, self.policy.optimizer_config.max_grad_norm / (norm + 1e-6)), 0.0)
        gradients = jax.tree.map(lambda g: jnp.where(finite, g * scale, 0.0), gradients)
        updates, opt_state = self._optimizer.update(gradients, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), state.params, updates)
        applied = finite.astype(jnp.int32)
        new = State(params, opt_state, state.step + applied, state.skipped + 1 - applied)
        kept = jax.tree.map(partial(jnp.where, finite), (params, opt_state), (state.params, state.opt_state))
        metrics = {"grad_norm": norm, "skipped": 1 - applied, "lr": jnp.asarray(self._schedule(state.step))}
        return new._replace(params=kept[0], opt_state=kept[1]), metrics

    def _to_device(self, arrays: Arrays) -> dict[str, Array]:
        return {k: jax.device_put(v, self._batch_shardings[k]) for k, v in arrays.items()}

    def minibatch(self, packed: PackedBatch) -> tuple[Sums, dict[str, Array]]:
        """One optimizer step on a packed minibatch with at least one trained token.

        Returns the objective's sums over the whole minibatch, with `loss`, and the step's grad_norm, skipped and lr.
        """
        gradients, sums = self._zeros(self.state.params, packed.micro_batches[0])
        for arrays in packed.micro_batches:
            gradients, sums = self._add(gradients, sums, self.state.params, self._to_device(arrays))
        self.state, metrics = self._apply(self.state, gradients, np.float32(packed.total_weight))
        return sums, metrics

    def logprobs(self, packed: PackedBatch) -> Iterator[TokenLogprobs]:
        """Of each micro-batch: log-probability, entropy and greediness of the trained tokens [shards, slots]."""
        for arrays in packed.micro_batches:
            yield self._score(self.state.params, self._to_device(arrays))

    def abstract_state(self) -> State:
        """Shapes, dtypes and shardings of the state: what a checkpoint is restored into."""
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), self.state, self._shardings
        )


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
