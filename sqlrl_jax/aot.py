"""The training step compiled for devices that are not there, and what the compiler then knows of it.

Three functions make a step: the gradients of a micro-batch, which is where time and memory go, their application, and under a
KL term or a correction the scoring. The first two are compiled, with the very shapes and shardings of a run, and with gae
those of the critic too: beside adapters they need more than the policy's. What a device holds beside a function's own
arguments (the optimizer's state while gradients are computed, a reference model, the other one of policy and critic) is
added.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rollout.errors import UserError
from sqlrl_jax import hlo
from sqlrl_jax.config import Config
from sqlrl_jax.critic import make_critic_program
from sqlrl_jax.learner import make_program, old_policy
from sqlrl_jax.mesh import replicated
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.step import Program

_GIB = 2.0**30
_UNITS = {"K": 2.0**10, "M": 2.0**20, "G": _GIB, "T": 2.0**40}
HOST_MEMORY = "pinned_host"
ATTENTION_KERNEL = "tpu_custom_call"  # what Pallas kernels are called in a TPU's program


@dataclass(frozen=True)
class Compiled:
    """One function of the step. Bytes on one device; where it does not fit, what the compiler says it needs."""

    name: str
    seconds: float
    own: float
    """Arguments, results and, at the busiest moment, temporaries."""
    temporary: float
    resident: float
    """What a device holds meanwhile and the function does not see."""
    refused: str = ""
    text: str = ""
    """Its HLO."""

    @property
    def needs(self) -> float:
        return self.own + self.resident


def compile_step(
    config: Config, model: ModelConfig, mesh: Mesh, critic_model: ModelConfig | None = None
) -> Iterator[Compiled]:
    """The gradients' function, then the one that applies them; with gae the same two of the critic, which has the policy's
    sizes if it is given none. Raises UserError when the compiler fails but for memory."""
    trainer = config.trainer  # the length of a schedule changes no shape: just longer than its warm-up
    policy = make_program(config, mesh, model, trainer.policy.optimizer_config.num_warmup_steps + 1)
    params, beside = policy.abstract_params(), 0.0
    if trainer.algorithm.needs_reference and not policy.frozen:
        numbers = _held(params) / np.dtype(trainer.policy.param_dtype).itemsize
        beside = numbers * jax.numpy.dtype(trainer.policy.compute_dtype).itemsize
    if not trainer.algorithm.needs_critic:
        yield from _functions("", policy, abstract_batch(config, policy), beside)
        return
    steps = trainer.critic.optimizer_config.num_warmup_steps + 1
    critic = make_critic_program(config, mesh, critic_model or model, steps)
    yield from _functions("", policy, abstract_batch(config, policy), beside + _held(critic.abstract_state()))
    resting = _held((policy.abstract_state(), policy.abstract_frozen()))
    yield from _functions("critic ", critic, _critic_batch(critic), beside + resting)


def _functions(
    whose: str, program: Program, batch: dict[str, jax.ShapeDtypeStruct], beside: float
) -> Iterator[Compiled]:
    """Both functions of a program; a device holds `beside` more bytes meanwhile."""
    state, frozen = program.abstract_state(), program.abstract_frozen()
    shapes = jax.eval_shape(program.zeros, state.params, frozen, batch)
    where = (program.gradient_shardings, jax.tree.map(lambda _: replicated(program.mesh), shapes[1]))
    gradients, sums = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, where)
    count, weight = jax.ShapeDtypeStruct((), np.int32), jax.ShapeDtypeStruct((), np.float32)
    arguments = (gradients, sums, state.params, frozen, batch, count)
    yield _compile(f"{whose}gradients", program.add, arguments, _held(state.opt_state) + beside)
    yield _compile(f"{whose}apply", program.apply, (state, gradients, weight), _held(frozen) + beside)


def abstract_batch(config: Config, program: Program) -> dict[str, jax.ShapeDtypeStruct]:
    """A micro-batch's arrays, with those that the algorithm adds after packing and the axis along which there may be more."""
    batch = program.abstract_batches()
    algorithm = config.trainer.algorithm
    added = {
        "old_logprobs": (old_policy(config.trainer) == "scored", np.float32),
        "reference_logprobs": (algorithm.use_kl_loss, np.float32),
        "selected": (algorithm.policy_loss_type in ("clip_cov", "kl_cov"), np.bool_),
    }
    for name, (wanted, dtype) in added.items():
        if wanted:
            batch[name] = jax.ShapeDtypeStruct(batch["index"].shape, dtype, sharding=batch["index"].sharding)
    if algorithm.use_kl_loss and algorithm.adapts_kl:
        count = batch["count"]
        batch["kl_coef"] = jax.ShapeDtypeStruct(count.shape, np.float32, sharding=count.sharding)
    return batch


def _critic_batch(program: Program) -> dict[str, jax.ShapeDtypeStruct]:
    """A micro-batch's arrays, with what the critic said of them and is to say."""
    batch = program.abstract_batches()
    slots = jax.ShapeDtypeStruct(batch["index"].shape, np.float32, sharding=batch["index"].sharding)
    return batch | {"old_values": slots, "returns": slots}


def _held(tree: Any) -> float:
    """Bytes of abstract arrays in one device's memory."""
    leaves = [a for a in jax.tree_util.tree_leaves(tree) if a.sharding.memory_kind != HOST_MEMORY]
    return float(sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves))


def _compile(name: str, function: Any, arguments: tuple[Any, ...], resident: float) -> Compiled:
    start = time.perf_counter()
    try:
        compiled = function.trace(*arguments).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error), _held(arguments))
        if needed is None:
            raise UserError(f"the {name} do not compile: {str(error)[:2000]}") from error
        return Compiled(name, time.perf_counter() - start, needed, 0.0, resident, refused=_first_lines(str(error)))
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    # A TPU's sizes add up buffers that share memory; its peak counts what lies in the core's own memory, which is small.
    busiest = min(memory.peak_memory_in_bytes, held + memory.temp_size_in_bytes)
    own = max(busiest, held) + memory.generated_code_size_in_bytes
    return Compiled(name, seconds, float(own), float(own - held), resident, text=compiled.as_text())


def _needed(message: str, arguments: float) -> float | None:
    """Bytes of HBM that the compiler says a program needs, where it refused one for that. Before it has laid out anything it
    speaks of temporaries alone, to which the arguments come."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    used = re.search(r"Used ([\d.]+)([KMGT]) of", message)
    if used:
        return float(used[1]) * _UNITS[used[2]]
    used = re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)", message)
    return float(used[1]) * _UNITS[used[2]] + arguments if used else math.inf


def _first_lines(message: str) -> str:
    return " ".join(message.split())[:300]


def axes_of(mesh_sizes: dict[str, int], devices: tuple[int, ...]) -> str:
    """The axes of the mesh along which these devices, counted in its order, differ: "fsdp", or "fsdp+tensor"."""
    places = np.array(np.unravel_index(devices, tuple(mesh_sizes.values())))
    varying = [name for name, row in zip(mesh_sizes, places, strict=True) if len(set(row.tolist())) > 1]
    return "+".join(varying)


def sent_by_axis(summary: hlo.Summary, mesh_sizes: dict[str, int]) -> dict[str, float]:
    """Bytes that one device sends, by the axes it sends over."""
    out: dict[str, float] = {}
    for collective in summary.collectives:
        if collective.size > 1:
            axes = axes_of(mesh_sizes, collective.devices)
            out[axes] = out.get(axes, 0.0) + collective.sent
    return out
