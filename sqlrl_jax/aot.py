"""The training step compiled for devices that are not there, and what the compiler then knows of it.

Three functions make a step: the gradients of a micro-batch, which is where time and memory go, their application, and under a
KL term or a correction the scoring. The first two are compiled, with the very shapes and shardings of a run. What a device
holds beside a function's own arguments (the optimizer's state while gradients are computed, a reference model, a critic)
is added. A critic's own functions are left out: they are the policy's without its head, which is what needs most.
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


def compile_step(config: Config, model: ModelConfig, mesh: Mesh) -> Iterator[Compiled]:
    """The gradients' function, then the one that applies them. Raises UserError when the compiler fails but for memory."""
    warmup = config.trainer.policy.optimizer_config.num_warmup_steps
    program = make_program(config, mesh, model, optimizer_steps=warmup + 1)  # the length of a schedule changes no shape
    state, frozen, batch = program.abstract_state(), program.abstract_frozen(), abstract_batch(config, program)
    shapes, one = jax.eval_shape(program.zeros, state.params, frozen, batch), jax.ShapeDtypeStruct((), np.int32)
    where = (program.gradient_shardings, jax.tree.map(lambda _: replicated(mesh), shapes[1]))
    gradients, sums = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, where)
    beside = 0.0
    if config.trainer.algorithm.needs_critic:
        beside += _held(make_critic_program(config, mesh, model, warmup + 1).abstract_state())
    if config.trainer.algorithm.needs_reference and not program.frozen:
        numbers = _held(state.params) / np.dtype(config.trainer.policy.param_dtype).itemsize
        beside += numbers * jax.numpy.dtype(config.trainer.policy.compute_dtype).itemsize
    weight = jax.ShapeDtypeStruct((), np.float32)
    yield _compile(
        "gradients",
        program.add,
        (gradients, sums, state.params, frozen, batch, one),
        _held(state.opt_state) + beside,
    )
    yield _compile("apply", program.apply, (state, gradients, weight), _held(frozen) + beside)


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
