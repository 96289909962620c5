"""TPU slices by name, and their devices, on a machine that has none: libtpu compiles for them all the same.

Names are libtpu's, generation:AxB or AxBxC of chips, such as v5e:4x4 or v5p:2x2x1. A generation's table row holds what
the compiler itself leaves a program (found by asking it for too much) and the published rate. v4 and tpu7x chips show
as two devices each. Left out: placing a slice's hosts, which changes nothing in what is compiled.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rollout.errors import UserError

if TYPE_CHECKING:
    import jax


@dataclass(frozen=True)
class Generation:
    """A kind of TPU, by device: bytes of HBM that a program may use, bfloat16 operations a second."""

    hbm: float
    flops: float
    devices_per_chip: int
    slices: tuple[str, ...]
    """Shapes one can rent that this was tried with."""


@dataclass(frozen=True)
class Slice:
    """A named slice."""

    name: str
    generation: Generation
    devices: int


_GIB = 2.0**30

GENERATIONS = {
    "v4": Generation(15.25 * _GIB, 137.5e12, 2, ("2x2x1", "2x2x2", "2x2x4", "4x4x4")),
    "v5e": Generation(15.75 * _GIB, 197e12, 1, ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
    "v5p": Generation(95.74 * _GIB, 459e12, 1, ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")),
    "v6e": Generation(31.25 * _GIB, 918e12, 1, ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
    "tpu7x": Generation(94.75 * _GIB, 1153.5e12, 2, ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")),
}

# libtpu looks for a machine's own TPUs and for the cloud's description of them, and lets one process have it at a time.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def prepare(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets what libtpu reads when it is loaded. Call before jax is imported: jax must not take an accelerator for this."""
    environment.update(ENVIRONMENT)


def known() -> list[str]:
    """Names of slices, by generation and size."""
    return [f"{name}:{shape}" for name, generation in GENERATIONS.items() for shape in generation.slices]


def find(name: str) -> Slice:
    """The slice of this name. Raises UserError that lists the known ones."""
    generation, colon, shape = name.partition(":")
    row = GENERATIONS.get(generation)
    if row is None or not colon or not re.fullmatch(r"[1-9]\d{0,2}(x[1-9]\d{0,2}){1,2}", shape):
        raise UserError(f"--topology {name}: expected generation:shape, such as {_listed()}")
    return Slice(name, row, math.prod(int(n) for n in shape.split("x")) * row.devices_per_chip)


def slices(generation: Generation | None = None) -> list[Slice]:
    """Known slices, of one generation or all."""
    return [s for s in map(find, known()) if generation in (None, s.generation)]


def devices(name: str) -> list[jax.Device]:
    """The devices of a slice, to compile for. Raises UserError without libtpu, or where it does not know the slice."""
    find(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("--topology needs libtpu, which compiles for a TPU without one: pip install '.[tpu]'")
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # jaxlib raises its own error, RuntimeError or NotImplementedError by version
        first = str(error).splitlines()[0]
        raise UserError(f"--topology {name}: libtpu says: {first}. Slices that work: {_listed()}") from error
    return list(found.devices)


def _listed() -> str:
    return ", ".join(known())
