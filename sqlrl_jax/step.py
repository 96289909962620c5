"""The compiled optimizer step: gradients of one micro-batch after another are summed, then applied once.

Gradients are summed in the layout that the forward pass uses (layout.py) and brought back when they are applied. On a CPU
one run of the program takes several micro-batches, because every run allocates all its buffers anew, and the kernel
clears them: a tenth of the time of a 78M model's update. An accelerator keeps its memory, and one micro-batch a run there
says plainly what must fit.

`Program` is the step without arrays: shapes, shardings and jitted functions, made from a configuration alone, so that it can
be compiled for devices that are not there. `Stepper` is a program with its state. They know nothing of rewards or
episodes: an objective turns what the model says of the trained tokens into a summed loss, so reinforcement learning, its
critic (which says values, see critic.py) and the supervised cold start run the same code. Nothing here waits for the
device; the metrics it returns are still being computed. Left out: loss scaling, because masters and statistics are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from sqlrl_jax.allocator import give_back_surplus
from sqlrl_jax.config import PolicyConfig
from sqlrl_jax.config_lora import targets
from sqlrl_jax.data.packing import Arrays, PackedBatch, Sample, batch_shapes, pack_for
from sqlrl_jax.data.rows import check_rows
from sqlrl_jax.mesh import RULES, batch_sharding, in_host_memory, platform_of, replicated
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.decoder import Compute, forward, unembedding
from sqlrl_jax.model.layout import layout_for
from sqlrl_jax.model.lora import frozen_specs, join, trained_specs
from sqlrl_jax.model.params import Params, ParamSpec, abstract_specs, param_specs, spec_shardings
from sqlrl_jax.optimizer import make_optimizer, schedule
from sqlrl_jax.rl.logprobs import TokenLogprobs, token_logprobs
from sqlrl_jax.rl.losses import Sums, add_sums

# (the model's outputs at the trained tokens, the micro-batch) → (summed loss, sums of metrics)
Objective = Callable[[Any, dict[str, Array]], tuple[Float[Array, ""], Sums]]

# Micro-batches that one run of the program takes on a CPU, at most.
_RUN_LENGTH = 16
# XLA's own choice on a CPU is the order in which most can run at once: a tenth more memory, and of a large model no faster
# on two cores. A small model's update seemed slower for it, and has no need of it.
_FEW_BUFFERS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
_SMALL_MODEL = 2**24  # numbers


class State(NamedTuple):
    """All that a step changes. `params` are the trained ones: with adapters, these alone. `step` counts applied optimizer
    steps, `skipped` those with a non-finite gradient.

    The leaves are arrays, or in the same places their shapes or shardings; the counters are scalars, int32.
    """

    params: Params
    opt_state: Any
    step: Any
    skipped: Any


class Program:
    """Shapes, shardings and jitted functions of a step over `mesh`; holds no arrays.

    `start(params)` → state; `zeros(params, frozen, batches)` → (gradients, sums); `add(gradients, sums, params, frozen,
    batches, count)` adds the first `count` of the micro-batches that lie along the leading axis of `batches`, overwriting
    gradients and sums; `apply(state, gradients, total_weight)` → (state, metrics), overwriting the state; `score(params,
    frozen, batch)` → TokenLogprobs of one micro-batch, whole on every device, and `score_whole(params, batch)` the same of
    a whole model, such as the reference.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        model_config: ModelConfig,
        mesh: Mesh,
        objective: Objective,
        *,
        temperature: float,
        total_steps: int,
    ) -> None:
        self.policy, self.model_config, self.mesh = policy, model_config, mesh
        self.shards = int(np.prod([mesh.shape[axis] for axis in RULES["batch"]]))
        check_rows(policy.row_tokens, policy.rows_per_micro_batch, self.shards, policy.buckets, mesh.shape["sequence"])
        self._objective, self._temperature = objective, temperature
        platform = platform_of(mesh)
        self.run_length = _RUN_LENGTH if platform == "cpu" else 1
        self.shares_prefixes = platform != "tpu" if policy.share_prefixes is None else policy.share_prefixes
        below = policy.row_tokens if platform == "cpu" else None
        self._compute = Compute(policy.compute_dtype, policy.remat, mesh, below, self.shares_prefixes)
        self.trained, self.frozen = self._declared()
        lora = policy.model.lora
        self._layout = layout_for(
            param_specs(model_config), mesh, scan_layers=policy.scan_layers, apart=targets(lora) if lora.rank else ()
        )
        self._optimizer = make_optimizer(policy.optimizer_config, self.trained, total_steps)
        self._schedule = schedule(policy.optimizer_config, total_steps)
        self.shardings = self._state_shardings()
        slots = NamedSharding(mesh, PartitionSpec(RULES["batch"]))
        self.batch_shardings = {
            **dict.fromkeys(("tokens", "positions", "reach"), batch_sharding(mesh)),
            **dict.fromkeys(("index", "targets", "mask", "episodes", "selected"), slots),
            **dict.fromkeys(("rollout_logprobs", "old_logprobs", "reference_logprobs", "advantages", "weights"), slots),
            **dict.fromkeys(("old_values", "returns"), slots),
            **dict.fromkeys(("count", "kl_coef"), replicated(mesh)),
        }
        self._build()

    def _build(self) -> None:
        where, everywhere = self.shardings, replicated(self.mesh)
        self.gradient_shardings = spec_shardings(self._layout.specs(self.trained), self.mesh)
        summed = (self.gradient_shardings, everywhere)
        self.start = jax.jit(self._started, out_shardings=where)
        self.zeros = jax.jit(self._nothing, out_shardings=summed)
        numbers = sum(math.prod(spec.shape) for spec in (self.trained | self.frozen).values())
        tight = platform_of(self.mesh) == "cpu" and numbers > _SMALL_MODEL
        self.add = jax.jit(
            self._accumulate,
            out_shardings=summed,
            donate_argnums=(0, 1),
            compiler_options=_FEW_BUFFERS if tight else None,
        )
        self.apply = jax.jit(self._applied, out_shardings=(where, everywhere), donate_argnums=0)
        self.score = jax.jit(self._scored, out_shardings=everywhere)
        self.score_plainly = jax.jit(partial(self._scored, temperature=1.0), out_shardings=everywhere)
        self.score_whole = jax.jit(self._scored_whole, out_shardings=everywhere)

    def _declared(self) -> tuple[dict[str, ParamSpec], dict[str, ParamSpec]]:
        """The parameters that a step changes and those that none changes."""
        lora = self.policy.model.lora
        return trained_specs(self.model_config, lora), frozen_specs(self.model_config, lora)

    def _state_shardings(self) -> State:
        """Optimizer moments lie as their parameters do, perhaps in the host's memory; counters are everywhere."""
        by_parameter, everywhere = spec_shardings(self.trained, self.mesh), replicated(self.mesh)
        by_path = {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(by_parameter)}

        def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
            names = _names(path)
            return next((by_path[names[i:]] for i in range(len(names)) if names[i:] in by_path), everywhere)

        abstract = jax.eval_shape(self._optimizer.init, self.abstract_params())
        self._moments = jax.tree_util.tree_map_with_path(of, abstract)
        resting = in_host_memory(self._moments) if self.policy.offload_optimizer else self._moments
        return State(by_parameter, resting, everywhere, everywhere)

    def pack(self, samples: Sequence[Sample]) -> PackedBatch:
        """Samples in the rows of the configuration, as the functions take them."""
        return pack_for(self.policy, samples, self.shards, self.shares_prefixes)

    # What the functions are lowered with where there are no arrays.

    def abstract_params(self) -> Params:
        """Shapes, dtypes and shardings of the trained parameters."""
        return abstract_specs(self.trained, self.policy.param_dtype, self.mesh)

    def abstract_frozen(self) -> Params:
        """The same of the parameters that no step changes."""
        return abstract_specs(self.frozen, self.policy.compute_dtype, self.mesh)

    def abstract_state(self) -> State:
        """The same of the state: what a checkpoint is restored into."""
        shapes = jax.eval_shape(self._started, self.abstract_params())
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, self.shardings)

    def abstract_batches(self, count: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """The same of `count` micro-batches of trainer.policy's rows, along a leading axis."""
        shapes = batch_shapes(
            self.policy.rows_per_micro_batch, self.policy.row_tokens, self.policy.logprob_chunk, self.shards
        )
        return {
            name: jax.ShapeDtypeStruct((count, *shape), dtype, sharding=_along_runs(self.batch_shardings[name]))
            for name, (shape, dtype) in shapes.items()
        }

    # The next functions are traced by jit.

    def _started(self, params: Params) -> State:
        zero = jnp.zeros((), jnp.int32)
        return State(params, self._optimizer.init(params), zero, zero)

    def _scored(self, params: Params, frozen: Params, batch: dict[str, Array], temperature: float | None = None) -> Any:
        return self._outputs(self._joined(self._layout.lay(frozen), self._layout.lay(params)), batch, temperature)

    def _scored_whole(self, params: Params, batch: dict[str, Array]) -> Any:
        return self._outputs(self._layout.lay(params), batch)

    def _joined(self, frozen: Params, params: Params) -> Params:
        return join(frozen, params, self.policy.model.lora)

    def _hidden(self, params: Params, batch: dict[str, Array]) -> Float[Array, "rows tokens dim"]:
        places = batch["tokens"], batch["positions"], batch["reach"]
        return forward(self.model_config, params, *places, self._compute)

    def _outputs(self, params: Params, batch: dict[str, Array], temperature: float | None = None) -> TokenLogprobs:
        """What the model says of the trained tokens; at the sampling temperature if no other is given."""
        return token_logprobs(
            self._hidden(params, batch),
            unembedding(params),
            batch["index"],
            batch["targets"],
            batch["count"],
            temperature=temperature or self._temperature,
            chunk=self.policy.logprob_chunk,
            mesh=self.mesh,
        )

    def _gradients(self, params: Params, frozen: Params, batch: dict[str, Array]) -> tuple[Params, Sums]:
        """Of one micro-batch; parameters and gradients are laid out."""

        def loss(params: Params) -> tuple[Array, Sums]:
            total, sums = self._objective(self._outputs(self._joined(frozen, params), batch), batch)
            return total, {"loss": total, **sums}

        gradients, sums = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda g: g.astype(jnp.float32), gradients), sums

    def _nothing(self, params: Params, frozen: Params, batches: dict[str, Array]) -> tuple[Params, Sums]:
        """Zeros to add the first micro-batch to: one compiled program then serves the first and all others."""
        laid = (self._layout.lay(params), self._layout.lay(frozen))
        shapes = jax.eval_shape(self._gradients, *laid, {name: a[0] for name, a in batches.items()})
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

    def _accumulate(
        self, gradients: Params, sums: Sums, params: Params, frozen: Params, batches: dict[str, Array], count: Array
    ) -> tuple[Params, Sums]:
        laid = (self._layout.lay(params), self._layout.lay(frozen))

        def one(i: Array | int, carry: tuple[Params, Sums]) -> tuple[Params, Sums]:
            more, more_sums = self._gradients(*laid, {name: a[i] for name, a in batches.items()})
            return jax.tree.map(jnp.add, carry[0], more), add_sums(carry[1], more_sums)

        if batches["tokens"].shape[0] == 1:
            return one(0, (gradients, sums))
        return jax.lax.fori_loop(0, count, one, (gradients, sums))

    def _applied(self, state: State, gradients: Params, total_weight: Array) -> tuple[State, dict[str, Array]]:
        """The state after one step with the mean gradient, clipped; the same state where that is not finite."""
        norm = optax.global_norm(gradients) / total_weight  # first, so that not all gradients need lie in both layouts
        finite = jnp.isfinite(norm)
        clip = jnp.minimum(1.0, self.policy.optimizer_config.max_grad_norm / (norm + 1e-6))
        (gradients,) = jax.linear_transpose(self._layout.lay, _float32(state.params))(gradients)
        gradients = jax.tree.map(lambda g: jnp.where(finite, g * (clip / total_weight), 0.0), gradients)
        if self.policy.offload_optimizer:
            state = state._replace(opt_state=jax.device_put(state.opt_state, self._moments))
        updates, opt_state = self._optimizer.update(gradients, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), state.params, updates)
        applied = finite.astype(jnp.int32)
        new = State(params, opt_state, state.step + applied, state.skipped + 1 - applied)
        kept = jax.tree.map(partial(jnp.where, finite), (params, opt_state), (state.params, state.opt_state))
        metrics = {"grad_norm": norm, "skipped": 1 - applied, "lr": jnp.asarray(self._schedule(state.step))}
        return new._replace(params=kept[0], opt_state=kept[1]), metrics


class Stepper:
    """A program with its state. The first step overwrites `params`: do not use them again. `frozen` are the parameters that
    are not trained, under adapters."""

    def __init__(self, program: Program, params: Params, frozen: Params | None = None) -> None:
        self.program, self.frozen = program, frozen or {}
        self.state: State = program.start(jax.device_put(params, program.shardings.params))

    def minibatch(self, packed: PackedBatch) -> tuple[Sums, dict[str, Array]]:
        """One optimizer step on a packed minibatch with at least one trained token.

        Returns the objective's sums over the whole minibatch, with `loss`, and the step's grad_norm, skipped and lr.
        """
        give_back_surplus()
        params = self.state.params
        gradients: Params = {}
        sums: Sums = {}
        for batches, count in self._runs(packed.micro_batches):
            if not gradients:
                gradients, sums = self.program.zeros(params, self.frozen, batches)
            gradients, sums = self.program.add(gradients, sums, params, self.frozen, batches, count)
        self.state, metrics = self.program.apply(self.state, gradients, np.float32(packed.total_weight))
        return sums, metrics

    def scored(self, packed: PackedBatch, model: Params | None = None) -> Iterator[Any]:
        """Of each micro-batch what the present weights, or those of `model`, say of the trained tokens [shards, slots]:
        TokenLogprobs, or a critic's values."""
        for arrays in packed.micro_batches:
            batch = self._to_device(arrays)
            if model is None:
                yield self.program.score(self.state.params, self.frozen, batch)
            else:
                yield self.program.score_whole(model, batch)

    def plain_logprobs(self, packed: PackedBatch) -> Iterator[TokenLogprobs]:
        """The same under the present weights at temperature 1, whatever is sampled with."""
        for arrays in packed.micro_batches:
            yield self.program.score_plainly(self.state.params, self.frozen, self._to_device(arrays))

    def _to_device(self, arrays: Arrays) -> dict[str, Array]:
        return {name: put(value, self.program.batch_shardings[name]) for name, value in arrays.items()}

    def _runs(self, micro_batches: list[Arrays]) -> Iterator[tuple[dict[str, Array], np.int32]]:
        """Micro-batches of one shape as the program takes them in one run, and how many of them there are."""
        length, shardings = self.program.run_length, self.program.batch_shardings
        for _, group in groupby(micro_batches, key=lambda arrays: arrays["tokens"].shape):
            same = list(group)
            for start in range(0, len(same), length):
                run = same[start : start + length]
                stacked = {name: _stack([arrays[name] for arrays in run], length) for name in run[0]}
                yield {name: put(a, _along_runs(shardings[name])) for name, a in stacked.items()}, np.int32(len(run))


def put(value: Any, sharding: NamedSharding) -> Array:
    """An array that every process holds whole, on the devices: each process fills its own."""
    if isinstance(value, jax.Array) or sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _stack(parts: Sequence[Any], length: int) -> Any:
    """Arrays of one shape along a new leading axis of `length`, zeros after the last."""
    if length == 1:  # no copy of what lies on devices
        return parts[0][None]
    rest = [np.zeros(parts[0].shape, parts[0].dtype)] * (length - len(parts))
    return np.stack([*(np.asarray(part) for part in parts), *rest])


def _along_runs(sharding: NamedSharding) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def _float32(params: Params) -> Params:
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), params)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
